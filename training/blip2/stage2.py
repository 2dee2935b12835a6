"""Stage 2: the Q-Former learns to give a frozen language model what it needs of an image (BLIP-2, section 3.3).

The queries' outputs, projected to the language model's width, come before the text as a soft prompt; the loss is the
language model's own. Trained are the Q-Former without its text parts, the queries, ``ln_vision`` and the projection.

The legend of the names: B images of a micro-batch, P tokens of an image, E its width, Q queries, D the Q-Former's
width, W the language model's.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.rng import seed_for
from schemas.pretrain import PretrainConfig
from training.distributed import World
from training.models.flops import FORWARD, THROUGH, TRAINED, count_flops
from training.models.language import Decoder, EncoderDecoder, Target, empty_language
from training.models.layers import LayerNorm, Linear
from training.models.parameters import PartlyTrained
from training.models.qformer import QFormer, initial_queries
from training.models.vision import FrozenVision

if TYPE_CHECKING:
    from training.data.loader import Batch


class Stage2(PartlyTrained):
    """The Q-Former between a frozen image encoder and a frozen language model.

    Args:
        config: of the run.
        vision: the image encoder.
        language: the language model.
        world: the ranks.
        dtype: of the Q-Former's matrix products; None: that of its weights.
    """

    def __init__(
        self,
        config: PretrainConfig,
        vision: FrozenVision,
        language: Decoder | EncoderDecoder,
        world: World,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = config.qformer
        self.config = config
        self.world = world
        self.visual_encoder = vision
        self.ln_vision = LayerNorm(vision.width)
        self.Qformer = QFormer(shape, vision.width, text=False, dtype=dtype)
        self.query_tokens = initial_queries(shape.num_queries, shape.width, shape.initializer_range)
        self.projection_name = f"{language.name}_proj"
        # "opt_proj" or "t5_proj", as in LAVIS.
        self.add_module(self.projection_name, Linear(shape.width, language.width))
        self.language = language

    def soft_prompt(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the language model's input for images: (B, Q, W)."""
        return self._prompt(self.visual_encoder(pixels_BCHW)).to(self.language.dtype)

    def _prompt(self, features_BPE: Tensor) -> Tensor:
        image = self.Qformer.project_image(self.ln_vision(features_BPE.to(self.Qformer.dtype)))
        hidden_BQD, _ = self.Qformer.queries(self.query_tokens, image)
        return self.get_submodule(self.projection_name)(hidden_BQD)

    def training_step(self, batch: "Batch", micro_batch_size: int) -> dict[str, Tensor]:
        """Add to ``.grad`` what this rank has of the gradient of the step's mean loss; set torch's generators.

        The mean is over the tokens of the whole step. The sum over the ranks is the gradient.

        Returns:
            The loss of the whole step, the same on every rank.
        """
        size = micro_batch_size or len(batch.uids)
        seed = seed_for(self.config.run.seed, batch.position)
        micro_batches = [slice(start, start + size) for start in range(0, len(batch.uids), size)]
        targets = [
            self.language.target(batch.captions[rows], batch.uids[rows], seed) for rows in micro_batches
        ]
        pixels = [batch.pixels_BCHW[rows] for rows in micro_batches]
        return self.step(pixels, targets, batch.position)

    def step(self, pixels: Sequence[Tensor], targets: Sequence[Target], position: int) -> dict[str, Tensor]:
        """Do ``training_step`` on tokens, which are on the CPU; one entry for each micro-batch.

        Args:
            position: a number that no other step of the run has.
        """
        device, dtype = self.query_tokens.device, self.query_tokens.dtype
        num_tokens = self.world.sum(
            torch.tensor(float(sum(target.num_tokens for target in targets)), device=device, dtype=dtype)
        )
        total = torch.zeros((), device=device, dtype=dtype)
        for index, (pixels_BCHW, target) in enumerate(zip(pixels, targets, strict=True)):
            features_BPE = self.visual_encoder(pixels_BCHW.to(device, non_blocking=True))
            torch.manual_seed(seed_for("dropout", self.config.run.seed, position, self.world.rank, index))
            prompt_BQW = self._prompt(features_BPE)
            # d(sum / n) / d(prompt) = (d(sum) / d(prompt)) / n: the sum's gradient goes through the language model and
            # is divided behind it. Divided before, it would be too small for float16.
            leaf_BQW = prompt_BQW.detach().requires_grad_()
            loss = self.language.loss(leaf_BQW.to(self.language.dtype), target)
            loss.backward()
            prompt_BQW.backward(leaf_BQW.grad / num_tokens)
            total += loss.detach() / num_tokens
        return {"loss": self.world.sum(total)}

    # -- cost ---------------------------------------------------------------------------------------------------

    def flops_per_sample(self) -> float:
        """Return the FLOP of one sample's step, its caption of usual length."""
        return (
            FORWARD * count_flops(self._flops_of_vision)
            + TRAINED * count_flops(self._flops_of_qformer)
            + THROUGH * count_flops(self._flops_of_language)
        )

    def _flops_of_vision(self) -> None:
        size, device = self.config.data.image_size_px, self.query_tokens.device
        self.visual_encoder(torch.empty(1, 3, size, size, dtype=torch.uint8, device=device))

    def _flops_of_qformer(self) -> None:
        vision, device = self.visual_encoder, self.query_tokens.device
        self._prompt(torch.empty(1, vision.num_tokens, vision.width, dtype=vision.dtype, device=device))

    def _flops_of_language(self) -> None:
        # On a copy on "meta": a forward pass of a model that is sharded over the ranks needs all of them.
        copy = empty_language(self.language.config, "meta")
        shape = (1, self.config.qformer.num_queries, copy.width)
        copy.typical_forward(torch.empty(shape, dtype=copy.dtype, device="meta"))

    def compile_blocks(self) -> None:
        """Compile the blocks of the image encoder, the Q-Former and the language model."""
        self.visual_encoder.compile_blocks()
        self.Qformer.compile_blocks()
        for block in self.language.blocks:
            block.compile(dynamic=False)
