"""Micro-batches of a step of image-text training, and the image-text pairs that each computes ITM on.

The legend of the names: N images of the step over all ranks; B of a micro-batch; R pairs; Q queries, L text tokens, T
of them with a label, P tokens of an image, E its width, C the contrastive one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pipeline.rng import seed_for
from training.distributed import World
from training.losses import target_positions
from training.models.tokenizer import Texts

# Where an image has fewer captions than another.
_NO_HASH = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The images and texts of one backward pass, on the device.

    ``images`` are features (B, P, E) of a frozen encoder, or pixels (B, C, H, W). ``labels_T`` are the next tokens of
    the tokens at ``target_positions_T``, which index (B, L) flattened; ``first`` is the first image's index in N;
    ``seed`` sets dropout.
    """

    images: Tensor
    texts: Texts
    target_positions_T: Tensor
    labels_T: Tensor
    first: int
    seed: int

    @property
    def size(self) -> int:
        """Return B."""
        return len(self.images)


def micro_batches(
    images: Callable[[slice], Tensor],
    texts: Texts,
    labels_BL: Tensor,
    *,
    size: int,
    first: int,
    world: World,
    seed: int,
    position: int,
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of this rank.

    Args:
        images: returns those of some rows of the rank's batch, on the device.
        texts, labels_BL: of the whole batch, on the CPU.
        size: images of a micro-batch; the last one may be smaller.
        first: index in N of the rank's first image.
        world: the ranks.
        seed: of the run.
        position: a number that no other step of the run has.
    """
    local, device = len(texts.ids_BL), world.device
    for index, start in enumerate(range(0, local, size)):
        rows = slice(start, min(start + size, local))
        positions_T, labels_T = target_positions(labels_BL[rows], device)
        yield MicroBatch(
            images=images(rows),
            texts=texts[rows].to(device),
            target_positions_T=positions_T,
            labels_T=labels_T,
            first=first + start,
            seed=seed_for("dropout", seed, position, world.rank, index),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Negatives:
    """The texts of the whole step, and the negative drawn for each of its images and texts, as indices of N.

    ``image_of_text_N`` is on the CPU, where the pairs are formed. ``false_share`` is that of the negatives that would
    belong together, if such pairs could be drawn.
    """

    texts: Texts
    text_of_image_N: Tensor
    image_of_text_N: np.ndarray
    false_share: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ItmPairs:
    """Pairs for ITM. Without ``rows_R``: all images of the micro-batch with two texts each; else one text each."""

    rows_R: Tensor | None
    texts: Texts
    labels_R: Tensor
    weights_R: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleKeys:
    """What tells which texts belong to which images: for each sample of a rank, hashes that equal ones share.

    ``sample_B4``: of its uid, its image's bytes, its text's tokens and its text. ``kept_BK``: of all captions of the
    image, of which the text is one; -1 where an image has fewer than K. Hashes are not negative.
    """

    sample_B4: Tensor
    kept_BK: Tensor

    @classmethod
    def of(
        cls,
        uids: Sequence[str],
        image_hashes: Sequence[int],
        captions: Sequence[str],
        kept_captions: Sequence[Sequence[str]],
        ids_BL: Tensor,
    ) -> Self:
        """Return the keys of a rank's samples.

        Args:
            image_hashes: of the stored bytes of each image.
            captions: the text of each sample.
            kept_captions: all captions of each sample.
            ids_BL: the tokens of ``captions``.
        """
        rows = zip(uids, image_hashes, captions, ids_BL.tolist(), strict=True)
        sample = [(seed_for(uid), image, seed_for(*ids), seed_for(text)) for uid, image, text, ids in rows]
        most = max(map(len, kept_captions))
        kept = [[*map(seed_for, texts), *[_NO_HASH] * (most - len(texts))] for texts in kept_captions]
        return cls(sample_B4=torch.tensor(sample), kept_BK=torch.tensor(kept))

    @property
    def uid_B(self) -> Tensor:
        """Return the hashes of the uids."""
        return self.sample_B4[:, 0]


def belonging(keys: SampleKeys, gather: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """Return where image i of the step and text j belong together, (N, N): they are not negatives of each other.

    They do where the samples have one uid, one image or equal texts, or where the text is one of the image's captions.

    Args:
        keys: of this rank's samples.
        gather: returns the rows of all ranks.
        device: of the result.
    """
    own_B4 = keys.sample_B4.to(device)
    all_N4 = gather(own_B4)
    # In the first three hashes equality goes both ways.
    same_BN = (own_B4[:, None, :3] == all_N4[:, :3]).any(dim=2)
    # The text of sample j is among the captions of image i.
    is_kept_BN = (keys.kept_BK.to(device)[:, :, None] == all_N4[:, 3]).any(dim=1)
    return gather(same_BN | is_kept_BN)


def negative_uniforms(seed: int, position: int, size: int) -> Tensor:
    """Return the random numbers of the step's negatives, (2, N), the same on every rank."""
    generator = np.random.default_rng(seed_for("negatives", seed, position))
    return torch.from_numpy(generator.random((2, size)))


def same_on_all_ranks(texts: Texts, drawn: tuple[Tensor, Tensor, Tensor], world: World) -> Negatives:
    """Return rank 0's negatives on every rank: the last bit of a similarity may differ between devices.

    On "meta", where nothing is drawn, each text's is the image before its own.
    ``drawn``: a text for each image, an image for each text, and ``false_share``.
    """
    text_of_image_N, image_of_text_N = world.broadcast(torch.stack(drawn[:2]))
    return Negatives(
        texts=texts,
        text_of_image_N=text_of_image_N,
        image_of_text_N=np.roll(np.arange(len(image_of_text_N)), 1)
        if image_of_text_N.is_meta
        else image_of_text_N.cpu().numpy(),
        false_share=world.broadcast(drawn[2]),
    )


def itm_pairs(micro_batch: MicroBatch, negatives: Negatives) -> Iterator[ItmPairs]:
    """Yield the pairs of ITM whose image is in the micro-batch.

    First each image with its own text and with its negative text; then the images that were drawn as negatives, with
    the texts, of any rank, that they were drawn for. The number of those differs from step to step, so they come in
    parts of two sizes, the last one padded with pairs of weight 0: compiled code then meets known shapes only.
    """
    device = negatives.text_of_image_N.device
    own_B = torch.arange(micro_batch.first, micro_batch.first + micro_batch.size, device=device)
    # Rows 2 i and 2 i + 1 are image i's own text (label 1) and its negative text (label 0).
    yield ItmPairs(
        rows_R=None,
        texts=negatives.texts[torch.stack((own_B, negatives.text_of_image_N[own_B]), dim=1).flatten()],
        labels_R=torch.tensor([1, 0], device=device).repeat(micro_batch.size),
        weights_R=torch.ones(2 * micro_batch.size, device=device),
    )
    # For each text of the step: the row of its negative image in this micro-batch, outside 0 .. B - 1 if it has none.
    rows = negatives.image_of_text_N - micro_batch.first
    texts = ((rows >= 0) & (rows < micro_batch.size)).nonzero()[0]
    for part in padded_parts(len(texts), micro_batch.size):
        # np.resize repeats the part's texts up to its length.
        padded_texts = np.resize(texts[part], part.stop - part.start)
        weights = np.arange(part.start, part.stop) < len(texts)
        yield ItmPairs(
            rows_R=torch.from_numpy(rows[padded_texts]).to(device),
            texts=negatives.texts[torch.from_numpy(padded_texts).to(device)],
            labels_R=torch.zeros(len(padded_texts), device=device, dtype=torch.long),
            weights_R=torch.from_numpy(weights).float().to(device),
        )


def padded_parts(count: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size``, then of a quarter of it, that cover ``count``; the last may reach beyond."""
    start, quarter = 0, max(1, size // 4)
    while start < count:
        length = size if count - start >= size else quarter
        yield slice(start, start + length)
        start += length
