"""Train the demo's OPT or T5 on text alone: captions of the demo world, without a picture.

    python -m jobs.demo.weights_training.train_language opt
    python -m jobs.demo.weights_training.train_language t5

A document is a few captions of one scene, as texts on the web keep to their subject: so a model learns to take up
what came before a caption, and has a use for the soft prompt of stage 2.

Legend: B documents, L tokens.
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jobs.demo.weights_training.models import OPT_DIR, T5_DIR, descend, save, untrained
from jobs.demo.world.scenes import Scene, write_caption
from training.losses import IGNORED
from training.models.language import split_caption

PEAK_LR = 3e-3
BATCH_SIZE = 32
LossOf = Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[list[str]], random.Random], Tensor]


def documents(count: int, rng: random.Random) -> list[list[str]]:
    """Write documents of one to four captions, each about a scene of its own."""
    scenes = [Scene.random(rng) for _ in range(count)]
    return [[write_caption(scene, rng) for _ in range(rng.randint(1, 4))] for scene in scenes]


def opt_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[list[str]], rng: random.Random
) -> Tensor:
    """Return the loss of every next word; each caption stands between ``</s>`` and a line break, as in stage 2."""
    rows = [list(chain(*tokenizer([f"{text}\n" for text in document]).input_ids)) for document in texts]
    ids_BL, mask_BL = _padded(rows, tokenizer.pad_token_id)
    return model(ids_BL, labels=ids_BL.masked_fill(~mask_BL, IGNORED)).loss


def t5_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[list[str]], rng: random.Random
) -> Tensor:
    """Return the loss of the end of a document's last caption, given its beginning and the captions before it."""
    read, written = [], []
    for *before, last in texts:
        prefix, suffix = split_caption(last, str(rng.random()), 0)
        read.append(" ".join([*(f"{text}." for text in before), prefix]))
        written.append(suffix)
    ids_BL, mask_BL = _padded(tokenizer(read).input_ids, tokenizer.pad_token_id)
    labels_BL, written_BL = _padded(tokenizer(written).input_ids, tokenizer.pad_token_id)
    return model(
        ids_BL, attention_mask=mask_BL.long(), labels=labels_BL.masked_fill(~written_BL, IGNORED)
    ).loss


def _padded(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids_BL = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
    return ids_BL, torch.arange(length) < torch.tensor([[len(row)] for row in rows])


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, loss_of: LossOf, steps: int) -> None:
    """Train with AdamW on a warm-up and a cosine; print the loss now and then."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.02, betas=(0.9, 0.98))
    rng = random.Random(0)
    model.train()
    for step in range(1, steps + 1):
        loss = loss_of(model, tokenizer, documents(BATCH_SIZE, rng), rng)
        cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * (step - 1) / steps))
        descend(optimizer, loss, lr=PEAK_LR * (min(1, step / 50) * cosine))
        if step % 50 == 0:
            print(f"{step} of {steps} steps, {time.process_time():.0f} s, loss {loss.item():.3f}", flush=True)


def held_out_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, loss_of: LossOf
) -> dict[int, float]:
    """Return the loss of new documents by their number of captions: the more, the more is known of the scene."""
    model.eval()
    rng = random.Random(1)
    texts_by_captions: dict[int, list[list[str]]] = {count: [] for count in range(1, 5)}
    for document in documents(2000, rng):
        texts_by_captions[len(document)].append(document)
    with torch.no_grad():
        return {
            count: loss_of(model, tokenizer, texts, rng).item()
            for count, texts in texts_by_captions.items()
            if texts
        }


def main() -> None:
    """Parse the command line and train one of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("opt", "t5"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, loss_of = (OPT_DIR, opt_loss) if args.model == "opt" else (T5_DIR, t5_loss)
    model, tokenizer = untrained(folder)
    train(model, tokenizer, loss_of, args.steps)
    for count, loss in held_out_losses(model, tokenizer, loss_of).items():
        print(f"held-out documents of {count} captions: loss {loss:.3f}")
    save(model, folder, args.out or folder)


if __name__ == "__main__":
    main()
