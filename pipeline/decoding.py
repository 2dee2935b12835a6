"""Sampling captions from BLIP's text decoder: which token follows, and the loop that asks for it.

The legend of the names: B images, N samples of an image, R = B * N rows (row = image * N + sample), L tokens
so far, T steps, V vocabulary, K tokens that may be chosen, D width.

Nucleus sampling as BLIP does it, in transformers' order: repetition penalty, minimum length, temperature,
top-k, top-p. The choice among what is left is the inverse of the cumulative distribution *in vocabulary
order* at a given uniform number, so that one number a step decides, and two logits that swap places in a sort
by rounding alone do not change the outcome.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration, GenerationConfig, LogitsProcessor, LogitsProcessorList

from schemas.config import CaptionConfig


def choose_tokens(
    logits_RV: Tensor, tokens_RL: Tensor, uniforms_R: Tensor, end_id: int, config: CaptionConfig
) -> Tensor:
    """Return the next token of each row: int64 of shape (R,).

    Args:
        logits_RV: of the next token.
        tokens_RL: what was said so far, start and prompt included; as in BLIP, the penalty is on all of it.
        uniforms_R: float64 in [0, 1).
        end_id: the token that ends a caption; not chosen before ``config.min_length`` tokens are there.
        config: every knob is read from here, none from the model's files.
    """
    logits_RV = logits_RV.float()
    if config.repetition_penalty != 1:
        said_RL = logits_RV.gather(1, tokens_RL)
        penalised_RL = torch.where(
            said_RL < 0, said_RL * config.repetition_penalty, said_RL / config.repetition_penalty
        )
        logits_RV = logits_RV.scatter(1, tokens_RL, penalised_RL)
    if tokens_RL.shape[1] < config.min_length:
        logits_RV = logits_RV.index_fill(1, torch.tensor([end_id], device=logits_RV.device), -torch.inf)
    # top-k first: the nucleus of 50 values needs no sort of 30,524.
    num_kept = min(config.top_k or logits_RV.shape[1], logits_RV.shape[1])
    logits_RK, ids_RK = (logits_RV / config.temperature).topk(num_kept)
    probabilities_RK = logits_RK.double().softmax(-1)
    # A token stays while those before it, likelier ones, hold less than top_p: the first always does.
    before_RK = probabilities_RK.cumsum(-1) - probabilities_RK
    probabilities_RK = probabilities_RK.masked_fill(before_RK >= config.top_p, 0)
    ids_RK, order_RK = ids_RK.sort(-1)
    cumulative_RK = probabilities_RK.gather(1, order_RK).cumsum(-1)
    total_R1 = cumulative_RK[:, -1:]
    # Under the total even after rounding, so that a token of no mass is never reached.
    target_R1 = torch.minimum(uniforms_R[:, None] * total_R1, total_R1.nextafter(torch.zeros_like(total_R1)))
    return ids_RK.gather(1, (cumulative_RK <= target_R1).sum(-1, keepdim=True))[:, 0]


class _Chooser(LogitsProcessor):
    """Leave ``generate`` no choice but the token of ``choose_tokens``."""

    def __init__(self, uniforms_RT: Tensor, prompt_length: int, end_id: int, config: CaptionConfig) -> None:
        self.uniforms_RT = uniforms_RT
        self.prompt_length = prompt_length
        self.end_id = end_id
        self.config = config

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniforms_R = self.uniforms_RT[:, input_ids.shape[1] - self.prompt_length]
        chosen_R = choose_tokens(scores, input_ids, uniforms_R, self.end_id, self.config)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_R[:, None], 0.0)


@torch.inference_mode()
def sample_captions(
    model: BlipForConditionalGeneration,
    pixels_BCHW: Tensor,
    prompt_ids: Sequence[int],
    uniforms_BNT: Tensor,
    config: CaptionConfig,
) -> list[list[list[int]]]:
    """Return, for each image and sample, the tokens after the prompt, the end included where it was reached.

    Args:
        prompt_ids: start token and prompt, shared by all rows.
        uniforms_BNT: one float64 in [0, 1) for each token that may be sampled.
    """
    num_images, num_samples, _ = uniforms_BNT.shape
    text_config = model.config.text_config
    image_BPD = model.vision_model(pixel_values=pixels_BCHW).last_hidden_state
    image_RPD = image_BPD.repeat_interleave(num_samples, dim=0)
    prompt_RL = torch.tensor([prompt_ids], device=image_RPD.device).expand(len(image_RPD), -1)
    chooser = _Chooser(uniforms_BNT.flatten(0, 1), len(prompt_ids), text_config.sep_token_id, config)
    tokens_RL = model.text_decoder.generate(
        input_ids=prompt_RL,
        attention_mask=torch.ones_like(prompt_RL),
        encoder_hidden_states=image_RPD,
        encoder_attention_mask=torch.ones(image_RPD.shape[:2], dtype=torch.long, device=image_RPD.device),
        # Neutral in every knob: what is not set here would come from the model's files or transformers'
        # defaults.
        generation_config=GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_length=config.max_length,
            min_length=0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=text_config.sep_token_id,
            pad_token_id=text_config.pad_token_id,
        ),
        logits_processor=LogitsProcessorList([chooser]),
    )
    rows = [_until_end(row, text_config.sep_token_id) for row in tokens_RL[:, len(prompt_ids) :].tolist()]
    return [rows[image * num_samples : (image + 1) * num_samples] for image in range(num_images)]


def _until_end(tokens: list[int], end_id: int) -> list[int]:
    return tokens[: tokens.index(end_id) + 1] if end_id in tokens else tokens
