"""The Q-Former: BERT with two feed-forward networks per block, one for query tokens and one for text.

Self-attention is shared; in every second block the queries also attend to the image (BLIP-2, section 3.1;
lavis/models/blip2_models/Qformer.py). The names of the parameters are LAVIS's.

What attends to what follows from the method that is called, without a square mask:

* queries alone: each other and the image;
* text alone: itself, under a padding mask;
* text after queries (ITG): the queries' keys and values of every block, which ``queries`` returns, and the text before
  it. Queries do not attend to the text, so their pass is that of ITC;
* pairs (ITM): queries and text attend to each other.

The keys and values of an image are projected once and given to every pass. Several rows may share an image: they follow
each other, and their queries attend to its keys as one longer sequence.

The legend of the names: B rows, Q queries, L text tokens, S = Q + L, K tokens attended to, P tokens of an image,
E its width, D the Q-Former's width, H heads, d = D / H, V words.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from schemas.pretrain import QFormerConfig
from training.models.bert import Embeddings, WordHead, copy_bert_weights, initialise
from training.models.layers import Attention, FeedForwardInput, KeyValue, Residual


class QFormerBlock(nn.Module):
    """One block. Without ``text``, it has no feed-forward network for text, which stage 2 does not need."""

    def __init__(self, config: QFormerConfig, image_width: int, attends_to_image: bool, text: bool) -> None:
        super().__init__()
        self.attention = Attention(config, config.width)
        if attends_to_image:
            self.crossattention = Attention(config, image_width)
        self.attends_to_image = attends_to_image
        if text:
            self.intermediate = FeedForwardInput(config.width, config.ffn_width)
            self.output = Residual(config.ffn_width, config.width, config.dropout)
        self.intermediate_query = FeedForwardInput(config.width, config.ffn_width)
        self.output_query = Residual(config.ffn_width, config.width, config.dropout)

    def forward(
        self,
        hidden_BSD: Tensor,
        num_queries: int,
        mask: Tensor | None = None,
        image: KeyValue | None = None,
        prefix: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Apply the block to ``num_queries`` queries and the text after them; return its keys and values too."""
        hidden_BSD, key_value = self.attention(hidden_BSD, mask, prefix)
        if not num_queries:
            return self.output(self.intermediate(hidden_BSD), hidden_BSD), key_value
        # Section 3.1: after the self-attention that both share, queries attend to the image and have their own
        # feed-forward network; text has BERT's.
        queries_BQD = hidden_BSD[:, :num_queries]
        if self.attends_to_image:
            queries_BQD = self.crossattention.to_image(queries_BQD, image)  # type: ignore[arg-type]  # given, then
        queries_BQD = self.output_query(self.intermediate_query(queries_BQD), queries_BQD)
        if hidden_BSD.shape[1] == num_queries:
            return queries_BQD, key_value
        text_BLD = hidden_BSD[:, num_queries:]
        text_BLD = self.output(self.intermediate(text_BLD), text_BLD)
        return torch.cat((queries_BQD, text_BLD), dim=1), key_value


