"""Sampling N captions of each image, with the keys and values of the image projected once for all of them.

The legend of the names: B images, N samples of an image, S = B * N samples (sample = image * N + number),
T steps, R rows computed at a step, L tokens so far, P image positions, E their width, V vocabulary.

transformers' ``generate`` repeats the image for each of its samples before it decodes: keys and values of the
577 image positions are projected, stored and read ten times, and a batch runs until its longest caption ends.
Two samplers do the same arithmetic in different orders:

``RowSampler`` computes one row for each *distinct* unfinished caption: samples with the same tokens so far share a
row, ended samples have none. Shapes change from step to step. For CPUs, which are limited by arithmetic.

``GridSampler`` computes every sample of every image at every step until the last has ended. Its shapes never
change, so that a step is one CUDA graph. For GPUs, which are limited by kernel launches and memory reads.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pipeline.models.blip.decoder import BlipDecoder
from pipeline.models.blip.nucleus import Nucleus, draw, is_finite, nucleus
from schemas.config import CaptionConfig

NO_TOKEN = -1
# In place of a token of a sample whose logits were NaN or infinite. It is returned with the tokens, so that the
# host need not synchronise with the device at every step.
NOT_FINITE = -2


class RowSampler:
    """Sample captions, computing only what is unfinished and distinct."""

    def __init__(self, decoder: BlipDecoder, prompt_ids: Sequence[int], config: CaptionConfig) -> None:
        self.decoder = decoder
        self.prompt_ids = list(prompt_ids)
        self.config = config

    @torch.inference_mode()
    def __call__(self, image_BPE: Tensor, uniforms_BNT: Tensor) -> Tensor:
        """Return the tokens after the prompt, the end included: int64 (B, N, T), NO_TOKEN behind the end.

        A sample whose logits were not finite holds NOT_FINITE.

        Args:
            image_BPE: of the vision tower.
            uniforms_BNT: float64 in [0, 1), one for each token that may be sampled.
        """
        num_images, num_samples, num_steps = uniforms_BNT.shape
        decoder, length = self.decoder, len(self.prompt_ids)
        # (layers, 2, B, H, P, d), contiguous, because every step reads all of it.
        image_kv = decoder.image_keys_values(image_BPE).contiguous()
        logits_RV, prefix_kv = decoder.prefix(self.prompt_ids, image_kv)
        # Self-attention's keys and values, one row for each image at first: (layers, 2, R, H, L, d).
        cache = prefix_kv.new_empty(*prefix_kv.shape[:4], length + num_steps, prefix_kv.shape[5])
        cache[..., :length, :] = prefix_kv
        tokens_RL = torch.tensor(self.prompt_ids, device=image_BPE.device).expand(num_images, -1)
        image_R = torch.arange(num_images, device=image_BPE.device)
        sample_S = torch.arange(num_images * num_samples, device=image_BPE.device)
        # The row that holds each unfinished sample's tokens; before the first step, that of its image.
        row_S = sample_S // num_samples
        uniforms_ST = uniforms_BNT.flatten(0, 1)
        tokens_ST = torch.full_like(uniforms_ST, NO_TOKEN, dtype=torch.long)
        for step in range(num_steps):
            # The distribution is computed once a row, and drawn from once a sample.
            choice = nucleus(logits_RV, tokens_RL, length + step, decoder.end_id, self.config)
            token_S = draw(Nucleus(*(part[row_S] for part in choice)), uniforms_ST[sample_S, step])
            tokens_ST[sample_S, step] = token_S.where(is_finite(choice)[row_S], NOT_FINITE)
            active_S = token_S != decoder.end_id
            if step + 1 == num_steps or not active_S.any():
                break
            sample_S = sample_S[active_S]
            # The next rows are the distinct pairs (row, token) of the active samples. key = row * V + token makes
            # a pair one integer; sorted keys keep the rows of an image together.
            key_S = row_S[active_S] * decoder.vocabulary + token_S[active_S]
            key_R, row_S = key_S.unique(return_inverse=True)
            parent_R, token_R = key_R // decoder.vocabulary, key_R % decoder.vocabulary
            image_R = image_R[parent_R]
            tokens_RL = torch.cat([tokens_RL[parent_R], token_R[:, None]], dim=1)
            cache = _reorder(cache, parent_R, length + step)
            logits_RV = self._step(token_R, image_R, length + step, cache, image_kv)
        return tokens_ST.view(num_images, num_samples, num_steps)

    def _step(
        self, token_R: Tensor, image_R: Tensor, position: int, cache: Tensor, image_kv: Tensor
    ) -> Tensor:
        """Return the logits after one more token of each row; ``image_R`` is sorted."""
        decoder = self.decoder
        images, counts = image_R.unique_consecutive(return_counts=True)
        bounds = [0, *counts.cumsum(0).tolist()]
        spans = list(zip(images.tolist(), pairwise(bounds), strict=True))

        def attend_image(layer: int, query_RD: Tensor) -> Tensor:
            # One attention for each image: rows need no padding to the image with most rows, and an image without
            # rows costs nothing.
            keys, values = image_kv[layer]
            return torch.cat(
                [
                    decoder.attend_grid(
                        query_RD[start:stop], keys[image : image + 1], values[image : image + 1]
                    )
                    for image, (start, stop) in spans
                ]
            )

        hidden_RD = decoder.embed(token_R, torch.tensor(position, device=token_R.device))
        return decoder.logits(decoder.hidden(hidden_RD, _attend_cache(cache, position), attend_image))


class GridSampler:
    """Sample captions of at most ``num_images`` images at once, in shapes that never change.

    The first call captures; later ones replay. On a CPU it computes the same without graphs.
    """

    def __init__(
        self, decoder: BlipDecoder, prompt_ids: Sequence[int], config: CaptionConfig, num_images: int
    ) -> None:
        self.decoder = decoder
        self.prompt_ids = list(prompt_ids)
        self.config = config
        self.num_images = num_images
        self.num_steps = config.max_length - len(prompt_ids)
        device = decoder.device
        num_rows = num_images * config.num_captions
        self._uniforms_ST = torch.zeros(num_rows, self.num_steps, dtype=torch.float64, device=device)
        self._tokens_SL = torch.zeros(num_rows, config.max_length, dtype=torch.long, device=device)
        self._tokens_SL[:, : len(prompt_ids)] = torch.tensor(self.prompt_ids, device=device)
        self._ended_S = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._broken_S = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._image_kv: list[Tensor] = []
        self._cache: Tensor | None = None
        self._graphs: dict[int, Callable[[], None]] = {}
        if device.type == "cuda":
            # One side stream for all captures: cuBLAS keeps a workspace for every stream that it has seen.
            self._side_stream = torch.cuda.Stream()
            # Steps never overlap in time, so all graphs share one memory pool.
            self._pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def __call__(self, image_BPE: Tensor, uniforms_BNT: Tensor) -> Tensor:
        """As ``RowSampler.__call__``; B may be under ``num_images``."""
        num_images, num_samples, _ = uniforms_BNT.shape
        num_rows = num_images * num_samples
        self._uniforms_ST[:num_rows] = uniforms_BNT.flatten(0, 1).to(self._uniforms_ST.device)
        self._keep_images(image_BPE)
        self._begin()
        for step in range(1, self.num_steps):
            # Reading this flag waits for the GPU, so it is read at every fourth step only.
            if step % 4 == 0 and bool(self._ended_S[:num_rows].all()):
                break
            self._replay(step)
        tokens_ST = self._tokens_SL[:num_rows, len(self.prompt_ids) :].clone()
        ends_ST = tokens_ST == self.decoder.end_id
        # cumsum - 1 at an end counts the ends before it: positive after the first end of a sample. That also covers
        # tokens of an earlier batch behind an early break, which happens only once every sample has ended.
        tokens_ST[(ends_ST.cumsum(1) - ends_ST.long()) > 0] = NO_TOKEN
        tokens_ST.masked_fill_(self._broken_S[:num_rows, None], NOT_FINITE)
        return tokens_ST.view(num_images, num_samples, self.num_steps)

    def _keep_images(self, image_BPE: Tensor) -> None:
        """Project the images into the buffers; of a smaller batch, the buffers' other images keep their old values."""
        for layer in range(len(self.decoder.layers)):
            projected = self.decoder.image_keys_values(image_BPE, layer)
            if len(self._image_kv) == layer:
                shape = (2, self.num_images, *projected.shape[2:])
                self._image_kv.append(projected.new_zeros(shape))
            self._image_kv[layer][:, : len(image_BPE)] = projected

    def _begin(self) -> None:
        """Run the prompt and draw the first token of every sample."""
        length, num_samples = len(self.prompt_ids), self.config.num_captions
        logits_BV, prefix_kv = self.decoder.prefix(self.prompt_ids, self._image_kv)
        if self._cache is None:
            layers, two, _, heads, _, width = prefix_kv.shape
            self._cache = prefix_kv.new_zeros(
                layers, two, len(self._tokens_SL), heads, self.config.max_length, width
            )
        by_image = self._cache.unflatten(2, (self.num_images, num_samples))
        by_image[..., :length, :] = prefix_kv.unsqueeze(3)
        choice = nucleus(
            logits_BV, self._tokens_SL[::num_samples, :length], length, self.decoder.end_id, self.config
        )
        self._ended_S.zero_()
        self._broken_S.zero_()
        self._append(0, Nucleus(*(part.repeat_interleave(num_samples, dim=0) for part in choice)))

    def _advance(self, step: int) -> None:
        """Compute the token of ``step`` for every row."""
        decoder, position = self.decoder, len(self.prompt_ids) + step - 1
        assert self._cache is not None

        def attend_image(layer: int, query_RD: Tensor) -> Tensor:
            return decoder.attend_grid(query_RD, *self._image_kv[layer])

        hidden_RD = decoder.embed(
            self._tokens_SL[:, position], torch.full((), position, device=self._tokens_SL.device)
        )
        hidden_RD = decoder.hidden(hidden_RD, _attend_cache(self._cache, position), attend_image)
        length = position + 1
        logits_RV = decoder.logits(hidden_RD)
        self._append(
            step, nucleus(logits_RV, self._tokens_SL[:, :length], length, decoder.end_id, self.config)
        )

    def _append(self, step: int, choice: Nucleus) -> None:
        """Draw the token of ``step`` for every sample, ended ones included."""
        token_S = draw(choice, self._uniforms_ST[:, step])
        self._tokens_SL[:, len(self.prompt_ids) + step] = token_S
        # Logits behind a sample's end do not count.
        self._broken_S |= ~(is_finite(choice) | self._ended_S)
        self._ended_S |= token_S == self.decoder.end_id

    def _replay(self, step: int) -> None:
        if not self._tokens_SL.is_cuda:
            return self._advance(step)
        if step not in self._graphs:
            self._graphs[step] = self._capture(step)
        self._graphs[step]()

    def _capture(self, step: int) -> Callable[[], None]:
        """Capture the step as a CUDA graph; return its launch.

        The step runs once before the capture, for what compiles or allocates at its first use. It writes the same
        token and cache entries again in the graph; only ``_ended_S`` accumulates, and is restored.
        """
        ended_S = self._ended_S.clone()
        self._side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side_stream):
            self._advance(step)
        torch.cuda.current_stream().wait_stream(self._side_stream)
        self._ended_S.copy_(ended_S)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may pin memory during the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._advance(step)
        return graph.replay


