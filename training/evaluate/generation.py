"""Text generation: captions by the Q-Former (stage 1, ITG), captions and answers by the language model (stage 2).

Both use the beam search of transformers.

The legend of the names: B images, N = B x beams rows, L tokens, Q queries, H heads, d = D / H, K = keys and values of
every block, V words, W the language model's width, S = Q + L.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from pipeline.models.checks import require_finite
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Settings of the beam search; by default the paper's for captions. Lengths count new tokens, the end included."""

    beams: int = 5
    min_tokens: int = 8
    max_tokens: int = 30
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0

    def config(self, **more: Any) -> GenerationConfig:
        """Return them as transformers' config; ``more``: the ids of begin, end and padding."""
        return GenerationConfig(
            do_sample=False,
            num_beams=self.beams,
            min_new_tokens=self.min_tokens,
            max_new_tokens=self.max_tokens,
            length_penalty=self.length_penalty,
            repetition_penalty=self.repetition_penalty,
            **more,
        )


class Stage1Generator:
    """Captions by a stage 1 model, in evaluation mode."""

    def __init__(self, stage: Stage1) -> None:
        self.stage = stage.eval()
        self._decoder = _QFormerDecoder(stage)

    @torch.no_grad()
    def caption(self, pixels_BCHW: Tensor, prompt: str, decoding: Decoding) -> list[str]:
        """Return what follows the prompt, for each image (uint8)."""
        stage, tokenizer = self.stage, self.stage.tokenizer.tokenizer
        device = stage.temp.device
        _, queries = stage.embed_images(stage.encode_pixels(pixels_BCHW.to(device)))
        begin_L = torch.tensor(
            [stage.begin_id, *tokenizer(prompt, add_special_tokens=False).input_ids], device=device
        )
        ids_BL = _generate(
            self._decoder,
            inputs=begin_L.expand(len(pixels_BCHW), -1),
            # The keys and values of all blocks as one (B, K, H, Q, d), which generate repeats for each beam.
            queries=torch.stack([part for key_value in queries for part in key_value], dim=1),
            generation_config=decoding.config(
                bos_token_id=stage.begin_id,
                eos_token_id=tokenizer.sep_token_id,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=False,
            ),
        )
        texts = tokenizer.batch_decode(ids_BL[:, len(begin_L) :], skip_special_tokens=True)
        return [text.strip() for text in texts]


class Stage2Generator:
    """Captions and answers by a stage 2 model, in evaluation mode."""

    def __init__(self, stage: Stage2) -> None:
        self.stage = stage.eval()

    def caption(self, pixels_BCHW: Tensor, prompt: str, decoding: Decoding) -> list[str]:
        """Return what follows the prompt, for each image (uint8)."""
        return self.answer(pixels_BCHW, [prompt] * len(pixels_BCHW), decoding)

    @torch.no_grad()
    def answer(self, pixels_BCHW: Tensor, prompts: Sequence[str], decoding: Decoding) -> list[str]:
        """Return what follows each prompt, given its image (uint8)."""
        language = self.stage.language
        tokenizer, shape = language.tokenizer, language.model.config
        soft_BQW = self.stage.soft_prompt(pixels_BCHW.to(self.stage.query_tokens.device))
        # Byte-level BPE joins a blank to the word that follows, so a prompt that ends in one would end in a token that
        # was never trained on.
        encoded = tokenizer(
            [prompt.rstrip(" ") for prompt in prompts],
            padding="longest",
            padding_side=language.padding_side,
            return_tensors="pt",
        ).to(soft_BQW.device)
        # The model's input is the soft prompt and then the text prompt; every query is attended to.
        inputs_BSW = torch.cat([soft_BQW, language.embed(encoded.input_ids)], dim=1)
        query_mask_BQ = encoded.attention_mask.new_ones(soft_BQW.shape[:2])
        mask_BS = torch.cat([query_mask_BQ, encoded.attention_mask], dim=1)
        ids_BL = _generate(
            language.model,
            inputs_embeds=inputs_BSW,
            attention_mask=mask_BS,
            # A rank that has finished calls the model until all ranks have, since each call needs all of them.
            synced_gpus=language.is_sharded,
            generation_config=decoding.config(
                eos_token_id=language.end_of_text_id,
                pad_token_id=shape.pad_token_id,
                decoder_start_token_id=getattr(shape, "decoder_start_token_id", None),
            ),
        )
        return [text.strip() for text in tokenizer.batch_decode(ids_BL, skip_special_tokens=True)]


CaptionModel = Stage1Generator | Stage2Generator


class _LargestLogits(LogitsProcessor):
    """Keeps the largest logit of each step, which is NaN or infinite if any logit is, without waiting for the device.

    Single logits may be minus infinity: tokens that are not allowed yet.
    """

    def __init__(self) -> None:
        self.of_step_N: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits as they are."""
        self.of_step_N.append(scores.amax(dim=-1))
        return scores


def _generate(model: Any, **arguments: Any) -> Tensor:
    """Return the tokens of ``model.generate``. Raises NotFiniteError where a logit is NaN or infinite."""
    largest = _LargestLogits()
    ids_BL = model.generate(**arguments, logits_processor=LogitsProcessorList([largest]))
    require_finite(torch.cat(largest.of_step_N), "the model's logits of words")
    return ids_BL


class _QFormerDecoder(PreTrainedModel, GenerationMixin):
    """The Q-Former's text side as a decoder for transformers' ``generate``.

    Each step computes the whole text so far, at most some thirty tokens: that is simpler than a cache, and the image is
    not computed again.
    """

    config_class = PretrainedConfig

    def __init__(self, stage: Stage1) -> None:
        super().__init__(PretrainedConfig(vocab_size=stage.config.qformer.vocab_size))
        # In a tuple, so that it is not a submodule: the weights belong to the stage.
        self._qformer = (stage.Qformer,)

    @property
    def device(self) -> torch.device:
        """Return the Q-Former's device."""
        return self._qformer[0].cls.predictions.bias.device

    def forward(self, input_ids: Tensor, queries: Tensor, **_: Any) -> CausalLMOutput:
        """Return the logits of the token after those so far, (N, 1, V); ``generate`` repeats queries for each beam."""
        qformer, parts = self._qformer[0], queries.unbind(dim=1)
        hidden_NLD = qformer.captions(input_ids, list(zip(parts[::2], parts[1::2], strict=True)))
        return CausalLMOutput(logits=qformer.logits(hidden_NLD[:, -1])[:, None])
