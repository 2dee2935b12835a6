"""BLIP's text encoder and text decoder, BERTs with cross-attention in every layer, and what they share (section 3.1).

The text encoder reads a text alone, or with an image in every layer ("image-grounded"); the decoder reads an image and
the tokens before each. The keys and values of an image are projected once and given to every pass. The names of the
parameters are BLIP's (models/med.py).

The legend of the names: B rows, L text tokens, T of them with a label, P tokens of an image, E its width, D the text
models' width, V words.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from schemas.pretrain import Share, TextConfig
from training.models.bert import Embeddings, WordHead, initialise
from training.models.layers import Attention, FeedForwardInput, KeyValue, Residual

# The part of a block that the decoder has for itself.
_APART: dict[Share, str] = {
    "all": "",
    "all-but-cross-attention": "crossattention",
    "all-but-self-attention": "attention",
}


class TextBlock(nn.Module):
    """One block of BERT with cross-attention."""

    def __init__(self, config: TextConfig, image_width: int) -> None:
        super().__init__()
        self.attention = Attention(config, config.width)
        self.crossattention = Attention(config, image_width)
        self.intermediate = FeedForwardInput(config.width, config.ffn_width)
        self.output = Residual(config.ffn_width, config.width, config.dropout)

    def forward(self, hidden_BLD: Tensor, mask: Tensor, image: KeyValue | None = None) -> Tensor:
        """Apply the block; with an image, the rows of one image follow each other."""
        hidden_BLD, _ = self.attention(hidden_BLD, mask)
        if image is not None:
            hidden_BLD = self.crossattention.to_image(hidden_BLD, image)
        return self.output(self.intermediate(hidden_BLD), hidden_BLD)


class TextModel(nn.Module):
    """BERT with cross-attention to images of a width.

    Args:
        config: its shape.
        image_width: E.
        dtype: of the matrix products.
    """

    def __init__(self, config: TextConfig, image_width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        blocks = nn.ModuleList(TextBlock(config, image_width) for _ in range(config.layers))
        # The level of BERT's names: "encoder.layer.0".
        self.encoder = nn.ModuleDict({"layer": blocks})
        self.dtype = dtype
        self.apply(partial(initialise, std=config.initializer_range))

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        return self.encoder.layer

    def project_image(self, image_BPE: Tensor) -> list[KeyValue | None]:
        """Return the keys and values of images for every block."""
        return [block.crossattention.project_image(image_BPE) for block in self.blocks]

    def forward(self, ids_BL: Tensor, mask: Tensor, image: Sequence[KeyValue | None] | None = None) -> Tensor:
        """Return the last hidden state (B, L, D); ``mask`` broadcasts with (B, heads, L, L), true to attend."""
        hidden_BLD = self.embeddings(self.embeddings.of_text(ids_BL), self.dtype)
        for index, block in enumerate(self.blocks):
            hidden_BLD = block(hidden_BLD, mask, image[index] if image else None)
        return hidden_BLD


class TextDecoder(nn.Module):
    """The decoder with its head of words.

    Args:
        bert: its blocks.
        config: its shape.
        tied_head: the head's matrix is the word embeddings.
    """

    def __init__(self, bert: TextModel, config: TextConfig, tied_head: bool) -> None:
        super().__init__()
        self.bert = bert
        self.cls = nn.ModuleDict({"predictions": WordHead(config, tied_head)})
        self.cls.apply(partial(initialise, std=config.initializer_range))

    def forward(self, ids_BL: Tensor, image: list[KeyValue | None]) -> Tensor:
        """Return the last hidden state (B, L, D) of tokens that attend to the image and to those up to themselves.

        Padding comes last, where no token attends to it; the outputs at the padding are meaningless.
        """
        length = ids_BL.shape[1]
        causal_LL = torch.ones(length, length, dtype=torch.bool, device=ids_BL.device).tril()
        return self.bert(ids_BL, causal_LL, image)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Return the logits of the next token, (T, V), in the dtype of the weights."""
        return self.cls.predictions(hidden_TD, self.bert.embeddings.word_embeddings.weight)


def share_parameters(decoder: TextModel, encoder: TextModel, share: Share) -> None:
    """Make the decoder use the encoder's modules, but for those that ``share`` leaves apart.

    Attention has its output layer and that one's norm inside, so they stay apart too, as BLIP's tying leaves them.
    """
    if share == "none":
        return
    decoder.embeddings = encoder.embeddings
    for own, other in zip(decoder.blocks, encoder.blocks, strict=True):
        for name, module in other.named_children():
            if name != _APART[share]:
                setattr(own, name, module)
