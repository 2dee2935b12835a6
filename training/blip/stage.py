"""BLIP's training step: ITC and ITM by the text encoder, LM by the decoder (section 3.2), for the parts a model has.

A step computes the same gradient for any micro-batch size and number of ranks:

1. the momentum encoders follow, then embed the step's images and texts;
2. online and momentum embeddings are gathered from all ranks, and hard negatives are drawn;
3. each micro-batch is computed with gradient, and its part of each loss is sent backward;
4. the momentum embeddings replace the oldest ones of the queue.

BLIP computes ITC and draws negatives among the samples of one GPU. Here these are ``blip.negatives_of`` samples that
follow each other in the step, wherever they are computed. The keys and values of an image are projected once for ITM's
three pairs and for LM; BLIP projects them for each.

The legend of the names: N images of the step over all ranks; B of a micro-batch; K in the queue, M = N + K; R pairs;
P tokens of an image, E its width, C of the contrastive embeddings; L text tokens, T of them with a label.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.rng import seed_for
from schemas.pretrain import PretrainConfig
from training.blip.cost import flops_per_sample
from training.blip.global_batch import GlobalBatch, gather_step, other_groups
from training.blip.losses import soft_contrastive_loss
from training.blip.model import Med
from training.blip.momentum import EmbeddingQueue, MomentumEncoders
from training.distributed import World
from training.losses import IGNORED, captioning_loss, matching_loss
from training.models.layers import KeyValue, leaves_of, select_images, send_to_projection
from training.models.micro_batches import (
    MicroBatch,
    Negatives,
    SampleKeys,
    itm_pairs,
    micro_batches,
)
from training.models.tokenizer import CaptionTokenizer, Texts

if TYPE_CHECKING:
    from training.data.loader import Batch

# The temperature's bounds (blip_pretrain.py).
_TEMPERATURES = (0.001, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A micro-batch's images, with ITC's embeddings where the model has a text encoder.

    ``leaf_BPE`` holds the values of ``features_BPE``: the losses' gradients add up there, and pass through the image
    encoder once.
    """

    features_BPE: Tensor
    leaf_BPE: Tensor
    image_BC: Tensor | None = None
    text_BC: Tensor | None = None