def _reorder(cache: Tensor, parent_R: Tensor, length: int) -> Tensor:
    """Return the cache with the rows ``parent_R`` of it, in that order; the same tensor where nothing changes."""
    if len(parent_R) == cache.shape[2] and bool((parent_R.diff() == 1).all()):
        return cache
    reordered = cache.new_empty(*cache.shape[:2], len(parent_R), *cache.shape[3:])
    reordered[..., :length, :] = cache[..., :length, :].index_select(2, parent_R)
    return reordered


def _attend_cache(cache: Tensor, position: int) -> Callable[[int, Tensor], Tensor]:
    """Return self-attention of the token at ``position``, which keeps its keys and values in the cache."""

    def attend(layer: int, projected_RM: Tensor) -> Tensor:
        heads, width = cache.shape[3], cache.shape[5]
        q_RHd, k_RHd, v_RHd = projected_RM.view(-1, 3, heads, width).unbind(1)
        keys, values = cache[layer]
        keys[:, :, position], values[:, :, position] = k_RHd, v_RHd
        # softmax(q K^T / sqrt(d)) V over the tokens up to this one: causal without a mask.
        until = slice(0, position + 1)
        context_RH1d = scaled_dot_product_attention(
            q_RHd.unsqueeze(2), keys[:, :, until], values[:, :, until]
        )
        return context_RH1d.flatten(1)

    return attend
