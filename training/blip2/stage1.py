"""Stage 1: the Q-Former learns from a frozen image encoder by ITC, ITM and ITG (BLIP-2, section 3.2).

A step works through the rank's part of the batch share by share (micro-batches), and comes to the same gradient in
whatever shares and on however many ranks:

1. every image is encoded, once, and its features kept;
2. the contrastive embeddings are computed without gradient and gathered from all ranks;
3. hard negatives are drawn from the whole step's similarities, by numbers that depend on the step alone;
4. each share is computed again with gradient, and its part of each loss is sent backward.

A share's part of ITM are the pairs whose *image* it holds. So only tokens travel between ranks, never features, and the
keys and values of an image are projected once, for every loss: they are leaves of the losses' graphs, and what gathers
there goes on to their projection and to ``ln_vision`` in one go.

Dropout draws from a generator that is set for each share, so step 4 repeats what step 2 did, and a resumed run needs no
generator's state.

The legend of the names: N images of the step over all ranks; B of a share; R pairs; Q queries, L text tokens, T words
to predict, P tokens of an image, E its width, D the Q-Former's, C the contrastive one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.rng import seed_for
from schemas.pretrain import PretrainConfig
from training.blip2.micro_batches import Everyone, Share, arrange_pairs
from training.distributed import World
from training.losses import (
    IGNORED,
    captioning_loss,
    contrastive_loss,
    draw_negatives,
    matching_loss,
    next_words,
)
from training.models.flops import FORWARD, TRAINED, count_flops
from training.models.layers import LayerNorm, Linear
from training.models.parameters import load_state, trainable
from training.models.qformer import KeyValue, QFormer, initial_queries
from training.models.tokenizer import CaptionTokenizer, Texts
from training.models.vision import FrozenVision

if TYPE_CHECKING:
    from training.data.loader import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A share as ITC sees it, with what the other losses take over.

    ``image`` are the keys and values of ``projected`` as leaves.
    """

    projected: list[KeyValue | None]
    image: list[KeyValue | None]
    queries: list[KeyValue]
    image_BQC: Tensor
    text_BC: Tensor


