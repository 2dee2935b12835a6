"""Pixels as the libraries' own preprocessing gives them, on the exact path; within two levels of it on the fast one."""

import io
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from transformers import BlipImageProcessorPil

from jobs.bench.fixtures.pictures import jpeg
from pipeline.images import preprocess
from pipeline.images.decode import ImageError, decode_rgb
from pipeline.images.preprocess import Preprocess, decode_pixels, normalise, stack_pinned
from pipeline.prefetch import decode_threads, prefetch_map
from schemas.config import PixelPath
from schemas.errors import CapfiltError
from tests import hostile
from tests.hostile import BAD_IMAGES, JPEG, encoded, picture

# pytest resets the filters that pipeline.images.decode sets.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
PATHS: tuple[PixelPath, ...] = ("exact", "fast")
BLIP = Preprocess.of_blip(BlipImageProcessorPil())
CLIP = Preprocess.of_open_clip(asdict(PreprocessCfg()))
# (width, height): as crawled, square, upright, as large as wanted, tiny, long, beside a multiple.
SIZES_PX = [
    (512, 384), (512, 512), (480, 640), (384, 384), (224, 224), (8, 8), (31, 17), (64, 400), (1200, 100), (385, 383)
]  # fmt: skip


def noise(seed: int, size_px: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """What resizing is worst at: every level beside every other."""
    shape = (size_px[1], size_px[0], len(mode))
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return Image.fromarray(pixels_HWC if len(mode) > 1 else pixels_HWC[:, :, 0], mode)


def photograph(size_px: tuple[int, int]) -> Image.Image:
    return Image.open(io.BytesIO(jpeg(1, size_px)))


def files() -> Iterator[tuple[str, bytes]]:
    for size_px in SIZES_PX:
        yield "x".join(map(str, size_px)), encoded(noise(sum(size_px), size_px), "PNG")
    yield "jpeg 4:2:0", jpeg(0, (640, 480))
    yield "jpeg 4:4:4", encoded(photograph((300, 200)), "JPEG", subsampling=0)
    yield "jpeg progressive", encoded(photograph((300, 400)), "JPEG", progressive=True)
    yield "jpeg grey", encoded(photograph((300, 200)).convert("L"), "JPEG")
    yield "jpeg cmyk", encoded(noise(5, (200, 300), "CMYK"), "JPEG")
    yield "jpeg turned", hostile.rotated_jpeg(6)
    yield "png grey", encoded(noise(6, (90, 70), "L"), "PNG")
    yield "png transparent", hostile.rgba_png()
    yield "png palette", hostile.palette_png()
    yield "webp", encoded(photograph((400, 300)), "WEBP", quality=80)


FILES = dict(files())


def decoded(data: bytes, recipe: Preprocess, path: PixelPath = "exact") -> Tensor:
    pixels_read = decode_pixels(data, [recipe], path)
    assert pixels_read is not None and pixels_read[0].dtype == torch.uint8
    assert pixels_read[0].shape == (3, *recipe.size_px)
    return pixels_read[0]


def normalised(data: bytes, recipe: Preprocess) -> Tensor:
    return normalise(decoded(data, recipe)[None], recipe, torch.float32)[0]


@pytest.mark.parametrize("data", FILES.values(), ids=FILES.keys())
def test_exact_is_what_blip_and_open_clip_do_bit_for_bit(data: bytes) -> None:
    image = decode_rgb(data)
    processor = BlipImageProcessorPil()
    assert torch.equal(normalised(data, BLIP), processor(image, return_tensors="pt").pixel_values[0])
    transform = image_transform_v2(PreprocessCfg(), is_train=False)
    assert torch.equal(normalised(data, CLIP), transform(image))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("resize", ["squash", "shortest", "longest"])
@pytest.mark.parametrize("size", [64, (64, 64), (96, 40), (40, 96)], ids=str)
def test_every_setting_of_open_clip(size: int | tuple[int, int], resize: str, interpolation: str) -> None:
    cfg = PreprocessCfg(
        size=size,
        resize_mode=resize,
        interpolation=interpolation,
        fill_color=7,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    transform = image_transform_v2(cfg, is_train=False)
    recipe = Preprocess.of_open_clip(asdict(cfg))
    for size_px in ((90, 70), (70, 90), (64, 64), (41, 97), (33, 8), (500, 40)):
        data = encoded(noise(0, size_px), "PNG")
        assert torch.equal(normalised(data, recipe), transform(decode_rgb(data))), size_px


def test_settings_of_blip() -> None:
    data = FILES["jpeg 4:2:0"]
    processor = BlipImageProcessorPil(
        size={"height": 48, "width": 80}, resample=2, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    )
    expected = processor(decode_rgb(data), return_tensors="pt").pixel_values[0]
    assert torch.equal(normalised(data, Preprocess.of_blip(processor)), expected)


def test_the_published_captioners_settings(tmp_path: Path) -> None:
    """As blip-image-captioning's preprocessor_config.json: with a padding that pads nothing."""
    settings = BlipImageProcessorPil().to_dict() | {"do_pad": True, "size_divisor": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = BlipImageProcessorPil.from_pretrained(tmp_path)
    assert processor.do_pad
    recipe = Preprocess.of_blip(processor)
    assert recipe == BLIP
    expected = processor(decode_rgb(JPEG), return_tensors="pt").pixel_values[0]
    assert torch.equal(normalised(JPEG, recipe), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_resize": False},
        {"do_pad": True, "pad_size": {"height": 400, "width": 400}},
        {"do_normalize": False},
        {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
        {"size": {"shortest_edge": 32}},
        {"resample": 1},
        {"rescale_factor": 1 / 127.5},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_processor_that_does_more_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(CapfiltError, match="preprocessor_config.json"):
        Preprocess.of_blip(BlipImageProcessorPil(**settings))


def test_fast_is_within_two_levels_and_nearly_everywhere_within_one() -> None:
    """On noise, where it is worst; the sizes make Pillow begin with either side."""
    rng = np.random.default_rng(0)
    shapes = [tuple(int(side) for side in rng.integers(8, 800, 2)) for _ in range(25)]
    levels = []
    for number, size_px in enumerate([*SIZES_PX, *shapes]):
        data = encoded(noise(number, size_px), "BMP")
        image = decode_rgb(data, formats=("BMP",))
        for recipe in (BLIP, CLIP):
            exact, fast = (_resized(image, recipe, path) for path in PATHS)
            levels.append(np.abs(exact.astype(int) - fast).ravel())
    levels = np.concatenate(levels)
    assert levels.max() <= 2
    assert (levels > 0).mean() < 0.01 and (levels > 1).mean() < 2e-5


def _resized(image: Image.Image, recipe: Preprocess, path: PixelPath) -> np.ndarray:
    size_px = preprocess._resized_px(recipe, image.height, image.width)
    return preprocess._resize(np.array(image) if path == "fast" else image, size_px, recipe.interpolation)


@pytest.mark.parametrize("data", FILES.values(), ids=FILES.keys())
def test_fast_decodes_every_format(data: bytes) -> None:
    for recipe in (BLIP, CLIP):
        difference = decoded(data, recipe, "fast").int() - decoded(data, recipe).int()
        assert difference.abs().max() <= 2
        assert (difference != 0).float().mean() < 0.02


@pytest.mark.parametrize("path", PATHS)
def test_several_recipes_of_one_decoding_are_those_of_each(
    path: PixelPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(preprocess, "decode_rgb", lambda data: calls.append(data) or decode_rgb(data))
    together = decode_pixels(JPEG, [BLIP, CLIP, BLIP], path)
    assert together is not None and len(calls) == 1
    for pixels_read, recipe in zip(together, (BLIP, CLIP, BLIP), strict=True):
        assert torch.equal(pixels_read, decoded(JPEG, recipe, path))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", [case for case, (_, data) in BAD_IMAGES.items() if data])
def test_what_decode_rgb_refuses_is_none_on_both_paths(case: str, path: PixelPath) -> None:
    data = BAD_IMAGES[case][1]
    try:
        decode_rgb(data)
    except ImageError:
        assert decode_pixels(data, [BLIP], path) is None
    else:
        assert decode_pixels(data, [BLIP], path) is not None


@pytest.mark.parametrize("path", PATHS)
def test_damage_never_raises_and_decodes_on_both_paths_or_none(path: PixelPath) -> None:
    rng = np.random.default_rng(0)
    recipe = Preprocess.of_blip(BlipImageProcessorPil(size={"height": 16, "width": 16}))
    outcomes = []
    for _ in range(150):
        damaged = bytearray(JPEG)
        for position in rng.integers(2, len(JPEG) - 2, 4):
            damaged[position] = rng.integers(256)
        try:
            decodes = decode_rgb(bytes(damaged)) is not None
        except ImageError:
            decodes = False
        outcomes.append(decodes)
        assert (decode_pixels(bytes(damaged), [recipe], path) is not None) is decodes
    assert 10 < sum(outcomes) < 140


@pytest.mark.parametrize("path", PATHS)
def test_an_image_too_narrow_for_a_recipe_is_none(path: PixelPath) -> None:
    """Of 1 x 20,000 pixels, ``shortest`` would make a billion, and ``longest`` none."""
    thread = encoded(Image.new("RGB", (1, 20_000)), "PNG")
    longest = Preprocess.of_open_clip(asdict(PreprocessCfg(resize_mode="longest")))
    assert decode_pixels(thread, [BLIP], path) is not None
    assert decode_pixels(thread, [BLIP, CLIP], path) is None
    assert decode_pixels(thread, [longest], path) is None


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen at once would hold sixteen times what the largest takes; small ones do not wait for them."""
    # Large is over four million pixels.
    large, small = encoded(Image.new("RGB", (2050, 2000)), "PNG"), encoded(picture(40, 30), "PNG")
    under_way = {large: 0, small: 0}
    peak = dict(under_way)
    lock, both_small = threading.Lock(), threading.Barrier(2, timeout=30)

    def watched(data: bytes) -> Image.Image:
        with lock:
            under_way[data] += 1
            peak[data] = max(peak[data], under_way[data])
        if data == small:
            both_small.wait()
        else:
            time.sleep(0.005)
        image = decode_rgb(data)
        with lock:
            under_way[data] -= 1
        return image

    monkeypatch.setattr(preprocess, "decode_rgb", watched)
    results = list(prefetch_map(lambda data: decode_pixels(data, [BLIP], "exact"), [large, large, large, small, small],
                            ahead=5, threads=5))  # fmt: skip
    assert None not in results
    assert peak == {large: 1, small: 2}


def test_pixels_are_normalised_in_float32_and_rounded_once() -> None:
    stack = torch.stack([decoded(data, CLIP) for data in (JPEG, FILES["jpeg 4:2:0"])])
    before = stack.clone()
    full = normalise(stack, CLIP, torch.float32)
    assert full.dtype == torch.float32 and full.is_contiguous()
    assert torch.equal(normalise(stack, CLIP, torch.bfloat16), full.to(torch.bfloat16))
    assert torch.equal(stack, before)
    with pytest.raises(AssertionError):
        normalise(full, CLIP, torch.float32)


def test_stack_is_that_of_torch_and_pinned_where_there_is_a_gpu() -> None:
    apart = [decoded(data, BLIP) for data in (JPEG, FILES["512x384"], FILES["png palette"])]
    stacked = stack_pinned(apart)
    assert torch.equal(stacked, torch.stack(apart))
    assert stacked.is_pinned() is torch.cuda.is_available()


def test_a_worker_on_the_cpu_decodes_on_what_it_reserved_and_one_on_a_gpu_on_all_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert [decode_threads(cpus, feeds_gpu=False) for cpus in (0, 0.5, 1, 3)] == [1, 1, 1, 3]
    assert decode_threads(1, feeds_gpu=True) == min(cores, 16)
    assert decode_threads(64, feeds_gpu=True) == 64


def test_prefetch_map_holds_no_more_than_it_says() -> None:
    begun, taken = [], []
    for result in prefetch_map(lambda item: begun.append(item) or item, range(40), ahead=6, threads=3):
        taken.append(result)
        # Taking a result begins one more before it is handed out.
        assert len(begun) <= len(taken) + 6
    assert taken == list(range(40))
