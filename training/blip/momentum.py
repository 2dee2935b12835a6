"""What BLIP's ITC compares with and learns from beside the step: momentum encoders and a queue (ALBEF, section 3.2).

Both change in training without a gradient, and belong to a run's checkpoint.

The legend of the names: B images and texts, N of the step over all ranks, K of the queue, P tokens of an image,
E its width, L text tokens, C width of the contrastive embeddings.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.models.layers import Linear

# Of a place of the queue that is not filled yet; hashes of uids are not negative.
_NO_ID = -1


class Encoders(nn.Module):
    """An image encoder and a text encoder, each with its projection to contrastive embeddings."""

    def __init__(
        self, visual_encoder: nn.Module, text_encoder: nn.Module, vision_proj: Linear, text_proj: Linear
    ) -> None:
        super().__init__()
        self.visual_encoder, self.vision_proj = visual_encoder, vision_proj
        self.text_encoder, self.text_proj = text_encoder, text_proj

    def embed_images(self, features_BPE: Tensor) -> Tensor:
        """Return normalised embeddings (B, C) of the features of images: by their class token."""
        return _embedded(self.vision_proj, features_BPE[:, 0])

    def embed_texts(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return normalised embeddings (B, C) of texts: by [CLS], without an image."""
        return _embedded(self.text_proj, self.text_encoder(ids_BL, mask_BL[:, None, None, :])[:, 0])


def _embedded(projection: Linear, first_BD: Tensor) -> Tensor:
    return F.normalize(projection(first_BD.to(projection.weight.dtype)), dim=-1)


class MomentumEncoders(Encoders):
    """Copies of encoders that follow them slowly; in training mode as they are, with dropout."""

    def __init__(self, online: Encoders) -> None:
        super().__init__(**{name: copy.deepcopy(part) for name, part in online.named_children()})
        self.requires_grad_(False)

    @torch.no_grad()
    def follow(self, online: Encoders, momentum: float) -> None:
        """Set each parameter to ``momentum`` times itself plus the rest of the other's; 0 copies."""
        get_ema_multi_avg_fn(momentum)(list(self.parameters()), list(online.parameters()), None)


class EmbeddingQueue(nn.Module):
    """The momentum encoders' embeddings of the latest samples of all ranks, and the samples' ids."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        for name in ("image_KC", "text_KC"):
            self.register_buffer(name, torch.zeros(size, width))
        self.register_buffer("id_K", torch.full((size,), _NO_ID))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def reset(self, seed: int) -> None:
        """Fill the queue with random directions, as BLIP's begins."""
        generator = torch.Generator().manual_seed(seed)
        for embeddings_KC in (self.image_KC, self.text_KC):
            random_KC = torch.randn(embeddings_KC.shape, generator=generator)
            embeddings_KC.copy_(F.normalize(random_KC, dim=-1))
        self.id_K.fill_(_NO_ID)
        self.pointer.zero_()

    def push(self, image_NC: Tensor, text_NC: Tensor, id_N: Tensor) -> None:
        """Put the step's embeddings in the place of the oldest ones; rows that are not finite leave those in place."""
        places_N = self.pointer + torch.arange(len(id_N), device=id_N.device)
        # A step that is not finite is skipped; in the queue, its NaN would spoil the steps after it.
        finite_N = image_NC.isfinite().all(dim=1) & text_NC.isfinite().all(dim=1)
        for stored, values in ((self.image_KC, image_NC), (self.text_KC, text_NC), (self.id_K, id_N)):
            kept = finite_N.view(-1, *(1,) * (values.ndim - 1))
            stored[places_N] = torch.where(kept, values.to(stored.dtype), stored[places_N])
        self.pointer.add_(len(id_N)).remainder_(len(self.id_K))
