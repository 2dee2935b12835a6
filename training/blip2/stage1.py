"""Stage 1: the Q-Former learns from a frozen image encoder by ITC, ITM and ITG (BLIP-2, section 3.2).

A step computes the same gradient for any micro-batch size and number of ranks:

1. every image is encoded once, and its features are kept;
2. the contrastive embeddings are computed without gradient and gathered from all ranks;
3. hard negatives are drawn from the similarities of the global batch;
4. each micro-batch is computed again with gradient, and its part of each loss is sent backward.

Dropout's generator is seeded for each micro-batch, so that step 4 repeats step 2, and a checkpoint needs no generator's
state.

The legend of the names: N images of the step over all ranks; B of a micro-batch; R pairs; Q queries, L text tokens, T
of them with a label, P tokens of an image, E its width, D the Q-Former's, C the contrastive one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.pretrain import PretrainConfig
from training.blip2.stage import QFormerStage
from training.distributed import World
from training.losses import (
    captioning_loss,
    contrastive_loss,
    draw_negatives,
    matching_loss,
    next_tokens,
)
from training.models.layers import KeyValue, Linear, leaves_of, select_images, send_to_projection
from training.models.micro_batches import (
    MicroBatch,
    Negatives,
    SampleKeys,
    belonging,
    itm_pairs,
    micro_batches,
    negative_uniforms,
    same_on_all_ranks,
)
from training.models.tokenizer import CaptionTokenizer, Texts
from training.models.vision import FrozenVision

if TYPE_CHECKING:
    from training.data.loader import Batch

# The lower bound of BLIP's temperature (models/blip_pretrain.py): at 0 the logits are infinite, and below it ITC would
# push each image and its own text apart.
_MIN_TEMPERATURE = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatch:
    """What each rank knows of the whole step: embeddings, tokens and drawn negatives. None of it has a gradient."""

    image_NQC: Tensor
    text_NC: Tensor
    negatives: Negatives
    num_tokens: Tensor

    @property
    def size(self) -> int:
        """Return N."""
        return len(self.text_NC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A micro-batch encoded for ITC, with what the other losses use again.

    ``image`` holds the keys and values of ``projected`` as leaves of the losses' graphs.
    """

    projected: list[KeyValue | None]
    image: list[KeyValue | None]
    queries: list[KeyValue]
    image_BQC: Tensor
    text_BC: Tensor


