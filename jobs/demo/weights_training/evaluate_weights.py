"""Judge the demo's weights by the world's own truth, on pictures that no training saw.

    python -m jobs.demo.weights_training.evaluate_weights --num-images 500

The three steps of the pipeline in small: sample ten captions, add the alt
text, rank all of them, keep the best two distinct ones.

Legend: N images, K captions of one image, L tokens, D embedding.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, BlipForConditionalGeneration

from jobs.demo.weights_training.models import CAPTIONER_DIR, RANKER_DIR
from jobs.demo.weights_training.train_weights import to_input
from jobs.demo.world.alt_texts import AltKind, alt_text
from jobs.demo.world.pictures import picture_set
from jobs.demo.world.responses import ALT_KINDS
from jobs.demo.world.scenes import is_true, normalise

APPRAISAL_SEED = 3
NUM_CAPTIONS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Appraisal:
    """Shares of entirely true texts, and the seconds that each step took."""

    num_images: int
    web_true_share: float
    sampled_true_share: float
    top_two_true_share: float
    top_two_true_share_by_alt: dict[str, float]
    caption_s: float
    rank_s: float


@torch.no_grad()
def sample_captions(pixels_NCHW: torch.Tensor, folder: Path, batch_size: int = 32) -> list[list[str]]:
    """Sample ten captions of each image with BLIP's settings for CapFilt (nucleus, p = 0.9)."""
    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts: list[str] = []
    for pixels_BCHW in pixels_NCHW.split(batch_size):
        ids_BKL = model.generate(
            pixel_values=pixels_BCHW.repeat_interleave(NUM_CAPTIONS, 0),
            do_sample=True, top_p=0.9, top_k=50, repetition_penalty=1.1, max_new_tokens=20,
        )  # fmt: skip
        texts += tokenizer.batch_decode(ids_BKL, skip_special_tokens=True)
    return [texts[i : i + NUM_CAPTIONS] for i in range(0, len(texts), NUM_CAPTIONS)]


@torch.no_grad()
def rank_texts(pixels_NCHW: torch.Tensor, texts_by_image: list[list[str]], folder: Path) -> list[list[str]]:
    """Order each image's texts by cosine similarity, best first."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    distinct = sorted({text for texts in texts_by_image for text in texts})
    batches = (distinct[i : i + 256] for i in range(0, len(distinct), 256))
    text_TD = torch.cat([F.normalize(model.encode_text(tokenizer(batch)), dim=-1) for batch in batches])
    row_by_text = {text: row for row, text in enumerate(distinct)}
    image_ND = F.normalize(torch.cat([model.encode_image(p) for p in pixels_NCHW.split(64)]), dim=-1)
    ranked = []
    for image_D, texts in zip(image_ND, texts_by_image, strict=True):
        scores_K = text_TD[[row_by_text[text] for text in texts]] @ image_D
        ranked.append([texts[i] for i in scores_K.argsort(descending=True, stable=True)])
    return ranked


def first_distinct(texts: list[str], count: int) -> list[str]:
    """Keep the first `count` texts that differ by more than case, white space or a full stop."""
    first_by_plain: dict[str, str] = {}
    for text in texts:
        first_by_plain.setdefault(normalise(text), text)
    return list(first_by_plain.values())[:count]


def appraise(
    num_images: int = 500,
    seed: int = APPRAISAL_SEED,
    captioner_dir: Path = CAPTIONER_DIR,
    ranker_dir: Path = RANKER_DIR,
) -> Appraisal:
    """Caption, rank and select held-out pictures, and count what is true."""
    pictures = picture_set(num_images, seed)
    pixels_NCHW = to_input(pictures.pixels_NHWC)
    rng = random.Random(seed)
    kinds: list[AltKind] = rng.choices(tuple(ALT_KINDS), tuple(ALT_KINDS.values()), k=num_images)
    alts = [alt_text(scene, kind, rng) for scene, kind in zip(pictures.scenes, kinds, strict=True)]

    torch.manual_seed(seed)
    started = time.monotonic()
    sampled = sample_captions(pixels_NCHW, captioner_dir)
    captioned = time.monotonic()
    ranked = rank_texts(
        pixels_NCHW, [[*texts, alt] for texts, alt in zip(sampled, alts, strict=True)], ranker_dir
    )
    finished = time.monotonic()

    def true_share(texts_by_image: list[list[str]], rows: list[int]) -> float:
        verdicts = [is_true(text, pictures.scenes[i]) for i in rows for text in texts_by_image[i]]
        return sum(verdicts) / max(1, len(verdicts))

    everywhere = list(range(num_images))
    top_two = [first_distinct(texts, 2) for texts in ranked]
    return Appraisal(
        num_images=num_images,
        web_true_share=true_share([[alt] for alt in alts], everywhere),
        sampled_true_share=true_share(sampled, everywhere),
        top_two_true_share=true_share(top_two, everywhere),
        top_two_true_share_by_alt={
            kind: true_share(top_two, [i for i in everywhere if kinds[i] == kind]) for kind in ALT_KINDS
        },
        caption_s=captioned - started,
        rank_s=finished - captioned,
    )


def main() -> None:
    """Print the appraisal as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--captioner", type=Path, default=CAPTIONER_DIR)
    parser.add_argument("--ranker", type=Path, default=RANKER_DIR)
    args = parser.parse_args()
    appraisal = appraise(args.num_images, captioner_dir=args.captioner, ranker_dir=args.ranker)
    print(json.dumps(asdict(appraisal), indent=2))


if __name__ == "__main__":
    main()
