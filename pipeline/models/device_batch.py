"""How many images a model takes at a time, where the device's memory decides."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class DeviceBatch:
    """The number of images that a model takes at a time: halved for good where the device has no memory for them.

    Args:
        take_at_most: called with the new number, before the model is called again.
    """

    def __init__(self, take_at_most: Callable[[int], None]) -> None:
        self.images: int | None = None
        """None as long as every batch had room."""
        self._take_at_most = take_at_most

    def map(self, compute: Callable[[slice], T], images: int) -> list[T]:
        """Call ``compute`` on rows 0 to ``images``, in order, in as many parts as the memory asks for.

        Raises torch.OutOfMemoryError where there is no room for one image.
        """
        results: list[T] = []
        start = 0
        while start < images:
            part = slice(start, min(start + (self.images or images), images))
            try:
                results.append(compute(part))
                start = part.stop
                continue
            except torch.OutOfMemoryError:
                if part.stop - part.start == 1:
                    raise
            # Here, not above: until its handler ends, the exception keeps the tensors of the frames it came through.
            self.images = (part.stop - part.start) // 2
            self._take_at_most(self.images)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return results