class Stage1(nn.Module):
    """The Q-Former with its heads on a frozen image encoder.

    Args:
        config: of the run.
        vision: the encoder.
        tokenizer: of captions; None where no caption is ever given: on ``meta``, in benchmarks.
        world: the ranks.
        dtype: of the Q-Former's matrix products; None: that of its weights.
    """

    def __init__(
        self,
        config: PretrainConfig,
        vision: FrozenVision,
        tokenizer: CaptionTokenizer | None,
        world: World,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = config.qformer
        self.config = config
        self.world = world
        self.tokenizer = tokenizer
        self.begin_id = tokenizer.begin_id if tokenizer else shape.vocab_size - 1
        self.visual_encoder = vision
        self.ln_vision = LayerNorm(vision.width)
        self.Qformer = QFormer(shape, vision.width, dtype=dtype)
        self.query_tokens = initial_queries(shape.num_queries, shape.width, shape.initializer_range)
        self.vision_proj = Linear(shape.width, shape.projection_width)
        self.text_proj = Linear(shape.width, shape.projection_width)
        self.itm_head = Linear(shape.width, 2)
        self.temp = nn.Parameter(torch.tensor(config.objective.temperature))

    # -- images and texts ----------------------------------------------------------------------------------------

    def encode_pixels(self, pixels_BCHW: Tensor) -> list[KeyValue | None]:
        """Return the keys and values of images for the Q-Former."""
        return self._project(self.visual_encoder(pixels_BCHW))

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

    def _project(self, features_BPE: Tensor) -> list[KeyValue | None]:
        return self.Qformer.project_image(self.ln_vision(features_BPE.to(self.Qformer.dtype)))

    def _embed(self, head: Linear, hidden: Tensor) -> Tensor:
        return F.normalize(head(hidden.to(self.temp.dtype)), dim=-1)

    # -- a step --------------------------------------------------------------------------------------------------

    def training_step(self, batch: "Batch", micro_batch_size: int) -> dict[str, Tensor]:
        """Add to ``.grad`` what this rank has of the gradient of the step's mean loss; set torch's generators.

        The sum over the ranks is the gradient.

        Returns:
            The losses of the whole step, the same on every rank.
        """
        texts = self.tokenizer(batch.captions)
        return self.step(batch.pixels_BCHW, texts, batch.uids, batch.position, micro_batch_size)

    def step(
        self, pixels_BCHW: Tensor, texts: Texts, uids: Sequence[str], position: int, micro_batch_size: int
    ) -> dict[str, Tensor]:
        """Do ``training_step`` on tokens, which are on the CPU.

        Args:
            uids: of the images: no caption of an image is its negative.
            position: a number that no other step of the run has.
        """
        shares = list(self._shares(pixels_BCHW, texts, position, micro_batch_size or len(uids)))
        if len(shares) == 1:
            encoded = [self._encode(shares[0])]
            embeddings = [(one.image_BQC.detach(), one.text_BC.detach()) for one in encoded]
        else:
            # Kept, they would be the keys and values of all images: they are computed again.
            encoded = [None] * len(shares)
            with torch.no_grad():
                embeddings = [(one.image_BQC, one.text_BC) for one in map(self._encode, shares)]
        everyone = self._everyone(embeddings, texts, uids, position)
        parts = [
            self._backward(share, one or self._encode(share), everyone)
            for share, one in zip(shares, encoded, strict=True)
        ]
        itc, itm, itg, right = self.world.sum(torch.stack(parts).sum(dim=0))
        weight = self.config.objective
        return {
            "loss": weight.itc * itc + weight.itm * itm + weight.itg * itg,
            "itc": itc,
            "itm": itm,
            "itg": itg,
            "itm_accuracy": right,
            "temperature": self.temp.detach().clone(),
        }

    def _shares(self, pixels_BCHW: Tensor, texts: Texts, position: int, size: int) -> Iterator[Share]:
        device, local = self.temp.device, len(pixels_BCHW)
        words_BL = next_words(texts.ids_BL, texts.mask_BL)
        for index, start in enumerate(range(0, local, size)):
            rows = slice(start, min(start + size, local))
            words = words_BL[rows].flatten()
            # On the CPU: asking the device how many there are would wait for it.
            predicting_T = (words != IGNORED).nonzero()[:, 0]
            yield Share(
                features_BPE=self.visual_encoder(pixels_BCHW[rows].to(device, non_blocking=True)),
                texts=texts[rows].to(device),
                predicting_T=predicting_T.to(device, non_blocking=True),
                words_T=words[predicting_T].to(device, non_blocking=True),
                first=self.world.rank * local + start,
                seed=seed_for("dropout", self.config.run.seed, position, self.world.rank, index),
            )

    def _encode(self, share: Share) -> Encoded:
        torch.manual_seed(share.seed)
        projected = self._project(share.features_BPE)
        image = [
            one and tuple(part.detach().requires_grad_(part.requires_grad) for part in one)
            for one in projected
        ]
        image_BQC, queries = self.embed_images(image)
        return Encoded(
            projected=projected,
            image=image,
            queries=queries,
            image_BQC=image_BQC,
            text_BC=self.embed_texts(share.texts),
        )

    @torch.no_grad()
    def _everyone(
        self, embeddings: list[tuple[Tensor, Tensor]], texts: Texts, uids: Sequence[str], position: int
    ) -> Everyone:
        device, gather = self.temp.device, self.world.all_gather
        image_NQC, text_NC = (gather(torch.cat(parts)) for parts in zip(*embeddings, strict=True))
        all_texts = Texts(ids_BL=gather(texts.ids_BL.to(device)), mask_BL=gather(texts.mask_BL.to(device)))
        # Two images may share a caption, two samples an image: then neither has the other's text for a negative.
        names = [
            (seed_for(uid), seed_for(*ids)) for uid, ids in zip(uids, texts.ids_BL.tolist(), strict=True)
        ]
        names_N2 = gather(torch.tensor(names, device=device))
        same_NN = (names_N2[:, None] == names_N2).any(dim=2)
        generator = np.random.default_rng(seed_for("negatives", self.config.run.seed, position))
        uniforms_2N = torch.from_numpy(generator.random((2, len(names_N2))))
        drawn = draw_negatives(image_NQC, text_NC, self.temp, same_NN, uniforms_2N.to(device))
        # Rank 0's stand: the last bit of a similarity may differ between devices.
        text_of_image_N, image_of_text_N = self.world.broadcast(torch.stack(drawn))
        return Everyone(
            image_NQC=image_NQC,
            text_NC=text_NC,
            texts=all_texts,
            text_of_image_N=text_of_image_N,
            image_of_text_N=image_of_text_N.cpu().numpy(),
            num_words=all_texts.mask_BL[:, 1:].sum(),
        )

    def _backward(self, share: Share, encoded: Encoded, everyone: Everyone) -> Tensor:
        """Send a share's part of each loss backward; return the parts of ITC, ITM, ITG and ITM's accuracy."""
        objective = self.config.objective
        itc = contrastive_loss(
            encoded.image_BQC,
            encoded.text_BC,
            everyone.image_NQC,
            everyone.text_NC,
            self.temp,
            torch.arange(share.first, share.first + share.size, device=self.temp.device),
            objective.label_smoothing,
        ).div(everyone.size)
        hidden_BLD = self.Qformer.captions(share.texts.beginning_with(self.begin_id).ids_BL, encoded.queries)
        hidden_TD = hidden_BLD.flatten(0, 1).index_select(0, share.predicting_T)
        itg = captioning_loss(self.Qformer.logits, hidden_TD, share.words_T, objective.label_smoothing)
        itg = itg / everyone.num_words
        (objective.itc * itc + objective.itg * itg).backward()

        itm = right = torch.zeros_like(itc)
        for pairs in arrange_pairs(share, everyone):
            image = encoded.image
            if pairs.rows_R is not None:
                image = [one and tuple(part.index_select(0, pairs.rows_R) for part in one) for one in image]
            loss, num_right = matching_loss(self.match(image, pairs.texts), pairs.labels_R, pairs.weights_R)
            loss = loss / (3 * everyone.size)
            (objective.itm * loss).backward()
            itm, right = itm + loss.detach(), right + num_right / (3 * everyone.size)

        leaves = [part for one in encoded.image if one for part in one]
        roots = [part for one in encoded.projected if one for part in one]
        torch.autograd.backward(roots, [leaf.grad for leaf in leaves])
        return torch.stack((itc.detach(), itm, itg.detach(), right))

    # -- what is trained -----------------------------------------------------------------------------------------

    def trainable_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trainable parameters, named as in LAVIS."""
        return trainable(self)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the trainable parameters' values, which change with them."""
        return {name: parameter.detach() for name, parameter in trainable(self)}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Set all trainable parameters. Raises CapfiltError where the names or shapes are not these."""
        load_state(self, state)

    def flops_per_sample(self) -> float:
        """Return the FLOP of one sample's step, the second computation of a share not counted."""
        return FORWARD * count_flops(self._flops_of_vision) + TRAINED * count_flops(self._flops_of_qformer)

    def _flops_of_vision(self) -> None:
        size = self.config.data.image_size_px
        self.visual_encoder(torch.empty(1, 3, size, size, dtype=torch.uint8, device=self.temp.device))

    def _flops_of_qformer(self) -> None:
        """Do what a sample costs: each text once for ITC and ITG, three pairs for ITM, the image projected once."""
        vision, device, length = self.visual_encoder, self.temp.device, self.config.qformer.max_text_tokens
        texts = Texts(
            ids_BL=torch.zeros(3, length, dtype=torch.long, device=device),
            mask_BL=torch.ones(3, length, dtype=torch.bool, device=device),
        )
        image = self._project(
            torch.empty(1, vision.num_tokens, vision.width, dtype=vision.dtype, device=device)
        )
        _, queries = self.embed_images(image)
        self.embed_texts(texts[:1])
        self.Qformer.logits(self.Qformer.captions(texts.ids_BL[:1], queries)[0, 1:])
        self.match(image, texts)

    def compile_blocks(self) -> None:
        """Compile the blocks of the image encoder and of the Q-Former."""
        self.visual_encoder.compile_blocks()
        self.Qformer.compile_blocks()
