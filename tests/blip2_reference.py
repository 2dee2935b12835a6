"""BLIP-2's Q-Former and stage 1 written down from their definitions: float64, one image and one text at a time.

Nothing is shared with ``training/``: full square masks instead of passes that share keys, softmax written out, losses
as sums over log-probabilities. What it has in common with it are LAVIS's names of the parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMOOTHING = 0.1


@dataclass
class Losses:
    """The losses of a whole batch, and the similarities (N, N) of images and texts."""

    itc: Tensor
    itm: Tensor
    itg: Tensor
    itm_accuracy: float
    similarity: Tensor

    @property
    def total(self) -> Tensor:
        return self.itc + self.itm + self.itg


class Reference:
    """The Q-Former with these parameters; dropout is none."""

    def __init__(self, parameters: Mapping[str, Tensor], heads: int, layers: int, begin_id: int) -> None:
        self.p = {
            name: value.detach().double().clone().requires_grad_() for name, value in parameters.items()
        }
        self.heads, self.layers, self.begin_id = heads, layers, begin_id

    # -- the network -------------------------------------------------------------------------------------------

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float = 1e-12) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def attention(self, name: str, x: Tensor, source: Tensor, sees: Tensor) -> Tensor:
        query, key, value = (
            self.linear(f"{name}.self.{part}", of)
            for part, of in (("query", x), ("key", source), ("value", source))
        )
        size = query.shape[1] // self.heads
        mixed = []
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[:, part] @ key[:, part].T / math.sqrt(size)
            weights = scores.masked_fill(~sees, -math.inf).exp()
            mixed.append(weights / weights.sum(1, keepdim=True) @ value[:, part])
        return self.norm(
            f"{name}.output.LayerNorm", self.linear(f"{name}.output.dense", torch.cat(mixed, 1)) + x
        )

    def feed_forward(self, layer: str, kind: str, x: Tensor) -> Tensor:
        wide = self.linear(f"{layer}.intermediate{kind}.dense", x)
        wide = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
        return self.norm(
            f"{layer}.output{kind}.LayerNorm", self.linear(f"{layer}.output{kind}.dense", wide) + x
        )

    def __call__(self, num_queries: int, ids: Sequence[int], sees: Tensor, image: Tensor | None) -> Tensor:
        """Return the outputs of ``num_queries`` queries and the tokens after them; ``sees`` is (S, S)."""
        bert = "Qformer.bert"
        parts = []
        if num_queries:
            parts.append(self.p["query_tokens"][0])
        if len(ids):
            parts.append(
                self.p[f"{bert}.embeddings.word_embeddings.weight"][list(ids)]
                + self.p[f"{bert}.embeddings.position_embeddings.weight"][: len(ids)]
            )
        x = self.norm(f"{bert}.embeddings.LayerNorm", torch.cat(parts))
        for index in range(self.layers):
            layer = f"{bert}.encoder.layer.{index}"
            x = self.attention(f"{layer}.attention", x, x, sees)
            queries, text = x[:num_queries], x[num_queries:]
            if num_queries:
                if f"{layer}.crossattention.self.query.weight" in self.p:
                    everything = torch.ones(len(queries), len(image), dtype=torch.bool)
                    queries = self.attention(f"{layer}.crossattention", queries, image, everything)
                queries = self.feed_forward(layer, "_query", queries)
            if len(text):
                text = self.feed_forward(layer, "", text)
            x = torch.cat((queries, text))
        return x

    # -- the losses --------------------------------------------------------------------------------------------

    def losses(
        self,
        features: Tensor,
        ids: Tensor,
        mask: Tensor,
        text_of_image: Sequence[int],
        image_of_text: Sequence[int],
    ) -> Losses:
        """Return the losses of a batch with these negatives, each the mean that BLIP-2 takes."""
        n, q = len(features), self.p["query_tokens"].shape[1]
        images = [self.norm("ln_vision", pair_logits.double(), eps=1e-5) for pair_logits in features]
        # Padding is cut off: what it holds may not matter.
        texts = [row[: int(length)].tolist() for row, length in zip(ids, mask.sum(1), strict=True)]

        image_of = torch.stack([self.unit("vision_proj", self(q, [], full(q), image)) for image in images])
        text_of = torch.stack(
            [self.unit("text_proj", self(0, text, full(len(text)), None)[0]) for text in texts]
        )
        temperature = self.p["temp"]
        similarity = torch.einsum("iqc,jc->ijq", image_of, text_of.detach()).amax(2)
        backwards = torch.einsum("iqc,jc->jiq", image_of.detach(), text_of).amax(2)
        itc = sum(
            smooth_cross_entropy(side[i] / temperature, i)
            for side in (similarity, backwards)
            for i in range(n)
        ) / (2 * n)

        pairs = [(i, i, 1) for i in range(n)]
        pairs += [(i, text_of_image[i], 0) for i in range(n)] + [(image_of_text[j], j, 0) for j in range(n)]
        logits = [self.match(images[i], texts[j]) for i, j, _ in pairs]
        itm = sum(
            -pair_logits.log_softmax(0)[label]
            for pair_logits, (_, _, label) in zip(logits, pairs, strict=True)
        ) / len(pairs)
        right = sum(
            int(pair_logits.argmax()) == label
            for pair_logits, (_, _, label) in zip(logits, pairs, strict=True)
        )

        words = [
            loss for image, text in zip(images, texts, strict=True) for loss in self.captioning(image, text)
        ]
        return Losses(itc, itm, sum(words) / len(words), right / len(pairs), similarity.detach())

    def unit(self, head: str, hidden: Tensor) -> Tensor:
        projected = self.linear(head, hidden)
        return projected / projected.pow(2).sum(-1, keepdim=True).sqrt()

    def match(self, image: Tensor, text: Sequence[int]) -> Tensor:
        q = self.p["query_tokens"].shape[1]
        hidden = self(q, text, full(q + len(text)), image)
        return self.linear("itm_head", hidden[:q]).mean(0)

    def captioning(self, image: Tensor, text: Sequence[int]) -> list[Tensor]:
        """Return the loss of each word after [DEC]: queries see queries, a word sees them and what precedes it."""
        q, length = self.p["query_tokens"].shape[1], len(text)
        sees = torch.zeros(q + length, q + length, dtype=torch.bool)
        sees[:, :q] = True
        sees[q:, q:] = torch.ones(length, length).tril().bool()
        hidden = self(q, [self.begin_id, *text[1:]], sees, image)[q:]
        head = "Qformer.cls.predictions"
        hidden = self.linear(f"{head}.transform.dense", hidden)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        hidden = self.norm(f"{head}.transform.LayerNorm", hidden)
        words = self.p["Qformer.bert.embeddings.word_embeddings.weight"]
        logits = hidden @ words.T + self.p[f"{head}.bias"]
        return [smooth_cross_entropy(logits[t], text[t + 1]) for t in range(length - 1)]


def full(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool)


def smooth_cross_entropy(logits: Tensor, label: int) -> Tensor:
    """Return the cross-entropy with (1 - s) + s/K on the label and s/K elsewhere."""
    log_probabilities = logits - logits.exp().sum().log()
    return -(1 - SMOOTHING) * log_probabilities[label] - SMOOTHING * log_probabilities.mean()
