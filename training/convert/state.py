"""The state that a model begins with, from weights of the same model or of one that comes before it in its method.

A model must be given exactly what it trains: a missing, unexpected or misshapen tensor is an error that names it.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.models.checks import require_finite_weights
from schemas.errors import CapfiltError
from schemas.pretrain import TrainingStage
from training.blip.vision import resize_positions
from training.models.parameters import tensor_differences

# What stage 2 drops of stage 1: the text side of the Q-Former and the heads.
_STAGE1_ONLY = re.compile(
    r"Qformer\.cls\..+|Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight"
    r"|Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..+|(vision|text)_proj\..+|itm_head\..+|temp"
)
_PROJECTION = re.compile(r"(opt|t5)_proj\..+")
# The decoder of BLIP: names of what it may share with the text encoder, and of its head's matrix.
_ENCODER, _DECODER = "text_encoder.", "text_decoder.bert."
_HEAD, _EMBEDDINGS = "text_decoder.cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"


def stage_state(
    given: Mapping[str, Tensor], fresh: Mapping[str, Tensor], *, stage: TrainingStage, where: str
) -> dict[str, Tensor]:
    """Return the state that a stage begins with, from weights of the same stage or of one before it.

    Args:
        given: the trained weights, under the names of LAVIS or of BLIP's repository.
        fresh: the stage's initial trainable state: its names and shapes, and the language projection's values if
            ``given``, from stage 1, has none.
        stage: which one begins.
        where: the file, for messages.

    Raises:
        CapfiltError: a tensor is missing, unexpected, of another shape, or holds NaN or infinity.
    """
    state = require_same_shapes(given, fresh, stage=stage, where=where)
    require_finite_weights(state, where)
    # Files may be in half precision; training continues in the stage's own precision.
    return {name: state[name].to(fresh[name].dtype) for name in fresh}


def require_same_shapes(
    given: Mapping[str, Tensor], fresh: Mapping[str, Tensor], *, stage: TrainingStage, where: str
) -> dict[str, Tensor]:
    """Return the tensors that a stage begins with, as ``stage_state``, from names and shapes alone.

    Raises:
        CapfiltError: a tensor is missing, unexpected or of another shape.
    """
    state = dict(given) if isinstance(stage, int) else _blip_tensors(given, fresh, where)
    if stage == 2:
        state = {name: tensor for name, tensor in state.items() if not _STAGE1_ONLY.fullmatch(name)}
        if not any(_PROJECTION.fullmatch(name) for name in state):
            # To where weights of files are: a stage's own may be on a GPU.
            state |= {name: tensor.cpu() for name, tensor in fresh.items() if _PROJECTION.fullmatch(name)}
    model = f"stage {stage}" if isinstance(stage, int) else stage
    if problems := tensor_differences(state, fresh):
        raise CapfiltError(f"{where} is not a checkpoint of this {model} model: {problems}")
    return state


def _blip_tensors(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return BLIP's tensors under the names that a model has: parts that it lacks go, shared ones have one name."""
    if _DECODER + _EMBEDDINGS in given and _ENCODER + _EMBEDDINGS in given and "itm_head.weight" not in given:
        raise CapfiltError(f"{where} answers questions (VQA): its decoder reads a text, not an image")
    _reject_unshared(given, wanted, where)
    # A decoder that shared its tensors has them under the encoder's names.
    sources = {name: name if name in given else name.replace(_DECODER, _ENCODER) for name in wanted}
    if _HEAD in given and not any(name.startswith(_ENCODER) for name in wanted):
        # BLIP's own captioner has one matrix, into which its loader puts both; the head's comes last.
        sources[_DECODER + _EMBEDDINGS] = _HEAD
    elif _HEAD in wanted and _HEAD not in given:
        sources[_HEAD] = sources.get(_DECODER + _EMBEDDINGS, _ENCODER + _EMBEDDINGS)
    state = {name: given[source] for name, source in sources.items() if source in given}
    # Hugging Face's classes have no temperature.
    state |= {name: wanted[name].cpu() for name in ("temp",) if name in wanted and name not in state}
    positions = "visual_encoder.pos_embed"
    if positions in state:
        state[positions] = resize_positions(state[positions], wanted[positions].shape[1])
    return state


def _reject_unshared(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Raise CapfiltError where a model would lose tensors: it shares what differs in the weights."""
    if not any(name.startswith("text_decoder.") for name in wanted) or _ENCODER + _EMBEDDINGS not in wanted:
        return
    second_names = {name: name.replace(_DECODER, _ENCODER) for name in given if name.startswith(_DECODER)}
    second_names[_HEAD] = _ENCODER + _EMBEDDINGS
    for name, first in second_names.items():
        if name not in wanted and name in given and not torch.equal(given[name], given[first]):
            key = "blip.tied_head = false" if name == _HEAD else "another blip.share"
            raise CapfiltError(
                f"{where}: {name} is not {first}, and the model has one tensor for both; set {key}"
            )
