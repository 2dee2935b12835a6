"""What BERT has around its blocks: embeddings, the head that predicts words, and the first values of its weights.

The legend of the names: B rows, S or L tokens, T tokens to predict, D the width, V words.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.pretrain import BertShape
from training.models.layers import NORM_EPS, LayerNorm, Linear


class Embeddings(nn.Module):
    """Token and position embeddings of text, which queries do not have; norm and dropout of both."""

    def __init__(self, config: BertShape, text: bool = True) -> None:
        super().__init__()
        if text:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.width)
            self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.LayerNorm = LayerNorm(config.width, eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def of_text(self, ids_BL: Tensor) -> Tensor:
        """Return token plus position embeddings, before the norm. Positions begin at 0, also after queries."""
        positions_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        return self.word_embeddings(ids_BL) + self.position_embeddings(positions_L)

    def forward(self, embedded_BSD: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalise and drop out."""
        return self.dropout(self.LayerNorm(embedded_BSD).to(dtype))


class _Transform(nn.Module):
    """The layer before BERT's output matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = Linear(width, width)
        self.LayerNorm = LayerNorm(width, eps=NORM_EPS)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(hidden_TD)))


class WordHead(nn.Module):
    """BERT's head, from a hidden state to the logits of words.

    Args:
        config: its shape.
        tied: its matrix is the word embeddings, which the caller gives; else a parameter of its own.
    """

    def __init__(self, config: BertShape, tied: bool = True) -> None:
        super().__init__()
        self.transform = _Transform(config.width)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder = None if tied else nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, hidden_TD: Tensor, embeddings_VD: Tensor) -> Tensor:
        """Return the logits (T, V), in the dtype of the weights."""
        # logits = transform(hidden) E^T + bias, E the word embeddings unless the matrix is the head's own.
        matrix_VD = embeddings_VD if self.decoder is None else self.decoder.weight
        logits_TV = F.linear(self.transform(hidden_TD), matrix_VD.to(hidden_TD.dtype))
        return logits_TV.to(self.bias.dtype) + self.bias


@torch.no_grad()
def copy_bert_weights(model: nn.Module, bert: Mapping[str, Tensor], bert_name: Callable[[str], str]) -> None:
    """Copy BERT's weights; the last tokens, which BERT does not have, and the cross-attention keep their values.

    BERT's token types are left out, as in LAVIS.

    Args:
        model: with text.
        bert: the state of transformers' ``BertForMaskedLM``.
        bert_name: returns BERT's name of a parameter.

    Raises:
        KeyError: BERT lacks a tensor.
        ValueError: a tensor has another shape.
    """
    for name, parameter in model.named_parameters():
        if "crossattention" in name:
            continue
        tensor = bert[bert_name(name)]
        of_words = name.endswith(("word_embeddings.weight", "predictions.bias", "decoder.weight"))
        copy_tensor(parameter.data[: len(tensor)] if of_words else parameter, tensor, name)


@torch.no_grad()
def copy_tensor(target: Tensor, tensor: Tensor, name: str) -> None:
    """Copy a tensor. Raises ValueError where it has another shape."""
    if target.shape != tensor.shape:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} in the weights and {tuple(target.shape)} in the model"
        )
    target.copy_(tensor)


def initialise(module: nn.Module, std: float) -> None:
    """Initialise as BERT: normal weights, zero biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        module.weight.data.normal_(std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        module.bias.data.zero_()
