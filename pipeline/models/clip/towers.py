"""CLIP's two towers as open_clip computes them, without the work that no output depends on.

The text tower is causal and its output is the row of the end token: tokens behind the end have no effect, and of the
last block only the end's row is used. So texts are cut at their end, texts of one length attend together, the
linear layers run over all their tokens packed into one matrix, and the last block computes the ends' rows only:
captions of 14 tokens in a context of 77 take a sixth of the time. The image tower's last block computes the class
token's row only. No embedding depends on the other items of its batch.

A model of another kind (a bidirectional or Hugging Face text tower, an attentional pooler, a ResNet) goes
through open_clip's own methods.

The legend of the names: B images, T texts, S texts of one length, L tokens, N packed tokens, D width, H heads,
K width of a head, E width of the embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from open_clip import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from pipeline.models.clip.blocks import ClipBlock, LastBlock, has_plain_blocks

Encoder = Callable[[Tensor], Tensor]

# Packed tokens at once: enough to keep the device busy; the MLP's intermediate values of these fit in memory.
_TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 32_768}
# Texts at once in a tower that takes every text at full length: about as many tokens.
_TEXTS_AT_ONCE = 512
# In a compiled tower lengths are rounded up to a multiple: on a GPU one more group of texts costs more than padding.
_COMPILED_LENGTH_STEP = 8


def text_encoder(model: nn.Module, *, compiled: bool = False) -> Encoder:
    """Return what computes ``model.encode_text``: the trimmed tower where that is exact, else that method.

    It takes int64 tokens on the CPU, as open_clip's tokenizers give them.

    Args:
        model: on its device already; a tower shares its weights.
        compiled: by torch.compile, once for any number of tokens.
    """
    tower = model.text if isinstance(model, CustomTextCLIP) else model
    match tower:
        case CLIP():
            pool_type, end_id, has_more = tower.text_pool_type, tower.text_eos_id, False
        case TextTransformer():
            pool_type, end_id = tower.pool_type, tower.eos_id
            has_more = tower.cls_emb is not None or tower.output_tokens
        case _:
            return _whole_texts(model)
    is_exact = (
        not has_more
        and pool_type in ("argmax", "eos")
        and _is_causal(tower.attn_mask)
        and has_plain_blocks(tower.transformer)
    )
    if not is_exact:
        return _whole_texts(model)
    return TextTower(tower, end_id if pool_type == "eos" else None, compiled=compiled).eval()


def image_encoder(model: nn.Module, *, compiled_batch: int | None = None) -> Encoder:
    """Return what computes ``model.encode_image``: the shortened tower if that is exact, else that method.

    Args:
        model: on its device already; a tower shares its weights.
        compiled_batch: compile the tower for so many images at once; fewer are padded, more are split.
    """
    visual = model.visual
    is_exact = (
        isinstance(model, CLIP | CustomTextCLIP)
        and isinstance(visual, VisionTransformer)
        and has_plain_blocks(visual.transformer)
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.output_tokens
    )
    return ImageTower(visual, compiled_batch).eval() if is_exact else model.encode_image


class TextTower(nn.Module):
    """Encode texts from their tokens, each as far as its end."""

    def __init__(self, tower: CLIP | TextTransformer, end_id: int | None, *, compiled: bool) -> None:
        """Share the tower's weights.

        Args:
            end_id: of the token that is read, the first such; None: the first largest token of a text.
            compiled: as for ``text_encoder``.
        """
        super().__init__()
        self._end_id = end_id
        self._embedding = tower.token_embedding
        self._positions_LD = tower.positional_embedding
        *blocks, last = tower.transformer.resblocks
        self._blocks = nn.ModuleList(ClipBlock(block) for block in blocks)
        self._last = LastBlock(last)
        self._norm = tower.ln_final
        self._projection = tower.text_projection
        self._tokens_at_once = _TOKENS_AT_ONCE[self._positions_LD.device.type]
        self._length_step = _COMPILED_LENGTH_STEP if compiled else 1
        if compiled:
            # The parts between two attentions, compiled once for all blocks and any number of tokens.
            for block in self._blocks:
                block.project = torch.compile(block.project, dynamic=True)
                block.finish = torch.compile(block.finish, dynamic=True)

    def forward(self, tokens_TL: Tensor) -> Tensor:
        """Return the embeddings of shape (T, E), in the order of the texts.

        Args:
            tokens_TL: int64, on the CPU, where their lengths are needed.
        """
        ends_T = self._ends(tokens_TL)
        order_T = ends_T.argsort(stable=True)
        embeddings_TE = torch.cat(
            [self._encode(tokens_TL[texts_T], ends_T[texts_T]) for texts_T in self._chunks(order_T, ends_T)]
        )
        return embeddings_TE[_moved(order_T.argsort(), embeddings_TE.device)]

    def _ends(self, tokens_TL: Tensor) -> Tensor:
        """Return the position whose row open_clip takes as the text's embedding."""
        if self._end_id is None:
            return tokens_TL.argmax(-1)
        return (tokens_TL == self._end_id).int().argmax(-1)

    def _length(self, end: int) -> int:
        """Return how many tokens are computed for a text that ends at a position."""
        # ceil((end + 1) / step) * step, at most the context's length.
        return min(-(-(end + 1) // self._length_step) * self._length_step, len(self._positions_LD))

    def _chunks(self, order_T: Tensor, ends_T: Tensor) -> Iterator[Tensor]:
        """Yield the texts from short to long, as many at once as the device takes."""
        start = num_tokens = 0
        for position, end in enumerate(ends_T[order_T].tolist()):
            length = self._length(end)
            num_tokens += length
            if num_tokens > self._tokens_at_once and position > start:
                yield order_T[start:position]
                start, num_tokens = position, length
        yield order_T[start:]

    def _encode(self, tokens_TL: Tensor, ends_T: Tensor) -> Tensor:
        """Encode texts that are sorted from short to long."""
        device, dtype = self._positions_LD.device, self._last.query.weight.dtype
        groups = _groups([self._length(end) for end in ends_T.tolist()])
        # All texts' tokens one after the other, N = sum of the lengths, with each token's position in its text.
        ids_N = torch.cat([tokens_TL[group.texts, : group.length].flatten() for group in groups])
        positions_N = torch.cat([torch.arange(group.length).repeat(group.size) for group in groups])
        # The packed index of each text's first token; that of its end is firsts + ends.
        firsts_T = torch.cat(
            [torch.arange(group.size) * group.length + group.tokens.start for group in groups]
        )
        ids_N, positions_N = _moved(torch.stack([ids_N, positions_N]), device)
        rows_T, ends_T = _moved(torch.stack([firsts_T + ends_T, ends_T]), device)
        x_ND = self._embedding(ids_N).to(dtype) + self._positions_LD.to(dtype)[positions_N]
        for block in self._blocks:
            x_ND = block.finish(x_ND, _attend_causally(block.project(x_ND), groups))
        # Last block: queries of the end rows only, which attend to the tokens up to the end (not to the padding that
        # a rounded length has).
        query_TD, keys_values_N2HK = self._last.project_read(x_ND, rows_T)
        context_TD = torch.cat(
            [
                self._last.attend(
                    query_TD[group.texts],
                    _by_sequence(keys_values_N2HK, group),
                    torch.arange(group.length, device=device) <= ends_T[group.texts, None],
                )
                for group in groups
            ]
        )
        x_TD = self._norm(self._last.finish(x_ND[rows_T], context_TD))
        if isinstance(self._projection, nn.Linear):
            return self._projection(x_TD)
        return x_TD if self._projection is None else x_TD @ self._projection


class ImageTower(nn.Module):
    """Encode images from their normalised pixels."""

    def __init__(self, visual: VisionTransformer, compiled_batch: int | None) -> None:
        """Share the tower's weights; ``compiled_batch`` as for ``image_encoder``."""
        super().__init__()
        self._visual = visual
        *blocks, last = visual.transformer.resblocks
        self.blocks = nn.ModuleList([*map(ClipBlock, blocks), LastBlock(last)])
        self._is_compiled = compiled_batch is not None
        device = visual.positional_embedding.device.type
        self._at_once = compiled_batch or max(1, _TOKENS_AT_ONCE[device] // len(visual.positional_embedding))
        if self._is_compiled:
            for block in self.blocks:
                block.compile(dynamic=False)

    def take_at_most(self, images: int) -> None:
        """Encode so many images at once from now on; compiled code is compiled anew for them."""
        self._at_once = min(self._at_once, images)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the embeddings of shape (B, E)."""
        parts = []
        for part_BCHW in pixels_BCHW.split(self._at_once):
            size = len(part_BCHW)
            if self._is_compiled and size < self._at_once:
                part_BCHW = pad(part_BCHW, (0, 0, 0, 0, 0, 0, 0, self._at_once - size))
            parts.append(self._encode(part_BCHW)[:size])
        return torch.cat(parts)

    def _encode(self, pixels_BCHW: Tensor) -> Tensor:
        x_BLD = self._visual._embeds(pixels_BCHW)
        *blocks, last = self.blocks
        for block in blocks:
            x_BLD = block(x_BLD)
        # ``last`` returns the first row, that of the class token.
        x_BD = self._visual.ln_post(last(x_BLD))
        return x_BD if self._visual.proj is None else x_BD @ self._visual.proj


@dataclass(frozen=True, slots=True)
class _Group:
    """Texts of one length, and their tokens among the packed ones."""

    texts: slice
    tokens: slice
    size: int
    length: int


def _groups(lengths: Sequence[int]) -> list[_Group]:
    """Return the runs of equal length, from short to long."""
    groups: list[_Group] = []
    text = token = 0
    for length in dict.fromkeys(lengths):
        size = lengths.count(length)
        groups.append(_Group(slice(text, text + size), slice(token, token + size * length), size, length))
        text, token = text + size, token + size * length
    return groups


def _by_sequence(packed: Tensor, group: _Group) -> Tensor:
    """Return a group's tokens of (N, ...) as (S, L, ...)."""
    return packed[group.tokens].unflatten(0, (group.size, group.length))


def _attend_causally(qkv_N3HK: Tensor, groups: Sequence[_Group]) -> Tensor:
    """Let each token attend to itself and those before it in its text; return (N, D)."""
    contexts = []
    for group in groups:
        query_SHLK, key_SHLK, value_SHLK = _by_sequence(qkv_N3HK, group).permute(2, 0, 3, 1, 4)
        context_SHLK = scaled_dot_product_attention(query_SHLK, key_SHLK, value_SHLK, is_causal=True)
        contexts.append(context_SHLK.transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(contexts)


def _whole_texts(model: nn.Module) -> Encoder:
    def encode(tokens_TL: Tensor) -> Tensor:
        device = next(model.parameters()).device
        return torch.cat([model.encode_text(part.to(device)) for part in tokens_TL.split(_TEXTS_AT_ONCE)])

    return encode


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU without waiting for work that a GPU still has."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _is_causal(mask_LL: Tensor | None) -> bool:
    return mask_LL is not None and torch.equal(mask_LL, torch.full_like(mask_LL, -torch.inf).triu(1))
