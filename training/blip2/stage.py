"""What both stages have: the Q-Former on a frozen image encoder, its image input and the cost of a step.

The legend of the names: B images of a micro-batch, P tokens of an image, E its width.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from schemas.pretrain import PretrainConfig
from training.distributed import World
from training.models.flops import FORWARD, TRAINED, count_flops
from training.models.layers import KeyValue, LayerNorm
from training.models.parameters import PartlyTrained
from training.models.qformer import QFormer, initial_queries
from training.models.vision import FrozenVision


class QFormerStage(PartlyTrained):
    """The Q-Former on a frozen image encoder; a stage adds its heads and its losses. The names are LAVIS's.

    Args:
        config: of the run.
        vision: the image encoder.
        world: the ranks.
        text: whether the Q-Former has its text side.
        dtype: of the Q-Former's matrix products.
    """

    def __init__(
        self,
        config: PretrainConfig,
        vision: FrozenVision,
        world: World,
        text: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        shape = config.qformer
        self.config = config
        self.world = world
        self.visual_encoder = vision
        self.ln_vision = LayerNorm(vision.width)
        self.Qformer = QFormer(shape, vision.width, text=text, dtype=dtype)
        self.query_tokens = initial_queries(shape.num_queries, shape.width, shape.initializer_range)

    @property
    def device(self) -> torch.device:
        """Return the device that the stage computes on."""
        return self.query_tokens.device

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the blocks that are compiled, each for the shapes it is called with."""
        return [*self.visual_encoder.blocks, *self.Qformer.bert.encoder.layer]

    def project(self, features_BPE: Tensor) -> list[KeyValue | None]:
        """Return the Q-Former's keys and values of image features."""
        return self.Qformer.project_image(self.ln_vision(features_BPE.to(self.Qformer.dtype)))

    def flops_per_sample(self) -> float:
        """Return the FLOP of one sample's step, without what a micro-batch computes a second time."""
        vision, size, device = self.visual_encoder, self.config.data.image_size_px, self.device

        def encode() -> None:
            vision(torch.empty(1, 3, size, size, dtype=torch.uint8, device=device))

        def train() -> None:
            self.compute_sample(
                torch.empty(1, vision.num_tokens, vision.width, dtype=vision.dtype, device=device)
            )

        return FORWARD * count_flops(encode, device) + TRAINED * count_flops(train, device)

    @abstractmethod
    def compute_sample(self, features_1PE: Tensor) -> None:
        """Compute what is trained for one image and its caption, without a loss."""
