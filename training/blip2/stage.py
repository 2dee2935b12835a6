"""What both stages have: the Q-Former on a frozen image encoder, its image input and the cost of a step.

The legend of the names: B images of a micro-batch, P tokens of an image, E its width.
"""

from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from schemas.pretrain import PretrainConfig
from training.distributed import World
from training.models.flops import FORWARD, TRAINED, count_flops
from training.models.layers import KeyValue, LayerNorm
from training.models.parameters import PartlyTrained
from training.models.qformer import QFormer, initial_queries
from training.models.vision import FrozenVision

if TYPE_CHECKING:
    from training.data.loader import Batch


class QFormerStage(PartlyTrained):
    """The Q-Former on a frozen image encoder; a stage adds its heads and its losses. The names are LAVIS's.

    Args:
        config: of the run.
        vision: the image encoder; the Q-Former's matrix products have its dtype too.
        world: the ranks.
        text: whether the Q-Former has its text side.
    """

    def __init__(self, config: PretrainConfig, vision: FrozenVision, world: World, text: bool) -> None:
        super().__init__()
        shape = config.qformer
        self.config = config
        self.world = world
        self.visual_encoder = vision
        self.ln_vision = LayerNorm(vision.width)
        self.Qformer = QFormer(shape, vision.width, text=text, dtype=vision.dtype)
        self.query_tokens = initial_queries(shape.num_queries, shape.width, shape.initializer_range)
        # Features of the next step's micro-batches, by the position of its batch and their index.
        self._ahead: dict[tuple[int, int], Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Return the device that the stage computes on."""
        return self.query_tokens.device

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the blocks that are compiled, each for the shapes it is called with."""
        return [*self.visual_encoder.blocks, *self.Qformer.bert.encoder.layer]

    def encode_ahead(self, batch: "Batch", micro_batch_size: int) -> None:
        """Encode the images of the next step: the encoder is frozen, so that this waits for no weight."""
        rows_of_each = self.micro_batch_rows(len(batch.uids), micro_batch_size)
        self._ahead = {
            (batch.position, index): self._encode(batch.pixels_BCHW[rows])
            for index, rows in enumerate(rows_of_each)
        }

    def micro_batch_rows(self, count: int, micro_batch_size: int) -> list[slice]:
        """Return the rows of each micro-batch of this rank's ``count`` images; the last one may be smaller."""
        return [slice(start, start + micro_batch_size) for start in range(0, count, micro_batch_size)]

    def features(self, pixels_BCHW: Tensor, position: int, index: int) -> Tensor:
        """Return the features (B, P, E) of a micro-batch's images, which may have been encoded ahead.

        Args:
            pixels_BCHW: the images.
            position: of the step's batch.
            index: of the micro-batch.
        """
        known = self._ahead.pop((position, index), None)
        return self._encode(pixels_BCHW) if known is None else known

    def _encode(self, pixels_BCHW: Tensor) -> Tensor:
        return self.visual_encoder(pixels_BCHW.to(self.device, non_blocking=True))

    def project(self, features_BPE: Tensor) -> list[KeyValue | None]:
        """Return the Q-Former's keys and values of image features."""
        return self.Qformer.project_image(self.ln_vision(features_BPE.to(self.Qformer.dtype)))

    def flops_per_sample(self) -> float:
        """Return the FLOP of one sample's step, without what a micro-batch computes a second time."""
        vision, size, device = self.visual_encoder, self.config.data.image_size_px, self.device
        pixels = partial(torch.empty, 1, 3, size, size, dtype=torch.uint8, device=device)
        features = partial(torch.empty, 1, vision.num_tokens, vision.width, dtype=vision.dtype, device=device)
        encoded = count_flops(lambda: vision(pixels()), device)
        return FORWARD * encoded + TRAINED * count_flops(lambda: self.compute_sample(features()), device)

    @abstractmethod
    def compute_sample(self, features_1PE: Tensor) -> None:
        """Compute what is trained for one image and its caption, without a loss."""
