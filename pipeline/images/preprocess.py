"""Pixels as vision models take them: an image is decoded once and resized for each model; ``normalise`` does the rest.

Until ``normalise``, which runs on the device, pixels are uint8: a quarter of the bytes of float32. ``exact`` resizes
with Pillow, bit for bit as BLIP's and open_clip's own preprocessing. ``fast`` resizes with PyTorch, whose weights have
15 bits where Pillow's have 22: bicubic, up to one value in a hundred differs by one level of 255, and one in a
hundred thousand (of noise; one in a million of photographs) by two. No value differs by more: the first pass is at
most one level off, and the second, whose weights' magnitudes sum to 1.25, at most one more. Both decode with Pillow:
OpenCV and torchvision give the same pixels for an intact JPEG, but accept different damaged ones.

The legend of the names: B images, C channels (3), H height, W width.
"""

import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.images.decode import ImageError, decode_rgb, read_header
from schemas.config import MAX_PIXELS, PixelPath
from schemas.errors import CapfiltError

# Images over this are decoded one at a time in a process. Decoding takes up to 12 bytes a pixel, so that a thread
# holds at most 50 MB, and one of them 0.6 GB.
_LARGE_PIXELS = 4_000_000
_large_image = threading.Lock()

# Pillow resizes one side and then the other, and rounds in between: in the other order noise differs by up to 20
# levels. From version 13 on it begins with the height where that shrinks by over twice the pixels of the width.
_HEIGHT_MAY_BE_FIRST = int(PIL.__version__.partition(".")[0]) >= 13

Interpolation = Literal["bicubic", "bilinear"]
# Pillow's numbers of the filters.
_INTERPOLATIONS: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}


