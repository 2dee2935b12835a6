"""Stage 2: the Q-Former learns to give a frozen language model what it needs of an image (BLIP-2, section 3.3).

The queries' outputs, projected to the language model's width, come before the text as a soft prompt; the loss is the
language model's own. Trained are the Q-Former without its text parts, the queries, ``ln_vision`` and the projection.

The legend of the names: B images of a micro-batch, P tokens of an image, E its width, Q queries, D the Q-Former's
width, W the language model's.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.rng import seed_for
from schemas.pretrain import PretrainConfig
from training.blip2.stage import QFormerStage
from training.distributed import World, rank_rows
from training.models.flops import THROUGH, count_flops
from training.models.language import DecoderOnly, EncoderDecoder, Target, empty_language
from training.models.layers import Linear
from training.models.vision import FrozenVision

if TYPE_CHECKING:
    from training.data.loader import Batch


class Stage2(QFormerStage):
    """The Q-Former between a frozen image encoder and a frozen language model.

    Args:
        config: of the run.
        vision: the image encoder.
        language: the language model.
        world: the ranks.
    """

    def __init__(
        self,
        config: PretrainConfig,
        vision: FrozenVision,
        language: DecoderOnly | EncoderDecoder,
        world: World,
    ) -> None:
        super().__init__(config, vision, world, text=False)
        # "opt_proj" or "t5_proj", as in LAVIS.
        self.projection_name = f"{language.name}_proj"
        self.add_module(self.projection_name, Linear(config.qformer.width, language.width))
        self.language = language

    def soft_prompt(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the language model's input for images: (B, Q, W)."""
        return self._prompt(self.visual_encoder(pixels_BCHW)).to(self.language.dtype)

    def _prompt(self, features_BPE: Tensor) -> Tensor:
        hidden_BQD, _ = self.Qformer.queries(self.query_tokens, self.project(features_BPE))
        return self.get_submodule(self.projection_name)(hidden_BQD)

    def training_step(self, batch: "Batch", micro_batch_size: int) -> dict[str, Tensor]:
        """Compute the language model's loss, the mean over the step's tokens, and its gradient; see the base class."""
        seed = seed_for(self.config.run.seed, batch.position)
        micro_batches = self.micro_batch_rows(len(batch.uids), micro_batch_size)
        targets = [
            self.language.target(batch.captions[rows], batch.uids[rows], seed) for rows in micro_batches
        ]
        pixels = [batch.pixels_BCHW[rows] for rows in micro_batches]
        return self.step(pixels, targets, batch.position)

    def micro_batch_rows(self, count: int, micro_batch_size: int) -> list[slice]:
        """Return the rows of this rank's micro-batches: as many on every rank where a forward pass needs all ranks."""
        slices = super().micro_batch_rows(count, micro_batch_size)
        if not self.language.is_sharded:
            return slices
        # A rank may have an image fewer than others, and so a micro-batch fewer: its images are divided anew.
        largest = max(self.world.gather_counts(count))
        number = -(-largest // micro_batch_size)
        return slices if len(slices) == number else [rank_rows(count, part, number) for part in range(number)]

    def step(self, pixels: Sequence[Tensor], targets: Sequence[Target], position: int) -> dict[str, Tensor]:
        """Do ``training_step`` on tokens, which are on the CPU; one entry for each micro-batch.

        Args:
            position: a number that no other step of the run has.
        """
        device, dtype = self.device, self.query_tokens.dtype
        num_tokens = self.world.sum(
            torch.tensor(float(sum(target.num_tokens for target in targets)), device=device, dtype=dtype)
        )
        total = torch.zeros((), device=device, dtype=dtype)
        for index, (pixels_BCHW, target) in enumerate(zip(pixels, targets, strict=True)):
            features_BPE = self.features(pixels_BCHW, position, index)
            torch.manual_seed(seed_for("dropout", self.config.run.seed, position, self.world.rank, index))
            prompt_BQW = self._prompt(features_BPE)
            # d(sum / n) / d(prompt) = (d(sum) / d(prompt)) / n: the sum's gradient goes through the language model and
            # is divided behind it. Divided before, it would be too small for float16.
            leaf_BQW = prompt_BQW.detach().requires_grad_()
            loss = self.language.loss(leaf_BQW.to(self.language.dtype), target)
            loss.backward()
            if index == len(targets) - 1:
                self.begin_last_passes()
            prompt_BQW.backward(leaf_BQW.grad / num_tokens)
            total += loss.detach() / num_tokens
        return {"loss": self.world.sum(total)}

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the blocks that are compiled, the language model's too."""
        return [*super().blocks, *self.language.blocks]

    def compute_sample(self, features_1PE: Tensor) -> None:
        """Compute the soft prompt of one image."""
        self._prompt(features_1PE)

    def flops_per_sample(self) -> float:
        """Return the FLOP of one sample's step, its caption of usual length."""
        return super().flops_per_sample() + THROUGH * count_flops(self._pass_through_language)

    def _pass_through_language(self) -> None:
        # On a copy on "meta": a forward pass of a model that is sharded over the ranks needs all of them. Its tensors
        # count as fake ones all the same, since transformers asks a mask on "meta" for its values.
        copy = empty_language(self.language.config, "meta")
        shape = (1, self.config.qformer.num_queries, copy.width)
        copy.typical_forward(torch.empty(shape, dtype=copy.dtype, device="meta"))
