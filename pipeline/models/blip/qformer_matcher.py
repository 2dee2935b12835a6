"""A stage 1 of BLIP-2 as a filter: the logits of its image-text matching (ITM) head (BLIP-2, section 3.1).

The Q-Former's queries and a text attend to each other, the queries read the image in every second layer, and the head
reads each query; a text's logits are the mean over them. Here an image is encoded once for all of its texts, its keys
and values are projected once, and the texts are packed, as for BLIP's own filter (``matcher``).

The legend of the names: B images, P image positions, E their width, T texts, N queries, L tokens of the longest text,
R rows (tokens of all texts), S = T * N rows of queries, Q those of an image's texts, H heads, d their width, D = H * d.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Blip2ForImageTextRetrieval
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerLayer

from pipeline.models.blip.packing import Packing, padded
from pipeline.models.blip.text_layers import join_heads, stacked_linear
from pipeline.models.blip.vision import ImageKeysValues


class _Layer(nn.Module):
    """A layer of a Q-Former whose queries, keys and values of self-attention are one matrix product."""

    def __init__(self, layer: Blip2QFormerLayer) -> None:
        super().__init__()
        self.parts = layer
        own = layer.attention.attention
        self.qkv = stacked_linear((own.query, own.key, own.value), few_rows=False)


class QFormerMatchEncoder(nn.Module):
    """The Q-Former of a BLIP-2 stage 1 with its ITM head; for inference alone."""

    def __init__(self, model: Blip2ForImageTextRetrieval) -> None:
        super().__init__()
        self.queries, self.embeddings, self.head = model.query_tokens, model.embeddings, model.itm_head
        self.norm = model.qformer.layernorm
        self.num_heads = model.config.qformer_config.num_attention_heads
        self.layers = nn.ModuleList(_Layer(layer) for layer in model.qformer.encoder.layer)
        self.image_keys_values = ImageKeysValues(
            [
                layer.crossattention.attention
                for layer in model.qformer.encoder.layer
                if layer.has_cross_attention
            ]
        )

    @torch.inference_mode()
    def forward(self, image_BPE: Tensor, tokens: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """Return the logits (no match, match) of every text, in float32: (T, 2), image by image.

        Args:
            image_BPE: of the vision tower.
            tokens: of each text of each image; every image has a text.
        """
        packing = Packing.of(tokens, image_BPE.device)
        num_texts, num_tokens = len(packing.first_T), len(packing.tokens_R)
        num_queries = self.queries.shape[1]
        _, slots_BQ, places_S = padded((packing.texts_B * num_queries).to(image_BPE.device))
        is_query_TN = packing.is_token_TL.new_ones(num_texts, num_queries)
        # Every row of a text reads its queries and its tokens.
        is_read_T1M = torch.cat((is_query_TN, packing.is_token_TL), dim=1)[:, None, None]
        keys_values = iter(self.image_keys_values(image_BPE))

        def attend(projected_KM: Tensor) -> Tensor:
            # Rows of queries and then of texts, padded by text for the attention alone: (S + R, 3D) to (S + R, D).
            query_SM, text_RM = projected_KM.split([len(places_S), num_tokens])
            query_TNM = query_SM.unflatten(0, (num_texts, num_queries))
            padded_TLM = torch.cat((query_TNM, text_RM[packing.slots_TL]), dim=1)
            q_THLd, k_THLd, v_THLd = padded_TLM.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            context_THLd = scaled_dot_product_attention(q_THLd, k_THLd, v_THLd, is_read_T1M)
            context_TLD = context_THLd.transpose(1, 2).flatten(2)
            of_queries_TND, of_text_TLD = context_TLD.tensor_split([num_queries], dim=1)
            return torch.cat((of_queries_TND.flatten(0, 1), of_text_TLD.flatten(0, 1)[packing.places_R]))

        def attend_image(query_SD: Tensor) -> Tensor:
            # All queries of an image's texts are the query axis of one attention: (B, H, Q, d) x (B, H, P, d).
            k_BHPd, v_BHPd = next(keys_values)
            q_BHQd = query_SD[slots_BQ].unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            return join_heads(scaled_dot_product_attention(q_BHQd, k_BHPd, v_BHPd))[places_S]

        table = self.embeddings
        text_RD = table.word_embeddings(packing.tokens_R) + table.position_embeddings(packing.position_R)
        query_SD = self.queries.to(text_RD.dtype).expand(num_texts, -1, -1).flatten(0, 1)
        rows_KD = self.norm(torch.cat((query_SD, text_RD)))
        for layer in self.layers:
            parts = layer.parts
            # Post-norm, as BERT: norm(x + W_o context).
            rows_KD = parts.attention.output(attend(layer.qkv(rows_KD)), rows_KD)
            query_SD, text_RD = rows_KD.split([len(places_S), num_tokens])
            if parts.has_cross_attention:
                cross = parts.crossattention
                query_SD = cross.output(attend_image(cross.attention.query(query_SD)), query_SD)
            # Queries and texts have feed-forwards of their own; behind the last layer only the queries are read.
            query_SD = parts.feed_forward_chunk_query(query_SD)
            if layer is not self.layers[-1]:
                rows_KD = torch.cat((query_SD, parts.feed_forward_chunk(text_RD)))
        return self.head(query_SD).float().unflatten(0, (num_texts, num_queries)).mean(dim=1)