class QFormer(nn.Module):
    """The Q-Former on images of a width.

    Args:
        config: its shape.
        image_width: E.
        text: whether it has the text side (stage 1) or queries alone (stage 2).
        dtype: of the matrix products.
    """

    def __init__(
        self,
        config: QFormerConfig,
        image_width: int,
        *,
        text: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        blocks = nn.ModuleList(
            QFormerBlock(config, image_width, index % config.cross_attention_every == 0, text)
            for index in range(config.layers)
        )
        # The levels of BERT's names: "bert.encoder.layer.0", "cls.predictions".
        encoder = nn.ModuleDict({"layer": blocks})
        self.bert = nn.ModuleDict({"embeddings": Embeddings(config, text), "encoder": encoder})
        if text:
            # Its output matrix is tied to the token embeddings.
            self.cls = nn.ModuleDict({"predictions": WordHead(config)})
        self.dtype = dtype
        self.apply(partial(initialise, std=config.initializer_range))

    def project_image(self, image_BPE: Tensor) -> list[KeyValue | None]:
        """Return the keys and values of images for every block; None for the blocks without cross-attention."""
        return [
            block.crossattention.project_image(image_BPE) if block.attends_to_image else None
            for block in self.bert.encoder.layer
        ]

    def queries(
        self, query_tokens_1QD: Tensor, image: list[KeyValue | None]
    ) -> tuple[Tensor, list[KeyValue]]:
        """Compute the queries on images.

        Returns:
            The queries' outputs (B, Q, D), and their keys and values in every block, for ``captions``.
        """
        num_images = next(key_value for key_value in image if key_value is not None)[0].shape[0]
        hidden_BQD = self.bert.embeddings(query_tokens_1QD.expand(num_images, -1, -1), self.dtype)
        key_values = []
        for block, image_of_block in zip(self.bert.encoder.layer, image, strict=True):
            hidden_BQD, key_value = block(hidden_BQD, hidden_BQD.shape[1], image=image_of_block)
            key_values.append(key_value)
        return hidden_BQD, key_values

    def text(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Compute text alone: (B, L, D)."""
        hidden_BLD = self.bert.embeddings(self.bert.embeddings.of_text(ids_BL), self.dtype)
        # The mask (B, 1, 1, L) hides padding as a key from every head and every token.
        for block in self.bert.encoder.layer:
            hidden_BLD, _ = block(hidden_BLD, 0, mask_BL[:, None, None, :])
        return hidden_BLD

    def captions(self, ids_BL: Tensor, queries: list[KeyValue]) -> Tensor:
        """Compute text after queries; each token attends to the queries and to the tokens up to itself: (B, L, D).

        Padding comes last, where no token attends to it; the outputs at the padding are meaningless.
        """
        length, num_queries = ids_BL.shape[1], queries[0][0].shape[2]
        # Row i, for token i: all Q queries, and tokens 0 to i.
        mask_LK = torch.ones(length, num_queries + length, dtype=torch.bool, device=ids_BL.device)
        mask_LK = mask_LK.tril(diagonal=num_queries)
        hidden_BLD = self.bert.embeddings(self.bert.embeddings.of_text(ids_BL), self.dtype)
        for block, prefix in zip(self.bert.encoder.layer, queries, strict=True):
            hidden_BLD, _ = block(hidden_BLD, 0, mask_LK, prefix=prefix)
        return hidden_BLD

    def pairs(
        self, query_tokens_1QD: Tensor, ids_BL: Tensor, mask_BL: Tensor, image: list[KeyValue | None]
    ) -> Tensor:
        """Compute images and texts together and return the queries' outputs (B, Q, D).

        Where there are more texts than images, the texts of one image follow each other.
        """
        rows, num_queries = ids_BL.shape[0], query_tokens_1QD.shape[1]
        embedded_BSD = torch.cat(
            (query_tokens_1QD.expand(rows, -1, -1), self.bert.embeddings.of_text(ids_BL)), dim=1
        )
        # ITM (section 3.2): queries and text see each other; only padding is hidden.
        mask_BS = torch.cat((mask_BL.new_ones(rows, num_queries), mask_BL), dim=1)
        hidden_BSD = self.bert.embeddings(embedded_BSD, self.dtype)
        for block, image_of_block in zip(self.bert.encoder.layer, image, strict=True):
            hidden_BSD, _ = block(hidden_BSD, num_queries, mask_BS[:, None, None, :], image=image_of_block)
        return hidden_BSD[:, :num_queries]

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Return the logits of the next token, (T, V), in the dtype of the weights."""
        return self.cls.predictions(hidden_TD, self.bert.embeddings.word_embeddings.weight)


def initial_queries(num_queries: int, width: int, std: float = 0.02) -> nn.Parameter:
    """Return the initial query tokens (1, Q, D)."""
    return nn.Parameter(torch.empty(1, num_queries, width).normal_(std=std))


def copy_bert(qformer: QFormer, bert: Mapping[str, Tensor]) -> None:
    """Copy BERT's weights, whose names are the same; the queries' feed-forward networks get those of the text.

    [DEC] keeps its values. Raises as ``copy_bert_weights``.
    """
    copy_bert_weights(qformer, bert, lambda name: name.replace("_query", ""))