class Stage1(QFormerStage):
    """The Q-Former with its heads on a frozen image encoder.

    Args:
        config: of the run.
        vision: the encoder.
        tokenizer: of captions; None where no caption is ever given: on ``meta``, in benchmarks.
        world: the ranks.
    """

    def __init__(
        self, config: PretrainConfig, vision: FrozenVision, tokenizer: CaptionTokenizer | None, world: World
    ) -> None:
        super().__init__(config, vision, world, text=True)
        shape = config.qformer
        self.tokenizer = tokenizer
        self.begin_id = tokenizer.begin_id if tokenizer else shape.vocab_size - 1
        self.vision_proj = Linear(shape.width, shape.projection_width)
        self.text_proj = Linear(shape.width, shape.projection_width)
        self.itm_head = Linear(shape.width, 2)
        self.temp = nn.Parameter(torch.tensor(config.objective.temperature))

    # -- images and texts ----------------------------------------------------------------------------------------

    def encode_pixels(self, pixels_BCHW: Tensor) -> list[KeyValue | None]:
        """Return the keys and values of images for the Q-Former."""
        return self.project(self.visual_encoder(pixels_BCHW))

    def embed_images(self, image: list[KeyValue | None]) -> tuple[Tensor, list[KeyValue]]:
        """Return normalised embeddings (B, Q, C) of images, and the queries' keys and values for captions."""
        hidden_BQD, queries = self.Qformer.queries(self.query_tokens, image)
        return self._embed(self.vision_proj, hidden_BQD), queries

    def embed_texts(self, texts: Texts) -> Tensor:
        """Return normalised embeddings (B, C) of texts."""
        return self._embed(self.text_proj, self.Qformer.text(texts.ids_BL, texts.mask_BL)[:, 0])

    def match(self, image: list[KeyValue | None], texts: Texts) -> Tensor:
        """Return ITM's logits of each query, (R, Q, 2), index 1 where image and text belong together.

        Where there are more texts than images, the texts of one image follow each other.
        """
        hidden_RQD = self.Qformer.pairs(self.query_tokens, texts.ids_BL, texts.mask_BL, image)
        return self.itm_head(hidden_RQD.to(self.temp.dtype))

    def _embed(self, head: Linear, hidden: Tensor) -> Tensor:
        return F.normalize(head(hidden.to(self.temp.dtype)), dim=-1)

    # -- a step --------------------------------------------------------------------------------------------------

    def training_step(self, batch: "Batch", micro_batch_size: int) -> dict[str, Tensor]:
        """Compute ITC, ITM and ITG over the step and their gradient; see the base class."""
        assert self.tokenizer is not None, "a stage that is trained has a tokenizer"
        texts = self.tokenizer(batch.captions)
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
            position: a number that no other step of the run has.
        """
        with torch.no_grad():
            self.temp.clamp_(min=_MIN_TEMPERATURE)
        size = len(pixels_BCHW)
        counts = self.world.gather_counts(size)
        micro_batches = list(
            self.micro_batches(pixels_BCHW, texts, position, micro_batch_size or size, counts)
        )
        # The keys and values of all images would not fit: those of several micro-batches are computed again.
        kept = [self.encode(micro_batches[0])] if len(micro_batches) == 1 else [None] * len(micro_batches)
        with torch.no_grad():
            embeddings = [
                (encoded.image_BQC, encoded.text_BC)
                for encoded in (
                    known or self.encode(part) for part, known in zip(micro_batches, kept, strict=True)
                )
            ]
        global_batch = self.global_batch(embeddings, texts, keys, position, counts)
        parts = [
            self._backward(
                micro_batch,
                encoded or self.encode(micro_batch),
                global_batch,
                is_last=micro_batch is micro_batches[-1],
            )
            for micro_batch, encoded in zip(micro_batches, kept, strict=True)
        ]
        itc, itm, itg, itm_accuracy = self.world.sum(torch.stack(parts).sum(dim=0))
        # Section 3.2: the three losses are summed; their weights are 1 unless the config says otherwise.
        weight = self.config.objective
        return {
            "loss": weight.itc * itc + weight.itm * itm + weight.itg * itg,
            "itc": itc,
            "itm": itm,
            "itg": itg,
            "itm_accuracy": itm_accuracy,
            "temperature": self.temp.detach().clone(),
            "false_negative_share": global_batch.negatives.false_share,
        }

    def micro_batches(
        self, pixels_BCHW: Tensor, texts: Texts, position: int, size: int, counts: Sequence[int]
    ) -> Iterator[MicroBatch]:
        """Yield the micro-batches of this rank, each with the features of its images.

        ``counts``: images of each rank.
        """
        return micro_batches(
            lambda rows: self.features(pixels_BCHW[rows], position, rows.start // size),
            texts,
            next_tokens(texts.ids_BL, texts.mask_BL),
            size=size,
            first=sum(counts[: self.world.rank]),
            world=self.world,
            seed=self.config.run.seed,
            position=position,
        )

    def encode(self, micro_batch: MicroBatch) -> Encoded:
        """Compute ITC's embeddings of a micro-batch, with the same dropout each time."""
        torch.manual_seed(micro_batch.seed)
        projected = self.project(micro_batch.images)
        # The losses' gradients add up at these leaves and pass through the projection once, in _backward.
        image = leaves_of(projected)
        image_BQC, queries = self.embed_images(image)
        return Encoded(
            projected=projected,
            image=image,
            queries=queries,
            image_BQC=image_BQC,
            text_BC=self.embed_texts(micro_batch.texts),
        )

    @torch.no_grad()
    def global_batch(
        self,
        embeddings: list[tuple[Tensor, Tensor]],
        texts: Texts,
        keys: SampleKeys,
        position: int,
        counts: Sequence[int],
    ) -> GlobalBatch:
        """Gather the embeddings and tokens of all ranks, and draw ITM's negatives from them."""
        device, gather = self.device, partial(self.world.all_gather, counts=counts)
        image_NQC, text_NC = (gather(torch.cat(parts)) for parts in zip(*embeddings, strict=True))
        all_texts = Texts(ids_BL=gather(texts.ids_BL.to(device)), mask_BL=gather(texts.mask_BL.to(device)))
        same_NN = belonging(keys, gather, device)
        uniforms_2N = negative_uniforms(self.config.run.seed, position, len(same_NN))
        drawn = draw_negatives(image_NQC, text_NC, self.temp, same_NN, uniforms_2N.to(device))
        return GlobalBatch(
            image_NQC=image_NQC,
            text_NC=text_NC,
            negatives=same_on_all_ranks(all_texts, drawn, self.world),
            # Every token but the first is predicted.
            num_tokens=all_texts.mask_BL[:, 1:].sum(),
        )

    def _backward(
        self, micro_batch: MicroBatch, encoded: Encoded, global_batch: GlobalBatch, is_last: bool
    ) -> Tensor:
        """Send a micro-batch's part of each loss backward; return the parts of ITC, ITM, ITG and ITM's accuracy.

        Its part of ITM are the pairs whose image it holds: so tokens travel between ranks, and features do not.
        """
        objective = self.config.objective
        # ITC: the mean over the N images of the step.
        itc = contrastive_loss(
            encoded.image_BQC,
            encoded.text_BC,
            global_batch.image_NQC,
            global_batch.text_NC,
            self.temp,
            torch.arange(micro_batch.first, micro_batch.first + micro_batch.size, device=self.device),
            objective.label_smoothing,
        ).div(global_batch.size)
        # ITG: the mean over the tokens of the step. The text begins with [DEC] in place of [CLS] (section 3.2).
        hidden_BLD = self.Qformer.captions(
            micro_batch.texts.beginning_with(self.begin_id).ids_BL, encoded.queries
        )
        hidden_TD = hidden_BLD.flatten(0, 1).index_select(0, micro_batch.target_positions_T)
        itg = captioning_loss(self.Qformer.logits, hidden_TD, micro_batch.labels_T, objective.label_smoothing)
        itg = itg / global_batch.num_tokens
        (objective.itc * itc + objective.itg * itg).backward()

        # ITM: the mean over 3 N pairs: each image with its own text, each image and each text with a negative.
        itm = accuracy = torch.zeros_like(itc)
        all_pairs = list(itm_pairs(micro_batch, global_batch.negatives))
        for pairs in all_pairs:
            image = encoded.image if pairs.rows_R is None else select_images(encoded.image, pairs.rows_R)
            loss, num_correct = matching_loss(self.match(image, pairs.texts), pairs.labels_R, pairs.weights_R)
            loss = loss / (3 * global_batch.size)
            if is_last and pairs is all_pairs[-1]:
                self.begin_last_passes()
            (objective.itm * loss).backward()
            itm, accuracy = itm + loss.detach(), accuracy + num_correct / (3 * global_batch.size)

        # The summed gradient of the images' keys and values goes on to their projection and to ln_vision.
        send_to_projection(encoded.projected, encoded.image)
        return torch.stack((itc.detach(), itm, itg.detach(), accuracy))

    def compute_sample(self, features_1PE: Tensor) -> None:
        """Compute one sample: its text for ITC and ITG, three pairs for ITM, one projection of the image."""
        texts = Texts.full(3, self.config.qformer.max_text_tokens, self.device)
        image = self.project(features_1PE)
        _, queries = self.embed_images(image)
        self.embed_texts(texts[:1])
        self.Qformer.logits(self.Qformer.captions(texts.ids_BL[:1], queries)[0, 1:])
        self.match(image, texts)