class _Processor(Protocol):
    """Any image processor of transformers."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """How a model wants its images.

    Attributes:
        size_px: (height, width).
        resize: open_clip's modes. ``squash``: to the size, whatever the aspect ratio; ``shortest``: the image
            covers the size, and what is over is cut off; ``longest``: the size holds the image, and the rest is
            ``fill``.
        mean: by channel, of levels from 0 to 1; as ``std``.
        fill: level, from 0 to 255.
    """

    size_px: tuple[int, int]
    resize: Literal["squash", "shortest", "longest"]
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fill: int = 0

    @classmethod
    def of_blip(cls, processor: _Processor) -> "Preprocess":
        """Return what a ``BlipImageProcessorPil`` does. Raises CapfiltError for steps that are not supported."""
        settings = processor.to_dict()
        size = settings["size"]
        interpolation = _INTERPOLATIONS.get(settings["resample"])
        steps = {name for name, value in settings.items() if name.startswith("do_") and value}
        # The published files ask for padding to the largest of a batch, which has no effect where all have one size.
        harmless = {"do_convert_rgb"} if settings.get("pad_size") else {"do_convert_rgb", "do_pad"}
        if (
            steps - harmless != {"do_resize", "do_rescale", "do_normalize"}
            or not (interpolation and size.get("height") and size.get("width"))
            or settings["rescale_factor"] != 1 / 255
        ):
            raise CapfiltError(
                "caption.model: its preprocessor_config.json asks for other steps than a bicubic or bilinear "
                "resize to a height and a width, a division by 255 and a normalisation; use a model without them"
            )
        return cls(
            size_px=(size["height"], size["width"]),
            resize="squash",
            interpolation=interpolation,
            mean=tuple(settings["image_mean"]),
            std=tuple(settings["image_std"]),
        )

    @classmethod
    def of_open_clip(cls, preprocess_cfg: Mapping[str, Any]) -> "Preprocess":
        """Return what ``image_transform_v2`` does with this ``PreprocessCfg`` in evaluation."""
        size = preprocess_cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        resize, interpolation = preprocess_cfg["resize_mode"], preprocess_cfg["interpolation"]
        if interpolation == "random" or (resize == "shortest" and height != width):
            # As open_clip: "random" is for training only, and its transform for "shortest" to a rectangle ignores
            # the configured interpolation.
            interpolation = "bicubic"
        return cls(
            size_px=(height, width),
            resize=resize,
            interpolation=interpolation,
            mean=tuple(preprocess_cfg["mean"]),
            std=tuple(preprocess_cfg["std"]),
            fill=preprocess_cfg["fill_color"],
        )


def decode_pixels(
    data: bytes, preprocesses: Sequence[Preprocess], path: PixelPath
) -> tuple[Tensor, ...] | None:
    """Decode an image once, within the bounds of ``decode_rgb``, and resize it for each model.

    Thread-safe; decoding and resizing release the interpreter's lock, and the torch operation starts no threads.

    Returns:
        A uint8 tensor (C, H, W) for each preprocess, in memory as (H, W, C); None where the bytes are not an image, or
        one too long and narrow for a preprocess.
    """
    try:
        header = read_header(data)
        with _large_image if header.width * header.height > _LARGE_PIXELS else nullcontext():
            image = decode_rgb(data)
            sizes = [_resized_px(preprocess, image.height, image.width) for preprocess in preprocesses]
            # One copy out of Pillow for all models.
            source = np.array(image) if path == "fast" else image
            resized = [
                _resize(source, size_px, preprocess.interpolation)
                for preprocess, size_px in zip(preprocesses, sizes, strict=True)
            ]
    except ImageError:
        return None
    return tuple(
        torch.from_numpy(_cut_or_pad(pixels_HWC, preprocess.size_px, preprocess.fill)).permute(2, 0, 1)
        for preprocess, pixels_HWC in zip(preprocesses, resized, strict=True)
    )


def normalise(pixels_BCHW: Tensor, preprocess: Preprocess, dtype: torch.dtype) -> Tensor:
    """Return (pixels / 255 - mean) / std, computed in float32 on the pixels' device, rounded to ``dtype`` at the end.

    In float32 equal to what BLIP's and open_clip's preprocessing give, bit for bit.
    """
    assert pixels_BCHW.dtype == torch.uint8

    def by_channel(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=pixels_BCHW.device).view(-1, 1, 1)

    levels_BCHW = pixels_BCHW.to(torch.float32, memory_format=torch.contiguous_format)
    # Divided by a tensor, not by a number: CUDA multiplies by the inverse of a number, which rounds differently.
    levels_BCHW.div_(by_channel([255.0])).sub_(by_channel(preprocess.mean)).div_(by_channel(preprocess.std))
    return levels_BCHW.to(dtype)


def stack_pinned(pixels: Sequence[Tensor]) -> Tensor:
    """Stack uint8 tensors (C, H, W) to (B, C, H, W); where there is a GPU, in pinned memory for asynchronous copies."""
    channels, height, width = pixels[0].shape
    shape_BHWC = (len(pixels), height, width, channels)
    stacked_BHWC = torch.empty(shape_BHWC, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    stacked_BCHW = stacked_BHWC.permute(0, 3, 1, 2)
    for index, pixels_CHW in enumerate(pixels):
        stacked_BCHW[index].copy_(pixels_CHW)
    return stacked_BCHW


def _resized_px(preprocess: Preprocess, height: int, width: int) -> tuple[int, int]:
    """Return the size that an image is resized to, before it is cut or padded. Raises ImageError."""
    target_height, target_width = preprocess.size_px
    if preprocess.resize == "squash":
        return preprocess.size_px
    if preprocess.resize == "shortest" and target_height == target_width:
        # The shorter side becomes the target; the longer one is truncated, as in torchvision. The other cases round,
        # as in open_clip.
        long = int(target_height * max(height, width) / min(height, width))
        resized = (target_height, long) if height <= width else (long, target_height)
    else:
        ratios = height / target_height, width / target_width
        ratio = min(ratios) if preprocess.resize == "shortest" else max(ratios)
        resized = round(height / ratio), round(width / ratio)
    # An image one pixel wide, enlarged to cover a square, would exceed any memory.
    if not 0 < resized[0] * resized[1] <= MAX_PIXELS:
        raise ImageError("aspect_ratio", f"{width} x {height}")
    return resized


def _resize(
    source: Image.Image | np.ndarray, size_px: tuple[int, int], interpolation: Interpolation
) -> np.ndarray:
    """Return pixels (H, W, C): a Pillow image resized by Pillow, an array by PyTorch."""
    height, width = size_px
    if isinstance(source, Image.Image):
        return np.array(source.resize((width, height), Image.Resampling[interpolation.upper()]))
    source_height, source_width = source.shape[:2]
    # PyTorch resizes the width first; where Pillow would begin with the height, so does this.
    height_less, width_less = source_height - height, source_width - width
    if _HEIGHT_MAY_BE_FIRST and height_less > 0 and height_less > 2 * width_less:
        source = _interpolate(source, (height, source_width), interpolation)
    return _interpolate(source, size_px, interpolation)


def _interpolate(
    source_HWC: np.ndarray, size_px: tuple[int, int], interpolation: Interpolation
) -> np.ndarray:
    if source_HWC.shape[:2] == size_px:
        return source_HWC
    # With strides of "channels last" PyTorch neither reorders the pixels nor computes in float32.
    pixels_CHW = torch.from_numpy(source_HWC).permute(2, 0, 1)
    return resize(pixels_CHW, size_px, interpolation).permute(1, 2, 0).numpy()


def resize(pixels_CHW: Tensor, size_px: tuple[int, int], interpolation: Interpolation = "bicubic") -> Tensor:
    """Return uint8 pixels resized with antialiasing by PyTorch, the width first; the aspect is not kept."""
    return interpolate(pixels_CHW[None], size_px, mode=interpolation, antialias=True, align_corners=False)[0]


def _cut_or_pad(pixels_HWC: np.ndarray, size_px: tuple[int, int], fill: int) -> np.ndarray:
    """Return the middle of the pixels, padded where they are smaller, as torchvision's ``center_crop`` does."""
    (height, width), (target_height, target_width) = pixels_HWC.shape[:2], size_px
    over, beside = max(target_height - height, 0), max(target_width - width, 0)
    if over or beside:
        padding = ((over // 2, (over + 1) // 2), (beside // 2, (beside + 1) // 2), (0, 0))
        pixels_HWC = np.pad(pixels_HWC, padding, constant_values=fill)
        height, width = pixels_HWC.shape[:2]
    top, left = round((height - target_height) / 2), round((width - target_width) / 2)
    return pixels_HWC[top : top + target_height, left : left + target_width]
