"""Train the demo's captioner or ranker on pictures of the demo world.

    python -m jobs.demo.weights_training.train_weights captioner --until-accuracy 0.88
    python -m jobs.demo.weights_training.train_weights ranker

Legend: B images, K captions of one image, T texts of a batch, L tokens,
A attributes, D embedding, V vocabulary.
"""

import argparse
import copy
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BlipForConditionalGeneration, PreTrainedTokenizerBase

from jobs.demo.weights_training.models import WEIGHTS_DIR, descend, save, untrained
from jobs.demo.world.alt_texts import alt_text, wrong_caption, wrong_scene
from jobs.demo.world.pictures import DemoImages, demo_images
from jobs.demo.world.scenes import ATTRIBUTES, WORDS_BY_SLOT, Scene, is_true, parse, write_caption

TRAIN_SEED, EVAL_SEED = 1, 2
BATCH_SIZE, PEAK_LR = 64, 1e-3
# True captions of an image at each step.
NUM_CAPTIONS = 2
MEAN_3 = torch.tensor(open_clip.OPENAI_DATASET_MEAN)
STD_3 = torch.tensor(open_clip.OPENAI_DATASET_STD)
_INDEX_BY_VALUE = {slot: {value: i for i, value in enumerate(table)} for slot, table in WORDS_BY_SLOT.items()}


def to_input(pixels_BHWC: np.ndarray) -> Tensor:
    """Normalise bytes to the pixels_BCHW that both models take."""
    unit_BHWC = torch.from_numpy(pixels_BHWC).float() / 255
    return ((unit_BHWC - MEAN_3) / STD_3).permute(0, 3, 1, 2).contiguous()


def augment(pixels_BCHW: Tensor) -> Tensor:
    """Shift each image by up to 3 pixels and mirror half of them: no caption names a position or a side."""
    padded_BCHW = F.pad(pixels_BCHW, (3, 3, 3, 3), mode="reflect")
    side = pixels_BCHW.shape[-1]
    out_BCHW = torch.empty_like(pixels_BCHW)
    for i, (dx, dy) in enumerate(torch.randint(0, 7, (len(out_BCHW), 2)).tolist()):
        crop_CHW = padded_BCHW[i, :, dy : dy + side, dx : dx + side]
        out_BCHW[i] = crop_CHW.flip(-1) if torch.rand(()) < 0.5 else crop_CHW
    return out_BCHW


def batches(pictures: DemoImages, batch_size: int) -> Iterator[tuple[list[Scene], Tensor]]:
    """Yield shuffled, augmented (scenes, pixels_BCHW) for ever."""
    while True:
        order = torch.randperm(len(pictures.scenes)).numpy()
        for rows in np.split(order[: len(order) // batch_size * batch_size], len(order) // batch_size):
            yield [pictures.scenes[i] for i in rows], augment(to_input(pictures.pixels_NHWC[rows]))


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], padding: bool | str = "max_length"
) -> Tensor:
    """Return ids_TL, by default padded to the length that open_clip's text tower demands."""
    return tokenizer(texts, padding=padding, truncation=True, return_tensors="pt").input_ids


