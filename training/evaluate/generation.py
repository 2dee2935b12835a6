"""Text written about images: captions by the Q-Former itself (stage 1, ITG), captions and answers by the language
model (stage 2). Decoding is transformers' own beam search for both.

The legend of the names: B images, N = B x beams rows, L tokens, Q queries, H heads, d = D / H, K = keys and values of
every block, V words, W the language model's width, S = Q + L.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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

from pipeline.models.finite import require_finite
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.models.layers import KeyValue


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How text is decoded; the paper's settings for captions. Lengths are of new tokens, the end included."""

    beams: int = 5
    min_tokens: int = 8
    max_tokens: int = 30
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0

    def config(self, **more: Any) -> GenerationConfig:
        """Return transformers' form of it; ``more``: the ids of begin, end and padding."""
        return GenerationConfig(
            do_sample=False,
            num_beams=self.beams,
            min_new_tokens=self.min_tokens,
            max_new_tokens=self.max_tokens,
            length_penalty=self.length_penalty,
            repetition_penalty=self.repetition_penalty,
            **more,
        )


class CaptionModel(Protocol):
    """What captioning asks of a model."""

    def caption(self, pixels_BCHW: Tensor, prompt: str, decoding: Decoding) -> list[str]:
        """Return what follows the prompt, for each image (uint8)."""


class Stage1Generator:
    """Captions by a stage 1 model, in evaluation mode."""

    def __init__(self, stage: Stage1) -> None:
        self.stage = stage.eval()
        self._writer = _QFormerDecoder(stage)

    @torch.no_grad()
    def caption(self, pixels_BCHW: Tensor, prompt: str, decoding: Decoding) -> list[str]:
        """Return what follows the prompt, for each image (uint8)."""
        stage, words = self.stage, self.stage.tokenizer.words
        device = stage.temp.device
        _, queries = stage.embed_images(stage.encode_pixels(pixels_BCHW.to(device)))
        begin_L = torch.tensor(
            [stage.begin_id, *words(prompt, add_special_tokens=False).input_ids], device=device
        )
        ids_BL = _generate(
            self._writer,
            inputs=begin_L.expand(len(pixels_BCHW), -1),
            queries=_pack(queries),
            generation_config=decoding.config(
                bos_token_id=stage.begin_id,
                eos_token_id=words.sep_token_id,
                pad_token_id=words.pad_token_id,
                use_cache=False,
            ),
        )
        return [
            text.strip() for text in words.batch_decode(ids_BL[:, len(begin_L) :], skip_special_tokens=True)
        ]


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
        words, shape = language.tokenizer, language.model.config
        soft_BQW = self.stage.soft_prompt(pixels_BCHW.to(self.stage.query_tokens.device))
        # A decoder goes on where its prompt ends, so that padding must come before.
        side = "left" if language.name == "opt" else "right"
        read = words(list(prompts), padding="longest", padding_side=side, return_tensors="pt").to(
            soft_BQW.device
        )
        read_BSW = torch.cat([soft_BQW, language.embed(read.input_ids)], dim=1)
        mask_BS = torch.cat([read.attention_mask.new_ones(soft_BQW.shape[:2]), read.attention_mask], dim=1)
        ids_BL = _generate(
            language.model,
            inputs_embeds=read_BSW,
            attention_mask=mask_BS,
            # A rank that is through goes on calling the model until all are.
            synced_gpus=language.is_sharded,
            generation_config=decoding.config(
                eos_token_id=end_of_text(self.stage),
                pad_token_id=shape.pad_token_id,
                decoder_start_token_id=getattr(shape, "decoder_start_token_id", None),
            ),
        )
        return [text.strip() for text in words.batch_decode(ids_BL, skip_special_tokens=True)]


def end_of_text(stage: Stage2) -> int:
    """Return the token that ends a text: OPT learnt to end captions by a line break, T5 has a token for it."""
    words = stage.language.tokenizer
    return (
        words("\n", add_special_tokens=False).input_ids[-1]
        if stage.language.name == "opt"
        else words.eos_token_id
    )


class _LargestLogits(LogitsProcessor):
    """Keeps the largest logit of each step: NaN or infinity if one of them is. Nothing waits for the device.

    The others may be minus infinity: words that must not come yet.
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
    """The Q-Former's text side as transformers' ``generate`` wants a decoder.

    The text so far, at most some thirty tokens, is read anew for each token: that is cheaper to keep right than a
    cache, and the image is not read again.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, stage: Stage1) -> None:
        super().__init__(PretrainedConfig(vocab_size=stage.config.qformer.vocab_size))
        # Not a submodule: the weights stay the stage's alone.
        self._qformer = (stage.Qformer,)

    @property
    def device(self) -> torch.device:
        """Return where the Q-Former is."""
        return self._qformer[0].cls.predictions.bias.device

    def can_generate(self) -> bool:  # type: ignore[override]
        """Say that it can: transformers looks for the class's own ``prepare_inputs_for_generation``."""
        return True

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, queries: Tensor, **_: Any
    ) -> dict[str, Tensor]:
        """Pass on the tokens so far and the queries' keys and values, which ``generate`` repeats for each beam."""
        return {"input_ids": input_ids, "queries": queries}

    def forward(self, input_ids: Tensor, queries: Tensor, **_: Any) -> CausalLMOutput:
        """Return the logits of the next word, (N, 1, V)."""
        qformer = self._qformer[0]
        hidden_NLD = qformer.captions(input_ids, _unpack(queries))
        return CausalLMOutput(logits=qformer.logits(hidden_NLD[:, -1])[:, None])


def _pack(queries: list[KeyValue]) -> Tensor:
    """Join the keys and values of all blocks into one (B, K, H, Q, d)."""
    return torch.stack([part for key_value in queries for part in key_value], dim=1)


def _unpack(queries_BKHQd: Tensor) -> list[KeyValue]:
    parts = queries_BKHQd.unbind(dim=1)
    return list(zip(parts[::2], parts[1::2], strict=True))
