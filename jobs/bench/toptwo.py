"""From JPEG bytes to each image's best two captions: as this project does it, and as the libraries' own calls do."""

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice, starmap
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize as unit
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

from jobs.bench.fixtures.compute import in_turn, median_ratio, seconds
from jobs.bench.fixtures.pictures import jpeg
from jobs.bench.generate import generate
from pipeline.images.preprocess import decode_pixels, stack_pinned
from pipeline.models.blip.captioner import Captioner, ImageBatch, TokenBatch
from pipeline.models.clip.ranker import Ranker, Score
from pipeline.models.device import compute_dtype, worker_device
from pipeline.models.weights import captioner_weights, ranker_weights
from pipeline.prefetch import decode_threads, prefetch_map
from schemas.config import CaptionConfig

T = TypeVar("T")

_PICTURE_PX = (512, 512)


def measure_top_two(
    folder: Path, images: int, batch_size: int, their_batch_sizes: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Time both ways in turn over the same files, the libraries' own at the fastest of their batch sizes.

    Args:
        folder: with the models, as ``captioner`` and ``ranker``.
    """
    device = worker_device()
    files = _repeated([jpeg(seed, _PICTURE_PX) for seed in range(min(images, 16))], images)
    ours = partial(_ours(folder, min(batch_size, images)), files)
    ours()  # compiles and captures
    found = {"peak_bytes": _reserved(ours)} if device.type == "cuda" else {}
    best = _best_batch(folder, their_batch_sizes, files)
    theirs = partial(_theirs(folder, best), files)
    theirs()
    timed = in_turn({"ours": ours, "theirs": theirs}, rounds, device)
    return found | {
        "end_to_end_ratio": median_ratio(timed),
        "images_per_s": round(len(files) / median(timed["ours"]), 3),
        "transformers_images_per_s": round(len(files) / median(timed["theirs"]), 3),
        "transformers_batch_size": best,
    }


def _reserved(run: Callable[[], Any]) -> int:
    """Return the most GPU memory taken in a run, CUDA graphs included, without what earlier work left behind."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_reserved()


def _best_batch(folder: Path, batch_sizes: Sequence[int], files: list[bytes]) -> int:
    """Return the batch size at which the libraries' own way is fastest."""
    if len(batch_sizes) == 1:
        return batch_sizes[0]
    few = files[: 2 * max(batch_sizes)]
    took_s = {}
    for batch_size in batch_sizes:
        run = partial(_theirs(folder, batch_size), few)
        run()
        took_s[batch_size] = seconds(run, worker_device())
    return min(took_s, key=lambda batch_size: took_s[batch_size])


def _batches(prepare: Callable[[bytes], T], files: list[bytes], size: int) -> Iterator[list[T]]:
    """Decode ahead of the device as the workers do, on a GPU on all cores, and yield batches."""
    threads = decode_threads(1, feeds_gpu=worker_device().type == "cuda")
    prepared = prefetch_map(prepare, files, ahead=2 * size, threads=threads)
    while batch := list(islice(prepared, size)):
        yield batch


def _ours(folder: Path, batch_size: int) -> Callable[[list[bytes]], list[list[str]]]:
    config = CaptionConfig(model=str(folder / "captioner"), batch_size=batch_size)
    captioner = Captioner(config, captioner_weights(config), 0)
    ranker = Ranker(ranker_weights(f"local-dir:{folder / 'ranker'}", ""), "auto", batch_size)
    recipes = [captioner.preprocess, ranker.preprocess]

    def prepare(data: bytes) -> tuple[Tensor, ...]:
        pixels = decode_pixels(data, recipes, "exact")
        assert pixels is not None
        return pixels

    def gather(batch: list[tuple[Tensor, ...]], first: int) -> tuple[list[Tensor], ImageBatch]:
        blip, clip = zip(*batch, strict=True)
        return clip, captioner.load(blip, [str(first + index) for index in range(len(batch))])

    def caption(batch: tuple[list[Tensor], ImageBatch]) -> tuple[list[Tensor], TokenBatch]:
        return batch[0], captioner.generate(batch[1])

    def rank(batch: tuple[list[Tensor], list[list[str]]]) -> list[tuple[list[str], list[Score]]]:
        clip, texts = batch
        return list(zip(texts, ranker.score_pixels(stack_pinned(clip), texts), strict=True))

    def top_two(files: list[bytes]) -> list[list[str]]:
        # One model after the other, as the stages of a run do; what the device does not do is done meanwhile.
        batches = zip(_batches(prepare, files, batch_size), count(step=batch_size), strict=False)
        captioned = [
            (clip, [[each.text for each in row] for row in captioner.decode_text(sampled)])
            for clip, sampled in prefetch_map(caption, starmap(gather, batches), ahead=2, threads=1)
        ]
        return [
            [text for _, text in sorted(zip((one.similarity for one in scores), texts, strict=True))[-2:]]
            for batch in prefetch_map(rank, captioned, ahead=1, threads=1)
            for texts, scores in batch
        ]

    return top_two


def _theirs(folder: Path, batch_size: int) -> Callable[[list[bytes]], Tensor]:
    device = worker_device()
    dtype = compute_dtype("auto", device)
    model = BlipForConditionalGeneration.from_pretrained(folder / "captioner", dtype=dtype).to(device).eval()
    processor = BlipImageProcessorPil.from_pretrained(folder / "captioner")
    words = AutoTokenizer.from_pretrained(folder / "captioner")
    clip, _, transform = open_clip.create_model_and_transforms(
        f"local-dir:{folder / 'ranker'}", precision="bf16" if dtype == torch.bfloat16 else "fp32"
    )
    clip, tokenizer, config = clip.to(device).eval(), open_clip.get_tokenizer("ViT-L-14"), CaptionConfig()

    def prepare(data: bytes) -> tuple[Tensor, Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return processor(image, return_tensors="pt").pixel_values[0], transform(image)

    def collate(batch: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [torch.stack(part) for part in zip(*batch, strict=True)]

    @torch.inference_mode()
    def top_two(files: list[bytes]) -> Tensor:
        best = []
        # Collated ahead, as the workers of a data loader do.
        for pixels in prefetch_map(collate, _batches(prepare, files, batch_size), ahead=2, threads=1):
            blip_BCHW, clip_BCHW = (part.to(device, dtype) for part in pixels)
            features_BPE = model.vision_model(blip_BCHW).last_hidden_state
            captions = words.batch_decode(generate(model, features_BPE, config), skip_special_tokens=True)
            image_BE = unit(clip.encode_image(clip_BCHW).float(), dim=-1)
            text_BNE = unit(clip.encode_text(tokenizer(captions).to(device)).float(), dim=-1).unflatten(
                0, (len(clip_BCHW), -1)
            )
            best.append((image_BE[:, None] * text_BNE).sum(-1).topk(2).indices.cpu())
        return torch.cat(best)

    return top_two


def _repeated(files: list[bytes], count: int) -> list[bytes]:
    return [files[index % len(files)] for index in range(count)]
