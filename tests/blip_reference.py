"""BLIP's steps written down from blip_pretrain.py, blip_retrieval.py and ALBEF's equations, on transformers' modules.

Nothing is shared with ``training/``: sums over single samples, groups as the GPUs that BLIP computes them on, the image
given to each pair. What it has in common is the distribution's random numbers, since a draw cannot be compared else.
"""

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import BlipForImageTextRetrieval
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

SMOOTHING = 0.1
PARTS = ("vision_model", "text_encoder", "vision_proj", "text_proj")


def seed_for(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256("\n".join(map(str, parts)).encode()).digest()[:8]) >> 1


class Reference:
    """A MED all of whose parameters but the decoder's self-attention are shared, or a filter, which has no LM."""

    def __init__(
        self,
        config: Any,
        tensors: dict[str, Tensor],
        begin_id: int,
        queue: dict[str, Tensor],
        **settings: Any,
    ) -> None:
        self.model = BlipForImageTextRetrieval(config).double()
        self.decoder = BlipTextLMHeadModel(config.text_config).double()
        self.decoder.bert.embeddings = self.model.text_encoder.embeddings
        for own, other in zip(
            self.decoder.bert.encoder.layer, self.model.text_encoder.encoder.layer, strict=True
        ):
            own.crossattention, own.intermediate, own.output = (
                other.crossattention,
                other.intermediate,
                other.output,
            )
        self.decoder.cls.predictions.decoder.weight = (
            self.model.text_encoder.embeddings.word_embeddings.weight
        )
        self.decoder.cls.predictions.decoder.bias = self.decoder.cls.predictions.bias
        of_decoder = {
            n.removeprefix("text_decoder."): t for n, t in tensors.items() if n.startswith("text_decoder.")
        }
        of_model = {n: t for n, t in tensors.items() if not n.startswith("text_decoder.") and n != "temp"}
        self.model.load_state_dict(of_model, strict=True)
        self.decoder.load_state_dict(of_decoder, strict=False)
        self.temp = torch.nn.Parameter(tensors["temp"].double().clone())
        self.twins = {part: copy.deepcopy(getattr(self.model, part)) for part in PARTS}
        self.images = [(row.double(), -1) for row in queue["image_KC"]]
        self.texts = [(row.double(), -1) for row in queue["text_KC"]]
        self.begin_id, self.settings = begin_id, settings
        self.parameters = list({id(p): p for p in self._parameters()}.values())

    def _parameters(self) -> Sequence[torch.nn.Parameter]:
        return [self.temp, *self.model.parameters(), *self.decoder.parameters()]

    def _features(
        self, parts: dict[str, Any], pixels: Tensor, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        image = parts["vision_model"](pixels).last_hidden_state
        text = parts["text_encoder"](ids, attention_mask=mask).last_hidden_state
        return (
            image,
            normalize(parts["vision_proj"](image[:, 0]), dim=-1),
            normalize(parts["text_proj"](text[:, 0]), dim=-1),
        )

    def step(
        self, pixels: Tensor, ids: Tensor, mask: Tensor, uids: Sequence[str], step: int, position: int
    ) -> dict[str, Tensor]:
        """Return the losses of a step; their gradients are in ``parameters``."""
        s, size = self.settings, len(uids)
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        image, image_feat, text_feat = self._features(
            {part: getattr(self.model, part) for part in PARTS}, pixels, ids, mask
        )
        with torch.no_grad():
            for part in PARTS:
                for slow, fast in zip(
                    self.twins[part].parameters(), getattr(self.model, part).parameters(), strict=True
                ):
                    slow.copy_(s["momentum"] * slow + (1 - s["momentum"]) * fast)
            _, image_slow, text_slow = self._features(self.twins, pixels, ids, mask)
        alpha = s["alpha"] * min(1.0, step / (s["alpha_epochs"] * s["epoch_steps"]))
        uniforms = np.random.default_rng(seed_for("negatives", s["seed"], position)).random((2, size))
        identity = [seed_for(uid) for uid in uids]
        itc, pairs = torch.zeros((), dtype=torch.float64), []
        for row in range(size):
            group = [n for n in range(size) if n // s["group"] == row // s["group"]]
            drawn = []
            for own, own_slow, other, slow, queue, uniform in (
                (image_feat, image_slow, text_feat, text_slow, self.texts, uniforms[0][row]),
                (text_feat, text_slow, image_feat, image_slow, self.images, uniforms[1][row]),
            ):
                candidates = torch.stack([*(slow[n] for n in group), *(entry for entry, _ in queue)])
                true = torch.tensor(
                    [identity[n] == identity[row] for n in group] + [key == identity[row] for _, key in queue]
                ).double()
                logits = candidates @ own[row] / self.temp
                with torch.no_grad():
                    target = (1 - alpha) * true / true.sum()
                    target += alpha * torch.softmax(candidates @ own_slow[row] / self.temp, dim=0)
                    if s["filter"]:
                        weights = torch.softmax(other[group] @ own[row] / self.temp, dim=0)
                    else:
                        weights = torch.softmax(logits[: len(group)], dim=0) + 1e-4
                    for place, n in enumerate(group):
                        if identity[n] == identity[row] or ids[n].tolist() == ids[row].tolist():
                            weights[place] = 0
                    shares = (weights / weights.sum()).cumsum(0).tolist()
                    drawn.append(group[next(place for place, share in enumerate(shares) if share > uniform)])
                itc = itc - (target * torch.log_softmax(logits, dim=0)).sum() / (2 * size)
            pairs += [(row, row, 1), (row, drawn[0], 0), (drawn[1], row, 0)]
        losses = {"itc": itc, "itm": self._itm(image, ids, mask, pairs)}
        if not s["filter"]:
            losses["lm"] = self._lm(image, ids, mask)
        for parameter in self.parameters:
            parameter.grad = None
        sum(losses.values()).backward()
        self.images = self.images[size:] + list(zip(image_slow, identity, strict=True))
        self.texts = self.texts[size:] + list(zip(text_slow, identity, strict=True))
        return {name: loss.detach() for name, loss in losses.items()}

    def _itm(self, image: Tensor, ids: Tensor, mask: Tensor, pairs: Sequence[tuple[int, int, int]]) -> Tensor:
        images, texts, labels = (list(column) for column in zip(*pairs, strict=True))
        encoded = ids[texts].clone()
        encoded[:, 0] = self.begin_id + 1
        hidden = self.model.text_encoder(
            encoded, attention_mask=mask[texts], encoder_hidden_states=image[images]
        ).last_hidden_state
        logs = torch.log_softmax(self.model.itm_head(hidden[:, 0]), dim=1)
        return -torch.stack([logs[row, label] for row, label in enumerate(labels)]).mean()

    def _lm(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        ids = ids.clone()
        ids[:, 0] = self.begin_id
        logs = self.decoder(ids, attention_mask=mask, encoder_hidden_states=image).logits.log_softmax(dim=2)
        losses = [
            -(1 - SMOOTHING) * logs[row, place, ids[row, place + 1]] - SMOOTHING * logs[row, place].mean()
            for row in range(len(ids))
            for place in range(int(mask[row].sum()) - 1)
        ]
        return torch.stack(losses).mean()
