"""Zero-shot image-text retrieval: all pairs by ITC, the first of each list again by ITM (BLIP-2, section 4.4).

The final score of a pair is its logit of "they belong together" plus its cosine similarity, not divided by the
temperature; pairs outside the first ``rerank`` come behind all others (LAVIS, ``compute_sim_matrix``). Both
directions need many of the same pairs: each is computed once, image by image, so that an image's keys and values are
projected once for all of its texts.

Nothing of the size images x texts or images x image tokens is ever held: similarities are reduced to the best of each
list block by block, and images are encoded again for the second pass (4% more work at the size of COCO).

The legend of the names: N images, M texts, P pairs, R candidates in a list, B images at once, Q queries, C channels
of an embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from training.evaluate.matching import ReadTexts, Stage1Matcher

# Similarities held at once: 2 ** 26 float32 are 256 MB.
_BLOCK_ELEMENTS = 2**26
_RECALL_AT = (1, 5, 10)

ImageBatches = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """The best candidates of each query, best first: similarities and positions, (queries, R)."""

    similarities: Tensor
    positions: Tensor


def retrieve(
    model: Stage1Matcher,
    images: ImageBatches,
    texts: Sequence[str],
    image_of_text: Sequence[int],
    rerank: int = 128,
) -> dict[str, float]:
    """Return recall at 1, 5 and 10 in per cent, of texts by image (``text_r1``) and of images by text (``image_r1``).

    Where ITM reranks, what the lists were before it is there too: ``itc_text_r1`` and so on.

    Args:
        model: what scores.
        images: begins a pass over the images, in batches.
        texts: the captions.
        image_of_text: position of the image that a text belongs to.
        rerank: candidates of each list that ITM sees; 0: none, the lists stay as ITC gave them.
    """
    owner_M = torch.tensor(image_of_text)
    num_images = int(owner_M.max()) + 1
    candidates = max(rerank, max(_RECALL_AT))
    read = model.read(texts)
    to_texts, to_images = contrastive_lists(model, images, read, candidates)

    def recalls(to_texts: Lists, to_images: Lists) -> dict[str, float]:
        text_hits = owner_M[to_texts.positions] == torch.arange(num_images)[:, None]
        image_hits = to_images.positions == owner_M[:, None]
        return _recalls(text_hits, "text") | _recalls(image_hits, "image")

    by_itc = recalls(to_texts, to_images)
    if not rerank:
        return by_itc
    reranked = _rerank(model, images, read, _first(to_texts, rerank), _first(to_images, rerank))
    return recalls(*reranked) | {f"itc_{name}": value for name, value in by_itc.items()}


def contrastive_lists(
    model: Stage1Matcher, images: ImageBatches, texts: ReadTexts, candidates: int
) -> tuple[Lists, Lists]:
    """Return the best texts of each image and the best images of each text, by ITC."""
    texts_MC = model.embed_texts(texts)
    num_texts, device = len(texts_MC), texts_MC.device
    of_images: list[tuple[Tensor, Tensor]] = []
    # The best images of each text so far.
    similarity_MR = texts_MC.new_empty(num_texts, 0)
    image_MR = torch.empty(num_texts, 0, dtype=torch.long, device=device)
    start = 0
    for pixels_BCHW in images():
        embeddings_BQC = model.embed_images(pixels_BCHW)
        images_at_once = max(1, _BLOCK_ELEMENTS // (num_texts * embeddings_BQC.shape[1]))
        for block_BQC in embeddings_BQC.split(images_at_once):
            similarity_BM = torch.einsum("bqc,mc->bqm", block_BQC, texts_MC).amax(dim=1)
            of_images.append(tuple(part.cpu() for part in _best(similarity_BM, candidates)))
            image_B = torch.arange(start, start + len(block_BQC), device=device)
            image_MR = torch.cat([image_MR, image_B.expand(num_texts, -1)], dim=1)
            similarity_MR, places = _best(torch.cat([similarity_MR, similarity_BM.T], dim=1), candidates)
            image_MR = image_MR.gather(1, places)
            start += len(block_BQC)
    similarities, positions = (torch.cat(parts) for parts in zip(*of_images, strict=True))
    return (
        Lists(similarities=similarities, positions=positions),
        Lists(similarities=similarity_MR.cpu(), positions=image_MR.cpu()),
    )


def _best(similarity: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Return the best of each row, best first, the earlier one of equals."""
    values, columns = similarity.sort(dim=1, descending=True, stable=True)
    return values[:, :candidates], columns[:, :candidates]


def _first(lists: Lists, candidates: int) -> Lists:
    return Lists(similarities=lists.similarities[:, :candidates], positions=lists.positions[:, :candidates])


def _rerank(
    model: Stage1Matcher, images: ImageBatches, texts: ReadTexts, to_texts: Lists, to_images: Lists
) -> tuple[Lists, Lists]:
    """Sort both directions' candidates by matching logit plus similarity."""
    num_texts = len(texts.lengths_M)
    rows_N = torch.arange(len(to_texts.positions))[:, None]
    rows_M = torch.arange(num_texts)[:, None]
    # A pair's number: image by image, and within an image text by text.
    pair_NR = rows_N * num_texts + to_texts.positions
    pair_MR = to_images.positions * num_texts + rows_M
    pair_P = torch.cat([pair_NR.flatten(), pair_MR.flatten()]).unique()
    logit_P = _match_pairs(model, images, texts, pair_P)

    def sort(lists: Lists, pair: Tensor) -> Lists:
        score = logit_P[torch.searchsorted(pair_P, pair)] + lists.similarities
        order = score.sort(dim=1, descending=True, stable=True).indices
        return Lists(
            similarities=lists.similarities.gather(1, order), positions=lists.positions.gather(1, order)
        )

    return sort(to_texts, pair_NR), sort(to_images, pair_MR)


def _match_pairs(model: Stage1Matcher, images: ImageBatches, texts: ReadTexts, pair_P: Tensor) -> Tensor:
    """Return the matching logit of each pair; ``pair_P`` is sorted."""
    num_texts = len(texts.lengths_M)
    logits: list[Tensor] = []
    start = 0
    for pixels_BCHW in images():
        numbers = torch.arange(start, start + len(pixels_BCHW) + 1) * num_texts
        bounds = torch.searchsorted(pair_P, numbers).tolist()
        rows = [pair_P[first:last] % num_texts for first, last in pairwise(bounds)]
        logits += [one[:, 1].float().cpu() for one in model.match(pixels_BCHW, texts, rows)]
        start += len(pixels_BCHW)
    return torch.cat(logits)


def _recalls(hits: Tensor, of: str) -> dict[str, float]:
    return {f"{of}_r{at}": 100 * hits[:, :at].any(dim=1).double().mean().item() for at in _RECALL_AT}