class AttributeHeads(nn.Module):
    """Linear classifiers of the scene's attributes on one image vector; not saved.

    They teach the vision towers to see: with the language or the contrastive
    loss alone, shape was still a guess after five minutes.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, len(WORDS_BY_SLOT[slot])) for slot in ATTRIBUTES)

    def forward(self, image_BD: Tensor, scenes: list[Scene]) -> Tensor:
        values_AB = attribute_indices(scenes).T
        losses = [
            F.cross_entropy(head(image_BD).float(), values_B)
            for head, values_B in zip(self.heads, values_AB, strict=True)
        ]
        return torch.stack(losses).sum()


class CaptionerObjective(nn.Module):
    """Language modelling of K true captions an image (BLIP's L_LM), the image encoded once."""

    def __init__(self, model: BlipForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.heads = AttributeHeads(model.config.vision_config.hidden_size)

    def forward(self, scenes: list[Scene], pixels_BCHW: Tensor, rng: random.Random) -> Tensor:
        texts = [write_caption(scene, rng) for scene in scenes for _ in range(NUM_CAPTIONS)]
        ids_TL = tokenize(self.tokenizer, texts, padding=True)
        # [DEC] begins a caption in BLIP, where BERT has [CLS].
        ids_TL[:, 0] = self.tokenizer.convert_tokens_to_ids("[DEC]")
        pad_id = self.tokenizer.pad_token_id
        image_BND = self.model.vision_model(pixels_BCHW).last_hidden_state
        language_loss = self.model.text_decoder(
            input_ids=ids_TL,
            attention_mask=(ids_TL != pad_id).long(),
            encoder_hidden_states=image_BND.repeat_interleave(NUM_CAPTIONS, 0),
            labels=ids_TL.masked_fill(ids_TL == pad_id, -100),
            reduction="mean",
        ).loss
        return language_loss + self.heads(image_BND[:, 0], scenes)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, pictures: DemoImages) -> float:
        """Return the share of a model's nucleus-sampled captions (BLIP's settings) that are entirely true."""
        ids_TL = model.generate(
            pixel_values=to_input(pictures.pixels_NHWC),
            do_sample=True, top_p=0.9, top_k=50, repetition_penalty=1.1, max_new_tokens=20,
        )  # fmt: skip
        texts = self.tokenizer.batch_decode(ids_TL, skip_special_tokens=True)
        return float(np.mean(list(map(is_true, texts, pictures.scenes))))


def _garbled(scene: Scene, rng: random.Random) -> str:
    """Break the grammar of a true caption, as a sampler sometimes does."""
    words = write_caption(scene, rng, "a {size} {colour} {shape} {background}").split()
    place = rng.randrange(len(words))
    match rng.randrange(3):
        case 0:
            del words[place]
        case 1:
            words.insert(place, rng.choice(words))
        case _:
            words = words[: max(1, place)]
    return " ".join(words)


def ranker_texts(scene: Scene, rng: random.Random) -> list[str]:
    """Write one true text of a scene and three to rank below it."""
    true = alt_text(scene, "true", rng)
    full = "a {size} {colour} {shape} {background}"
    # One attribute wrong and all else equal: what a CLIP trained on random
    # pairs alone does not learn to see.
    near = [write_caption(wrong_scene(scene, rng, (slot,)), rng, full) for slot in rng.sample(ATTRIBUTES, 2)]
    match rng.randrange(4):
        case 0:
            far = wrong_caption(scene, rng)
        case 1:
            far = _garbled(scene, rng)
        case 2:
            far = alt_text(scene, "vague", rng)
        case _:
            far = alt_text(scene, "spam", rng)
    return [true, *near, far]


def attribute_indices(scenes: list[Scene]) -> Tensor:
    """Return values_BA, each attribute's value as its place in the world's tables."""
    return torch.tensor([[_INDEX_BY_VALUE[a][getattr(s, a)] for a in ATTRIBUTES] for s in scenes])


def truth_matrix(scenes: list[Scene], texts: list[str]) -> Tensor:
    """Return truth_BT: which text is entirely true of which scene (`is_true`, vectorised)."""
    claims = [parse(text) for text in texts]
    claims_TA = torch.tensor(
        [[_INDEX_BY_VALUE[a][c[a]] if c and a in c else -1 for a in ATTRIBUTES] for c in claims]
    )
    parsed_T = torch.tensor([c is not None for c in claims])
    holds_BTA = (claims_TA[None] == attribute_indices(scenes)[:, None]) | (claims_TA[None] == -1)
    return holds_BTA.all(-1) & parsed_T


def _rank_loss(logits_RC: Tensor, truth_RC: Tensor) -> Tensor:
    """Softmax of every true column against all the false ones of its row, averaged by row."""
    false_R1 = logits_RC.masked_fill(truth_RC, -torch.inf).logsumexp(1, keepdim=True)
    loss_RC = F.softplus(false_R1 - logits_RC) * truth_RC
    count_R = truth_RC.sum(1)
    return (loss_RC.sum(1) / count_R.clamp(min=1)).sum() / (count_R > 0).sum().clamp(min=1)


class RankerObjective(nn.Module):
    """Contrast each image with all texts of the batch and each true text with all images.

    CLIP's loss, but the scenes decide which captions are true: a caption that also
    describes another image of the batch is not a negative of that image.
    """

    def __init__(self, model: open_clip.CLIP, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.heads = AttributeHeads(model.visual.output_dim)

    def forward(self, scenes: list[Scene], pixels_BCHW: Tensor, rng: random.Random) -> Tensor:
        texts = [text for scene in scenes for text in ranker_texts(scene, rng)]
        truth_BT = truth_matrix(scenes, texts)
        raw_image_BD = self.model.encode_image(pixels_BCHW)
        image_BD = F.normalize(raw_image_BD, dim=-1)
        text_TD = F.normalize(self.model.encode_text(tokenize(self.tokenizer, texts)), dim=-1)
        scale = self.model.logit_scale.exp().clamp(max=100)
        logits_BT = scale * image_BD.float() @ text_TD.float().T
        contrast_loss = _rank_loss(logits_BT, truth_BT) + 0.5 * _rank_loss(logits_BT.T, truth_BT.T)
        return contrast_loss + self.heads(raw_image_BD, scenes)

    @torch.no_grad()
    def accuracy(self, model: open_clip.CLIP, pictures: DemoImages) -> float:
        """Return the share of images where a model ranks a true caption above three that are not."""
        rng = random.Random(EVAL_SEED)
        image_BD = F.normalize(model.encode_image(to_input(pictures.pixels_NHWC)), dim=-1)
        right = 0
        for scene, image_D in zip(pictures.scenes, image_BD, strict=True):
            texts = ranker_texts(scene, rng)
            scores_T = F.normalize(model.encode_text(tokenize(self.tokenizer, texts)), dim=-1) @ image_D
            right += int(truth_matrix([scene], [texts[int(scores_T.argmax())]])[0, 0])
        return right / len(pictures.scenes)


_OBJECTIVES: dict[str, type[CaptionerObjective | RankerObjective]] = {
    "captioner": CaptionerObjective,
    "ranker": RankerObjective,
}


def train(
    objective: CaptionerObjective | RankerObjective,
    pictures: DemoImages,
    folder: Path,
    out: Path,
    minutes: float,
    until_accuracy: float,
) -> None:
    """Train for `minutes`, or until a three-minute check finds the held-out accuracy; save at each check.

    What is judged and saved is the running average of the weights.
    """
    held_out = demo_images(256, EVAL_SEED)
    average = copy.deepcopy(objective.model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=PEAK_LR, weight_decay=0.02, betas=(0.9, 0.98))
    rng = random.Random(0)
    started = reported = time.monotonic()
    for step, (scenes, pixels_BCHW) in enumerate(batches(pictures, BATCH_SIZE), 1):
        share = (time.monotonic() - started) / (60 * minutes)
        if share >= 1:
            break
        # The fused attention's backward pass in bfloat16 is slower on a CPU than
        # plain matrix products (0.55 s of a 1.0 s step, against 0.1 s).
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = objective(scenes, pixels_BCHW, rng)
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2
        descend(optimizer, loss, lr=PEAK_LR * min(1, step / 200) * cosine)
        fast_weights = objective.model.state_dict()
        for name, slow in average.state_dict().items():
            if slow.is_floating_point():
                slow.lerp_(fast_weights[name], max(0.002, 1 / step))
        if step % 50 == 0:
            print(f"{step} steps, {time.monotonic() - started:.0f} s, loss {loss.item():.3f}", flush=True)
        if time.monotonic() - reported > 180:
            accuracy = objective.accuracy(average, held_out)
            print(f"{step} held-out accuracy {accuracy:.3f}", flush=True)
            save(average, folder, out)
            reported = time.monotonic()
            if accuracy >= until_accuracy:
                return
    print(f"{step} steps, held-out accuracy {objective.accuracy(average, held_out):.3f}")
    save(average, folder, out)


def main() -> None:
    """Parse the command line and train one of the two models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=tuple(_OBJECTIVES))
    parser.add_argument("--minutes", type=float, default=38)
    # A captioner without faults would leave the ranker nothing to do.
    parser.add_argument("--until-accuracy", type=float, default=1.01, help="stop early at this accuracy")
    parser.add_argument("--num-images", type=int, default=36_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pictures = demo_images(args.num_images, TRAIN_SEED, workers=2)
    folder = WEIGHTS_DIR / args.model
    objective = _OBJECTIVES[args.model](*untrained(folder))
    train(objective, pictures, folder, args.out or folder, args.minutes, args.until_accuracy)


if __name__ == "__main__":
    main()
