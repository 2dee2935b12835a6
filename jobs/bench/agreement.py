"""Whether the decoding engine computes what transformers computes, with weights of the published size."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration

import pipeline.models.blip.generation
from jobs.bench.fixtures.models import END_CHANCE, end_after
from jobs.bench.generate import prompt_ids, uniform_numbers
from pipeline.models.blip.decoder import Decoder
from pipeline.models.blip.generation import GridSampler, RowSampler
from schemas.config import CaptionConfig


@contextmanager
def _recorded_logits() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield a list that grows by (tokens, logits) of every row that the engine computes."""
    recorded: list[tuple[Tensor, Tensor]] = []
    nucleus = pipeline.models.blip.generation.nucleus

    def recording(logits_RV: Tensor, tokens_RL: Tensor, *rest: Any) -> Any:
        recorded.append((tokens_RL.clone(), logits_RV.clone()))
        return nucleus(logits_RV, tokens_RL, *rest)

    pipeline.models.blip.generation.nucleus = recording
    try:
        yield recorded
    finally:
        pipeline.models.blip.generation.nucleus = nucleus


@torch.inference_mode()
def _teacher_forced(model: BlipForConditionalGeneration, tokens_RL: Tensor, features_1PE: Tensor) -> Tensor:
    """Return transformers' logits after the last token."""
    features_RPE = features_1PE.expand(len(tokens_RL), -1, -1)
    return model.text_decoder(tokens_RL, encoder_hidden_states=features_RPE).logits[:, -1]


def agreement(model: BlipForConditionalGeneration, features_BPE: Tensor) -> dict[str, Any]:
    """Compare logits in float32 where the engine samples, greedy captions whole, and both orders of the engine."""
    end_after(model, features_BPE[:1], END_CHANCE)
    decoder = Decoder(model.text_decoder).eval()
    config = CaptionConfig()
    uniforms_1NT = uniform_numbers(1, config).to(model.device)
    with _recorded_logits() as recorded:
        said_1NT = RowSampler(decoder, prompt_ids(model), config)(features_BPE[:1], uniforms_1NT)
    same = [said_1NT == one for one in _in_grid(model, features_BPE[:1], uniforms_1NT, config)]
    differences = [
        float((logits_RV - _teacher_forced(model, tokens_RL, features_BPE[:1])).abs().max())
        for tokens_RL, logits_RV in recorded
    ]
    # A likely end would be the first token of all captions, and nothing compared.
    end_after(model, features_BPE[:2], 0.0)
    decoder = Decoder(model.text_decoder).eval()
    greedy = CaptionConfig(top_k=1, num_captions=1, repetition_penalty=1.0, min_length=0)
    ours_BT = RowSampler(decoder, prompt_ids(model), greedy)(
        features_BPE[:2], uniform_numbers(2, greedy).to(model.device)
    )[:, 0]
    with torch.inference_mode():
        theirs_BL = model.text_decoder.generate(
            input_ids=torch.tensor(prompt_ids(model), device=model.device).expand(2, -1),
            encoder_hidden_states=features_BPE[:2],
            do_sample=False,
            max_length=greedy.max_length,
            eos_token_id=decoder.end_id,
            pad_token_id=0,
        )
    return {
        "max_logit_difference": max(differences),
        "logit_rows_compared": sum(len(tokens_RL) for tokens_RL, _ in recorded),
        "greedy_equal": torch.equal(ours_BT, theirs_BL[:, 1:]),
        "grid_same_tokens": round(float(torch.stack(same).double().mean()), 5),
    }


def _in_grid(
    model: BlipForConditionalGeneration, features_BPE: Tensor, uniforms_BNT: Tensor, config: CaptionConfig
) -> list[Tensor]:
    """Sample twice as a GPU does, there compiled and in CUDA graphs: the first call captures, the second replays."""
    decoder = Decoder(model.text_decoder, compiled=model.device.type == "cuda").eval()
    sampler = GridSampler(decoder, prompt_ids(model), config, len(features_BPE))
    said = [sampler(features_BPE, uniforms_BNT) for _ in range(2)]
    # Other shapes than those that are timed: they must not count among the compilations that torch allows.
    torch.compiler.reset()
    return said


def lowered_agreement(
    model: BlipForConditionalGeneration, features_BPE: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the root-mean-square error of logits in the lower precision, ours and transformers'."""
    config = CaptionConfig()
    errors: dict[str, list[float]] = {"ours": [], "transformers": []}
    with _recorded_logits() as recorded:
        RowSampler(Decoder(model.text_decoder).eval(), prompt_ids(model), config)(
            features_BPE[:1], uniform_numbers(1, config).to(model.device)
        )
    with torch.inference_mode():
        exact = [_teacher_forced(model, tokens_RL, features_BPE[:1]) for tokens_RL, _ in recorded]
        model.to(dtype)
        lowered_BPE = features_BPE.to(dtype)
        decoder = Decoder(model.text_decoder).eval()
        image_kv = decoder.image_keys_values(lowered_BPE[:1])
        for (tokens_RL, _), exact_RV in zip(recorded, exact, strict=True):
            for row, exact_V in zip(tokens_RL, exact_RV, strict=True):
                ours_1V, _ = decoder.prefix(row.tolist(), image_kv)
                theirs_1V = _teacher_forced(model, row[None], lowered_BPE[:1]).float()
                errors["ours"].append(float((ours_1V[0] - exact_V).square().mean()))
                errors["transformers"].append(float((theirs_1V[0] - exact_V).square().mean()))
    model.float()
    return {f"rms_logit_error_{name}": (sum(each) / len(each)) ** 0.5 for name, each in errors.items()}
