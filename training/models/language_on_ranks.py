"""The frozen language model of several ranks: rank 0 alone reads its files, and hands it on tensor by tensor.

A model of 11 billion parameters is 45 GB of files; read by each of eight ranks of a node that would be 360 GB.
"""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PretrainedConfig

from schemas.pretrain import LanguageConfig
from training.distributed import World
from training.models.language import (
    DecoderOnly,
    EncoderDecoder,
    language_tokenizer,
    language_without_data,
    load_language,
)

Language = DecoderOnly | EncoderDecoder


def load_on_ranks(config: LanguageConfig, world: World, device: torch.device, *, shard: bool) -> Language:
    """Load the language model on every rank: on its device where there are several, else on the CPU.

    No rank holds more than its own part and one whole tensor on its device; rank 0 has the model on the CPU meanwhile.

    Args:
        shard: over the ranks.

    Raises:
        CapfiltError: as ``load_language``, on every rank.
    """
    if world.size == 1:
        return load_language(config)
    tensors: dict[str, torch.Tensor] = {}

    def read() -> tuple[PretrainedConfig, dict[str, torch.dtype], dict[str, str]]:
        model = load_language(config).model
        assert not list(model.buffers()), "only parameters are handed on"
        tensors.update((name, parameter.detach()) for name, parameter in model.named_parameters())
        return model.config, {name: tensor.dtype for name, tensor in tensors.items()}, _tied(model)

    shape, dtypes, tied = world.broadcast_object(read)
    tokenizer = world.all_or_raise(lambda: language_tokenizer(config))
    language = language_without_data(config, shape, tokenizer)
    for name, parameter in language.model.named_parameters(remove_duplicate=False):
        parameter.data = parameter.data.to(dtypes[tied.get(name, name)])
    if shard:
        shard_language(language)
    # Tied parameters become tensors of their own.
    language.to_empty(device=device)
    for name, first in tied.items():
        module, _, own_name = name.rpartition(".")
        setattr(language.model.get_submodule(module), own_name, language.model.get_parameter(first))
    _fill(language, tensors, world)
    return language


def _tied(model: nn.Module) -> dict[str, str]:
    """Return the further names of parameters that have several, each with the first one.

    The files decide: transformers ties T5's output head to the embeddings unless a file has values for it.
    """
    first_names: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    firsts = {name: first_names.setdefault(id(parameter), name) for name, parameter in named}
    return {name: first for name, first in firsts.items() if name != first}


@torch.no_grad()
def _fill(language: Language, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Set the parameters to rank 0's tensors; of a sharded one each rank keeps its part."""
    parameters = dict(language.model.named_parameters())
    for name, tensor in world.broadcast_tensors(tensors):
        parameter = parameters.pop(name)
        if isinstance(parameter, DTensor):
            # Every rank has the whole tensor: none is sent.
            part = distribute_tensor(
                tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
            ).to_local()
            parameter.to_local().copy_(part)
        else:
            parameter.copy_(tensor)
    assert not parameters, f"{list(parameters)} have no values"


def shard_language(language: Language) -> None:
    """Shard a frozen language model's blocks over all ranks (FSDP2); each is gathered while it computes.

    Embeddings and output head are used outside the blocks' own calls, so what is not in a block is not sharded.
    """
    blocks = language.blocks
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    for block in blocks:
        fully_shard(block)
    for root in language.roots:
        whole = {parameter for parameter in root.parameters() if parameter not in in_blocks}
        fully_shard(root, ignored_params=whole)
    language.is_sharded = True
