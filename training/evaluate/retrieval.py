"""Zero-shot image-text retrieval: all pairs by ITC, the first of each list again by ITM (BLIP-2, section 4.4).

The final score of a pair is its logit of "they belong together" plus its cosine similarity, not divided by the
temperature; pairs outside the first ``rerank`` come behind all others (LAVIS, ``compute_sim_matrix``). Both
directions need many of the same pairs: each is computed once, image by image, so that an image's keys and values are
projected once for all of its texts.

Nothing of the size images x texts or images x image tokens is ever held: similarities are reduced to the best of each
list block by block, and images are encoded again for the second pass (4% more work at the size of COCO).

The legend of the names: N images, M texts, P pairs, R candidates in a list or texts of an image, B images at once,
Q queries, L tokens, C channels of an embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.models.checks import require_finite
from training.blip2.stage1 import Stage1
from training.data.transforms import blip_caption
from training.distributed import World
from training.losses import similarity
from training.models.layers import KeyValue, select_images
from training.models.tokenizer import Texts

# Of a caption, special tokens included: LAVIS's retrieval reads three tokens more than its training.
MAX_TEXT_TOKENS = 35
_TEXTS_AT_ONCE = 256
# Similarities held at once: 2 ** 26 float32 are 256 MB.
_BLOCK_ELEMENTS = 2**26
_RECALL_AT = (1, 5, 10)

ImageBatches = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedTexts:
    """Tokenised texts: tokens on the device, lengths on the CPU."""

    tokens: Texts
    lengths_M: Tensor
    bucket_size: int

    def length_buckets(self, rows_R: Tensor) -> Iterator[tuple[Tensor, Texts]]:
        """Yield texts in buckets of like length, padded to their longest, with their positions in ``rows_R``.

        A caption of COCO has about a third of the tokens that there is room for.
        """
        for places in self.lengths_M[rows_R].argsort(stable=True).split(self.bucket_size):
            rows = rows_R[places]
            longest = int(self.lengths_M[rows[-1]])
            rows = rows.to(self.tokens.ids_BL.device)
            yield (
                places,
                Texts(ids_BL=self.tokens.ids_BL[rows, :longest], mask_BL=self.tokens.mask_BL[rows, :longest]),
            )


class Stage1Matcher:
    """The contrastive and the matching side of a stage 1 model, in evaluation mode and without gradients.

    Its methods raise NotFiniteError where the model computes NaN or infinity.

    Args:
        stage: the model; put in evaluation mode.
        texts_at_once: computed in one pass.
    """

    def __init__(self, stage: Stage1, texts_at_once: int = _TEXTS_AT_ONCE) -> None:
        self.stage = stage.eval()
        self.device = stage.temp.device
        self.max_text_tokens = min(MAX_TEXT_TOKENS, stage.config.qformer.max_positions)
        self.texts_at_once = texts_at_once

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """Clean texts as in training and tokenise them."""
        tokens = self.stage.tokenizer([blip_caption(text) for text in texts], self.max_text_tokens)
        return TokenizedTexts(
            tokens=tokens.to(self.device),
            lengths_M=tokens.mask_BL.sum(dim=1),
            bucket_size=self.texts_at_once,
        )

    @torch.no_grad()
    def embed_texts(self, texts: TokenizedTexts) -> Tensor:
        """Return the normalised embeddings (M, C)."""
        embeddings_MC = self._in_place(
            (places, self.stage.embed_texts(part))
            for places, part in texts.length_buckets(torch.arange(len(texts.lengths_M)))
        )
        require_finite(embeddings_MC, "the model's embeddings of texts")
        return embeddings_MC

    @torch.no_grad()
    def embed_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the normalised embeddings (B, Q, C) of uint8 pixels."""
        embeddings_BQC = self.stage.embed_images(self.stage.encode_pixels(pixels_BCHW.to(self.device)))[0]
        require_finite(embeddings_BQC, "the model's embeddings of images")
        return embeddings_BQC

    @torch.no_grad()
    def match(self, pixels_BCHW: Tensor, texts: TokenizedTexts, rows: Sequence[Tensor]) -> list[Tensor]:
        """Return, for each image, the logits of its ``rows`` of the texts, (R, 2): index 1 for "they belong together".

        The logits are means over the queries.
        """
        images = self.stage.encode_pixels(pixels_BCHW.to(self.device))
        image_B1 = torch.arange(len(rows), device=self.device)[:, None]
        return [
            self._match_image(select_images(images, image_1), texts, rows_R)
            for image_1, rows_R in zip(image_B1, rows, strict=True)
        ]

    def _match_image(self, image: list[KeyValue | None], texts: TokenizedTexts, rows_R: Tensor) -> Tensor:
        if not len(rows_R):
            return torch.empty(0, 2, device=self.device)
        logits_R2 = self._in_place(
            (places, self.stage.match(image, part).mean(dim=1))
            for places, part in texts.length_buckets(rows_R)
        )
        require_finite(logits_R2, "the model's matching logits")
        return logits_R2

    def _in_place(self, parts: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Join rows that were computed in another order: each goes to its position."""
        positions, values = zip(*parts, strict=True)
        joined = torch.cat(values)
        return torch.empty_like(joined).index_copy_(0, torch.cat(positions).to(joined.device), joined)


class Lists(NamedTuple):
    """The best candidates of each query, best first: similarities and positions, (queries, R)."""

    similarities: Tensor
    positions: Tensor

    def first(self, candidates: int) -> "Lists":
        """Return the first candidates of each query."""
        return Lists(*(part[:, :candidates] for part in self))


def retrieve(
    model: Stage1Matcher,
    images: ImageBatches,
    texts: Sequence[str],
    image_of_text: Sequence[int],
    rerank: int = 128,
    world: World | None = None,
) -> dict[str, float]:
    """Return recall at 1, 5 and 10 in per cent, of texts by image (``text_r1``) and of images by text (``image_r1``).

    Where ITM reranks, the recall of the lists before it is returned too: ``itc_text_r1`` and so on.

    Args:
        model: what scores.
        images: begins a pass over this rank's images (``World.part``), in batches.
        texts: the captions.
        image_of_text: position of the image that a text belongs to.
        rerank: candidates of each list that ITM reranks; 0: none, the lists stay as ITC gave them.
        world: the ranks; without one, this process has all images.
    """
    world = world or World()
    owner_M = torch.tensor(image_of_text)
    num_images = int(owner_M.max()) + 1
    candidates = max(rerank, max(_RECALL_AT))
    tokenized = model.tokenize(texts)
    first = world.part(num_images).start
    of_rank = contrastive_lists(model, images, tokenized, candidates, first=first)
    to_texts, to_images = _of_all_ranks(*of_rank, candidates, world)

    def recalls(to_texts: Lists, to_images: Lists) -> dict[str, float]:
        text_hits = owner_M[to_texts.positions] == torch.arange(num_images)[:, None]
        image_hits = to_images.positions == owner_M[:, None]
        hits = {"text": text_hits, "image": image_hits}
        return {f"{name}_r{k}": recall(hits[name], k) for name in hits for k in _RECALL_AT}

    by_itc = recalls(to_texts, to_images)
    if not rerank:
        return by_itc
    reranked = _rerank(
        model, images, tokenized, to_texts.first(rerank), to_images.first(rerank), first, world
    )
    return recalls(*reranked) | {f"itc_{name}": value for name, value in by_itc.items()}


def contrastive_lists(
    model: Stage1Matcher,
    images: ImageBatches,
    texts: TokenizedTexts,
    candidates: int,
    block_elements: int = _BLOCK_ELEMENTS,
    first: int = 0,
) -> tuple[Lists, Lists]:
    """Return the best texts of each image and the best images of each text, by ITC.

    ``block_elements`` similarities are held at once; ``first`` is the position of the first image.
    """
    texts_MC = model.embed_texts(texts)
    num_texts, device = len(texts_MC), texts_MC.device
    # A rank may have no image.
    none = torch.empty(0, min(candidates, num_texts))
    to_texts = [Lists(none.to(texts_MC.dtype), none.long())]
    # The best images of each text so far.
    to_images = Lists(
        texts_MC.new_empty(num_texts, 0), torch.empty(num_texts, 0, dtype=torch.long, device=device)
    )
    start = first
    for pixels_BCHW in images():
        embeddings_BQC = model.embed_images(pixels_BCHW)
        images_at_once = max(1, block_elements // (num_texts * embeddings_BQC.shape[1]))
        for block_BQC in embeddings_BQC.split(images_at_once):
            similarity_BM = similarity(block_BQC, texts_MC)
            to_texts.append(Lists(*(part.cpu() for part in _best(similarity_BM, candidates))))
            image_MB = torch.arange(start, start + len(block_BQC), device=device).expand(num_texts, -1)
            values, columns = _best(torch.cat([to_images.similarities, similarity_BM.T], dim=1), candidates)
            positions = torch.cat([to_images.positions, image_MB], dim=1).gather(1, columns)
            to_images = Lists(values, positions)
            start += len(block_BQC)
    return Lists(*map(torch.cat, zip(*to_texts, strict=True))), Lists(*(part.cpu() for part in to_images))


def _of_all_ranks(to_texts: Lists, to_images: Lists, candidates: int, world: World) -> tuple[Lists, Lists]:
    """Join the ranks' lists: each has the texts of its own images, and the best of these for every text."""
    of_ranks = world.gather_objects((to_texts, to_images))
    of_texts, of_images = (
        [Lists(*lists) for lists in of_direction] for of_direction in zip(*of_ranks, strict=True)
    )
    similarities, positions = (torch.cat(parts, dim=1) for parts in zip(*of_images, strict=True))
    # Of equals the earlier image: ranks come in the order of their images.
    values, columns = _best(similarities, candidates)
    joined = Lists(*(torch.cat(parts) for parts in zip(*of_texts, strict=True)))
    return joined, Lists(values, positions.gather(1, columns))


def _best(similarity: Tensor, candidates: int) -> Lists:
    """Return the best of each row, best first, the earlier one of equals."""
    values, columns = similarity.sort(dim=1, descending=True, stable=True)
    return Lists(values, columns).first(candidates)


def _rerank(
    model: Stage1Matcher,
    images: ImageBatches,
    texts: TokenizedTexts,
    to_texts: Lists,
    to_images: Lists,
    first: int,
    world: World,
) -> tuple[Lists, Lists]:
    """Sort both directions' candidates by matching logit plus similarity; each rank matches its own images' pairs."""
    num_texts = len(texts.lengths_M)
    rows_N = torch.arange(len(to_texts.positions))[:, None]
    rows_M = torch.arange(num_texts)[:, None]
    # Pair (n, m) has the number n M + m: image by image, and within an image text by text. Each is computed once.
    pair_NR = rows_N * num_texts + to_texts.positions
    pair_MR = to_images.positions * num_texts + rows_M
    pair_P = torch.cat([pair_NR.flatten(), pair_MR.flatten()]).unique()
    logit_P = torch.cat(world.gather_objects(_match_pairs(model, images, texts, pair_P, first)))

    def sort(lists: Lists, pair: Tensor) -> Lists:
        # score = ITM logit + cosine similarity
        score = logit_P[torch.searchsorted(pair_P, pair)] + lists.similarities
        order = score.sort(dim=1, descending=True, stable=True).indices
        return Lists(*(part.gather(1, order) for part in lists))

    return sort(to_texts, pair_NR), sort(to_images, pair_MR)


def _match_pairs(
    model: Stage1Matcher, images: ImageBatches, texts: TokenizedTexts, pair_P: Tensor, first: int
) -> Tensor:
    """Return the matching logit of each pair of this rank's images; ``pair_P`` is sorted."""
    num_texts = len(texts.lengths_M)
    logits = [torch.empty(0)]
    start = first
    for pixels_BCHW in images():
        numbers = torch.arange(start, start + len(pixels_BCHW) + 1) * num_texts
        bounds = torch.searchsorted(pair_P, numbers).tolist()
        rows = [pair_P[begin:end] % num_texts for begin, end in pairwise(bounds)]
        logits += [logits_R2[:, 1].float().cpu() for logits_R2 in model.match(pixels_BCHW, texts, rows)]
        start += len(pixels_BCHW)
    return torch.cat(logits)


def recall(hits: Tensor, k: int) -> float:
    """Return recall at k in per cent: of how many rows one of the first k columns is a hit."""
    return 100 * hits[:, :k].any(dim=1).double().mean().item()