class BlipStage(Med):
    """A model of BLIP in training, with its momentum encoders and its queue where it has a text encoder."""

    def __init__(
        self, config: PretrainConfig, tokenizer: CaptionTokenizer | None, world: World, dtype: torch.dtype
    ) -> None:
        super().__init__(config, tokenizer, world, dtype)
        if self.encodes_text:
            self.momentum = MomentumEncoders(self.encoders)
            self.queue = EmbeddingQueue(self.shape.queue_size, self.shape.projection_width)

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the blocks that are compiled, the momentum encoders' too."""
        if not self.encodes_text:
            return super().blocks
        return [*super().blocks, *self.momentum.visual_encoder.blocks, *self.momentum.text_encoder.blocks]

    # -- state ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Copy the encoders to the momentum encoders, and fill the queue."""
        if self.encodes_text:
            self.momentum.follow(self.encoders, 0.0)
            self.queue.reset(seed_for("queue", self.config.run.seed))

    def auxiliary_state(self) -> dict[str, Tensor]:
        """Return the momentum encoders and the queue, with its pointer."""
        parts = ("momentum.", "queue.")
        return {name: tensor for name, tensor in self.state_dict().items() if name.startswith(parts)}

    # -- cost ----------------------------------------------------------------------------------------------------

    def flops_per_sample(self) -> float:
        """Return the FLOP of one sample's step, without what a micro-batch computes a second time."""
        return flops_per_sample(self, self.momentum if self.encodes_text else None)

    # -- a step --------------------------------------------------------------------------------------------------

    def training_step(self, batch: "Batch", micro_batch_size: int) -> dict[str, Tensor]:
        """Compute the losses over the step and their gradient; see the base class."""
        texts = self.tokenize(batch.captions)
        keys = SampleKeys.of(
            batch.uids, batch.image_hashes, batch.captions, batch.kept_captions, texts.ids_BL
        )
        return self.step(batch.pixels_BCHW, texts, keys, batch.position, micro_batch_size)

    def step(
        self, pixels_BCHW: Tensor, texts: Texts, keys: SampleKeys, position: int, micro_batch_size: int
    ) -> dict[str, Tensor]:
        """Do ``training_step`` on tokens, which are on the CPU.

        Args:
            keys: of the samples: no caption of an image is its negative.
            position: samples that the run has consumed after this step.
        """
        device, labels_BL = self.device, self.labels(texts)
        counts = self.world.gather_counts(len(pixels_BCHW))
        parts = list(
            micro_batches(
                lambda rows: pixels_BCHW[rows].to(device, non_blocking=True),
                texts,
                labels_BL,
                size=micro_batch_size or len(pixels_BCHW),
                first=sum(counts[: self.world.rank]),
                world=self.world,
                seed=self.config.run.seed,
                position=position,
            )
        )
        # The activations of all images would not fit: those of several micro-batches are computed again.
        kept = [self.encode(parts[0])] if len(parts) == 1 else [None] * len(parts)
        global_batch = (
            self._global_batch(parts, kept, texts, keys, position, counts) if self.encodes_text else None
        )
        num_tokens = self.world.sum((labels_BL != IGNORED).sum().to(device))
        losses: dict[str, Tensor] = {}
        for part, encoded in zip(parts, kept, strict=True):
            for name, value in self._backward(
                part, encoded or self.encode(part), global_batch, num_tokens, is_last=part is parts[-1]
            ).items():
                losses[name] = losses.get(name, 0.0) + value
        if global_batch is None:
            return self._summed(losses)
        self.queue.push(global_batch.image_NC, global_batch.text_NC, global_batch.id_N)
        return self._summed(losses) | {"false_negative_share": global_batch.negatives.false_share}

    def _summed(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses of all ranks, and their weighted sum (equation of section 3.2: weights 1)."""
        values = dict(zip(losses, self.world.sum(torch.stack(list(losses.values()))), strict=True))
        objective = self.config.objective
        weights = {"itc": objective.itc, "itm": objective.itm, "lm": objective.itg}
        loss = sum(weight * values[name] for name, weight in weights.items() if name in values)
        temperature = {"temperature": self.temp.detach().clone()} if self.encodes_text else {}
        return {"loss": loss, **values, **temperature}

    def encode(self, micro_batch: MicroBatch) -> Encoded:
        """Encode images and, for ITC, texts, with the same dropout each time."""
        torch.manual_seed(micro_batch.seed)
        features_BPE = self.visual_encoder(micro_batch.images)
        leaf_BPE = features_BPE.detach().requires_grad_(features_BPE.requires_grad)
        if not self.encodes_text:
            return Encoded(features_BPE=features_BPE, leaf_BPE=leaf_BPE)
        encoders, texts = self.encoders, micro_batch.texts
        return Encoded(
            features_BPE=features_BPE,
            leaf_BPE=leaf_BPE,
            image_BC=encoders.embed_images(leaf_BPE),
            text_BC=encoders.embed_texts(texts.ids_BL, texts.mask_BL),
        )

    # -- what the ranks know together ----------------------------------------------------------------------------

    @torch.no_grad()
    def _global_batch(
        self,
        parts: Sequence[MicroBatch],
        kept: Sequence[Encoded | None],
        texts: Texts,
        keys: SampleKeys,
        position: int,
        counts: Sequence[int],
    ) -> GlobalBatch:
        """Let the momentum encoders follow and embed the step; gather all ranks' embeddings; draw the negatives."""
        self.temp.clamp_(*_TEMPERATURES)
        online = [
            (encoded.image_BC, encoded.text_BC)
            for encoded in (known or self.encode(part) for part, known in zip(parts, kept, strict=True))
        ]
        self.momentum.follow(self.encoders, self.shape.momentum)
        momentum = [self._embed_by_momentum(part) for part in parts]
        return gather_step(self, online, momentum, texts, keys, position, counts)

    def _embed_by_momentum(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        # In training mode as BLIP's, with dropout of its own.
        torch.manual_seed(seed_for("momentum", part.seed))
        features_BPE = self.momentum.visual_encoder(part.images)
        return (
            self.momentum.embed_images(features_BPE),
            self.momentum.embed_texts(part.texts.ids_BL, part.texts.mask_BL),
        )

    # -- gradients -----------------------------------------------------------------------------------------------

    def _backward(
        self,
        part: MicroBatch,
        encoded: Encoded,
        global_batch: GlobalBatch | None,
        num_tokens: Tensor,
        is_last: bool,
    ) -> dict[str, Tensor]:
        """Send a micro-batch's part of each loss backward; return the parts, detached."""
        losses: dict[str, Tensor] = {}
        projected = self.project(encoded.leaf_BPE)
        for_encoder = leaves_of(projected[0])
        for_decoder = for_encoder if projected[1] is projected[0] else leaves_of(projected[1])
        if global_batch is not None:
            losses |= self._itc(part, encoded, global_batch)
            is_last_itm = is_last and not self.decodes_text
            losses |= self._itm(part, for_encoder, global_batch.negatives, is_last_itm)
        if self.decodes_text:
            if is_last:
                self.begin_last_passes()
            losses |= self._lm(part, for_decoder, num_tokens)
        # The summed gradients of keys and values go on to their projections, and from there to the image encoder.
        send_to_projection(projected[0], for_encoder)
        if for_decoder is not for_encoder:
            send_to_projection(projected[1], for_decoder)
        encoded.features_BPE.backward(encoded.leaf_BPE.grad)
        return losses

    def _itc(self, part: MicroBatch, encoded: Encoded, batch: GlobalBatch) -> dict[str, Tensor]:
        """Compute ITC of a micro-batch against its group and the queue: the mean of both directions, over N."""
        assert encoded.image_BC is not None and encoded.text_BC is not None, "a text encoder gives embeddings"
        rows = slice(part.first, part.first + part.size)
        queue, num_samples = self.queue, len(batch.id_N)
        apart_BN = other_groups(self.shape, part.first, part.size, batch.id_N)
        apart_BM = torch.cat((apart_BN, apart_BN.new_zeros(part.size, len(queue.id_K))), dim=1)
        same_BM = (batch.id_N[rows, None] == torch.cat((batch.id_N, queue.id_K))) & ~apart_BM
        loss = sum(
            soft_contrastive_loss(
                own_BC, slow_NC[rows], torch.cat(candidates), self.temp, same_BM, apart_BM, batch.alpha
            )
            for own_BC, slow_NC, candidates in (
                (encoded.image_BC, batch.image_NC, (batch.text_NC, queue.text_KC)),
                (encoded.text_BC, batch.text_NC, (batch.image_NC, queue.image_KC)),
            )
        )
        loss = loss / (2 * num_samples)
        (self.config.objective.itc * loss).backward()
        return {"itc": loss.detach()}

    def _itm(
        self, part: MicroBatch, image: list[KeyValue | None], negatives: Negatives, is_last: bool
    ) -> dict[str, Tensor]:
        """Compute ITM of the pairs whose image the micro-batch holds: the mean over the step's 3 N pairs."""
        num_pairs = 3 * len(negatives.image_of_text_N)
        itm = accuracy = torch.zeros_like(self.temp.detach())
        all_pairs = list(itm_pairs(part, negatives))
        for pairs in all_pairs:
            of_pairs = image if pairs.rows_R is None else select_images(image, pairs.rows_R)
            logits_R12 = self.match(of_pairs, pairs.texts)[:, None]
            loss, num_correct = matching_loss(logits_R12, pairs.labels_R, pairs.weights_R)
            if is_last and pairs is all_pairs[-1]:
                self.begin_last_passes()
            (self.config.objective.itm * loss / num_pairs).backward()
            itm, accuracy = itm + loss.detach() / num_pairs, accuracy + num_correct / num_pairs
        return {"itm": itm, "itm_accuracy": accuracy}

    def _lm(self, part: MicroBatch, image: list[KeyValue | None], num_tokens: Tensor) -> dict[str, Tensor]:
        """Compute LM: the mean over the step's tokens that have a label."""
        objective = self.config.objective
        hidden_BLD = self.text_decoder(part.texts.beginning_with(self.begin_id).ids_BL, image)
        hidden_TD = hidden_BLD.flatten(0, 1).index_select(0, part.target_positions_T)
        loss = captioning_loss(
            self.text_decoder.logits, hidden_TD, part.labels_T, objective.label_smoothing
        ).div(num_tokens)
        (objective.itg * loss).backward()
        return {"lm": loss.detach()}
