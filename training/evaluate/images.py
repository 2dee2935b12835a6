"""Images of a benchmark for an evaluation: the whole image resized to a square, without a crop.

That is LAVIS's ``blip_image_eval`` and transformers' ``BlipImageProcessorPil``: Pillow's bicubic resize. The resize of
training, and transformers' with torchvision, differ from it by one level in a few pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.images.decode import Image, ImageError, decode_rgb
from pipeline.prefetch import prefetch_map
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.names import confined_name

_READERS = 8

# Called with what is being done, the number of images that are done, and that of all images.
ReportProgress = Callable[[str, int, int], None]


def ignore_progress(what: str, done: int, total: int) -> None:
    """Do nothing."""


class BenchmarkImages:
    """A folder of images, local or remote.

    Args:
        root: what the annotations' file names are relative to.
        size_px: side of the square.
        report: called before the first and after each batch.
    """

    def __init__(self, root: str, size_px: int, report: ReportProgress = ignore_progress) -> None:
        self.storage = Storage(root)
        self.size_px = size_px
        self.report = report

    def batches(self, files: Sequence[str], batch_size: int, what: str = "evaluating") -> Iterator[Tensor]:
        """Yield uint8 pixels_BCHW of the files in order, read ahead by a batch.

        Raises CapfiltError at the first file that is missing or does not decode: a score without it would be that
        of another benchmark.
        """
        done = 0
        self.report(what, done, len(files))
        pixels = prefetch_map(self.pixels, files, ahead=2 * batch_size, threads=_READERS)
        while batch := list(islice(pixels, batch_size)):
            yield torch.stack(batch)
            done += len(batch)
            self.report(what, done, len(files))

    def require_all(self, files: Sequence[str]) -> None:
        """Raise CapfiltError where names lead out of the folder, or files of a local one are missing.

        A remote one is not asked file by file.
        """
        files = [_confined(file) for file in files]
        if not self.storage.is_local:
            return
        missing = [file for file in dict.fromkeys(files) if not Path(self.storage.url(file)).is_file()]
        if missing:
            raise CapfiltError(
                f"{self.storage.url(missing[0])}: no such image, and {len(missing) - 1:,} others are missing; --images "
                "must be the folder that file names begin in"
            )

    def pixels(self, file: str) -> Tensor:
        """Return the uint8 pixels_CHW of one file. Raises CapfiltError for a name that leads out of the folder."""
        file = _confined(file)
        try:
            image = decode_rgb(self.storage.read(file))
        except FileNotFoundError as error:
            raise CapfiltError(
                f"{self.storage.url(file)}: no such image; --images must be the folder that file names begin in"
            ) from error
        except ImageError as error:
            raise CapfiltError(f"{self.storage.url(file)} does not decode ({error})") from error
        square = image.resize((self.size_px, self.size_px), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _confined(file: str) -> str:
    return confined_name(file.removeprefix("./"), "the annotations")
