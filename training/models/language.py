"""The frozen language models of stage 2: a decoder (OPT) and an encoder-decoder (FlanT5).

Both take the projected queries as a soft prompt (BLIP-2, section 3.3; lavis/models/blip2_models/blip2_{opt,t5}.py).
They are never trained and have no dropout; a gradient passes through them to the prompt.

The legend of the names: B images, Q queries, L text tokens, S = Q + L, T tokens to predict, W the width of the
language model's embeddings, V its vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    T5ForConditionalGeneration,
)

from pipeline.models.transformers_loader import load_model, load_tokenizer, model_config
from pipeline.rng import seed_for
from schemas.errors import CapfiltError
from schemas.names import printable
from schemas.pretrain import LanguageConfig
from training.losses import IGNORED, captioning_loss, target_positions
from training.models.pretrained import config_file, model_folder, tokenizer_folder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Lengths are rounded up to a multiple of this, as matrix products want.
_LENGTH_MULTIPLE = 8

_OPT = {
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_T5 = {"vocab_size": 32128, "num_layers": 24, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
_T5 |= {"tie_word_embeddings": False, "decoder_start_token_id": 0}
# The published shapes, so that a plan can be made without a network.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "facebook/opt-2.7b": {**_OPT, "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240},
    "facebook/opt-6.7b": {**_OPT, "hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384},
    "google/flan-t5-xl": {**_T5, "d_model": 2048, "d_ff": 5120, "num_heads": 32},
    "google/flan-t5-xxl": {**_T5, "d_model": 4096, "d_ff": 10240, "num_heads": 64},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Tokenised captions for one language model.

    ``inputs_BL`` follows the soft prompt, with ``mask_BL`` true where there is a token; ``labels_BT`` are the tokens to
    predict, ``IGNORED`` where there is none. Both are padded on the right.
    """

    inputs_BL: Tensor
    mask_BL: Tensor
    labels_BT: Tensor

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens to predict."""
        return int((self.labels_BT != IGNORED).sum())


class FrozenLanguage(nn.Module):
    """A frozen language model: what the two families share.

    Args:
        config: ``[language]``.
        model: of transformers.
        tokenizer: its own; None where no caption is ever given: on ``meta``, in benchmarks.
    """

    def __init__(
        self, config: LanguageConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.tokenizer: Any = tokenizer
        # Of the embeddings: in OPT-350m narrower than the blocks (word_embed_proj_dim), which project them themselves.
        self.width = model.get_input_embeddings().embedding_dim
        # Over the ranks (FSDP): every call then needs all of them.
        self.is_sharded = False
        # Every text is padded to ``max_text_tokens``: compiled code then meets one shape, and T5's encoder and decoder
        # not each pair of lengths, the rarest of which would be compiled after thousands of steps.
        self.pads_to_most = False
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "FrozenLanguage":
        """Stay in evaluation mode."""
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return self.model.get_input_embeddings().weight.dtype

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Return the embeddings (B, L, W) of tokens."""
        return self.model.get_input_embeddings()(ids_BL)

    @property
    def prompt(self) -> str:
        """Return what stands before every caption: ``language.prompt``, parted from the caption by white space."""
        prompt = self.config.prompt
        return f"{prompt} " if prompt and not prompt[-1].isspace() else prompt

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the tokens of texts and where they are, padded on the right."""
        rows = self.tokenizer(list(texts), truncation=True, max_length=self.config.max_text_tokens).input_ids
        most = self.config.max_text_tokens
        longest = most if self.pads_to_most else max(map(len, rows))
        length = min(-(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, most)
        ids_BL = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask_BL = torch.zeros(len(rows), length, dtype=torch.bool)
        for index, row in enumerate(rows):
            ids_BL[index, : len(row)] = torch.tensor(row)
            mask_BL[index, : len(row)] = True
        return ids_BL, mask_BL


class DecoderOnly(FrozenLanguage):
    """OPT: the soft prompt, then the caption, each token of which is predicted, the leading ``</s>`` included."""

    name = "opt"
    model_class = OPTForCausalLM
    # Generation continues where a prompt ends, so that padding must come before it.
    padding_side = "left"

    @property
    def end_of_text_id(self) -> int:
        """Return the token that ends a text: OPT has learnt to end captions by a line break."""
        return self.tokenizer("\n", add_special_tokens=False).input_ids[-1]

    def target(self, captions: Sequence[str], uids: Sequence[str], seed: int) -> Target:
        """Tokenise captions, each ended by a line break. The text prompt is input only, not predicted."""
        texts = [f"{self.prompt}{caption}\n" for caption in captions]
        ids_BL, mask_BL = self._tokens(texts)
        labels_BL = ids_BL.masked_fill(~mask_BL, IGNORED)
        if self.prompt:
            for row, length in enumerate(self._prompt_lengths(texts)):
                labels_BL[row, :length] = IGNORED
        return Target(inputs_BL=ids_BL, mask_BL=mask_BL, labels_BT=labels_BL)

    def _prompt_lengths(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens of each text, the leading ``</s>`` included, end within the prompt.

        Counted by characters: byte-level BPE joins the blank behind the prompt to the caption's first word, so the
        tokens of the prompt alone are not the first tokens of the text.
        """
        offsets = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.config.max_text_tokens,
            return_offsets_mapping=True,
        ).offset_mapping
        return [sum(1 for _ in takewhile(lambda span: span[1] <= len(self.prompt), row)) for row in offsets]

    def loss(self, prompt_BQW: Tensor, target: Target) -> Tensor:
        """Return the cross-entropy summed over the tokens."""
        positions_T, labels_T = target_positions(target.labels_BT, prompt_BQW.device)
        hidden_BLW = self._hidden(prompt_BQW, target.inputs_BL.to(prompt_BQW.device))
        return captioning_loss(self._logits, hidden_BLW.flatten(0, 1).index_select(0, positions_T), labels_T)

    def typical_forward(self, prompt_BQW: Tensor) -> None:
        """Compute a forward pass over a caption of usual length: 20 tokens."""
        ids_BL = torch.zeros(len(prompt_BQW), 20, dtype=torch.long, device=prompt_BQW.device)
        self._logits(self._hidden(prompt_BQW, ids_BL))

    def _hidden(self, prompt_BQW: Tensor, ids_BL: Tensor) -> Tensor:
        """Return the last hidden state from which each token is predicted, (B, L, W)."""
        inputs_BSW = torch.cat((prompt_BQW, self.embed(ids_BL)), dim=1)
        # No padding mask: attention is causal and padding comes last, so no token sees it; without a mask attention is
        # faster.
        hidden_BSW = self.model.model.decoder(inputs_embeds=inputs_BSW, use_cache=False).last_hidden_state
        # Position i predicts token i + 1: the last query predicts the first token, the last token nothing.
        return hidden_BSW[:, prompt_BQW.shape[1] - 1 : -1]

    def _logits(self, hidden_TW: Tensor) -> Tensor:
        return _at_least_float(self.model.lm_head(hidden_TW))

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the blocks, in order."""
        return list(self.model.model.decoder.layers)

    @property
    def roots(self) -> list[nn.Module]:
        """Return the modules whose calls hold those of the blocks."""
        return [self.model.model.decoder]


class EncoderDecoder(FrozenLanguage):
    """FlanT5: the encoder takes the soft prompt and the first words of a caption, the decoder predicts the others."""

    name = "t5"
    model_class = T5ForConditionalGeneration
    padding_side = "right"

    def __init__(
        self, config: LanguageConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        super().__init__(config, model, tokenizer)
        _use_exact_gelu(model)

    @property
    def end_of_text_id(self) -> int:
        """Return the token that ends a text."""
        return self.tokenizer.eos_token_id

    def target(self, captions: Sequence[str], uids: Sequence[str], seed: int) -> Target:
        """Split each caption before a word between the second and the one at its middle, and tokenise both parts.

        The rule is of BLIP-2's author (salesforce/LAVIS#139). A caption of one word is predicted whole. Where it is
        split depends on ``seed``, the image and the caption alone.
        """
        prefixes, suffixes = zip(*map(split_caption, captions, uids, [seed] * len(uids)), strict=True)
        ids_BL, mask_BL = self._tokens([f"{self.prompt}{prefix}" for prefix in prefixes])
        labels_BT, suffix_mask_BT = self._tokens(suffixes)
        return Target(
            inputs_BL=ids_BL, mask_BL=mask_BL, labels_BT=labels_BT.masked_fill(~suffix_mask_BT, IGNORED)
        )

    def loss(self, prompt_BQW: Tensor, target: Target) -> Tensor:
        """Return the cross-entropy summed over the tokens."""
        device = prompt_BQW.device
        positions_T, labels_T = target_positions(target.labels_BT, device)
        logits_BTV = self._logits(
            prompt_BQW, target.inputs_BL.to(device), target.mask_BL.to(device), target.labels_BT.to(device)
        )
        logits_TV = logits_BTV.flatten(0, 1).index_select(0, positions_T)
        return captioning_loss(_at_least_float, logits_TV, labels_T)

    def typical_forward(self, prompt_BQW: Tensor) -> None:
        """Compute a forward pass over a caption of usual length: 8 tokens for the encoder and 16 for the decoder."""
        ids_BT = torch.zeros(len(prompt_BQW), 16, dtype=torch.long, device=prompt_BQW.device)
        self._logits(prompt_BQW, ids_BT[:, :8], ids_BT[:, :8] == 0, ids_BT)

    def _logits(self, prompt_BQW: Tensor, ids_BL: Tensor, mask_BL: Tensor, labels_BT: Tensor) -> Tensor:
        """Return the decoder's logits of each label, given those before it, (B, T, V)."""
        # Teacher forcing: the decoder's inputs are the labels shifted right by one, behind the start token.
        decoder_ids_BT = labels_BT.roll(1, dims=1)
        decoder_ids_BT[:, 0] = self.model.config.decoder_start_token_id
        return self.model(
            inputs_embeds=torch.cat((prompt_BQW, self.embed(ids_BL)), dim=1),
            attention_mask=torch.cat((mask_BL.new_ones(prompt_BQW.shape[:2]), mask_BL), dim=1).long(),
            decoder_input_ids=decoder_ids_BT.masked_fill(
                decoder_ids_BT == IGNORED, self.model.config.pad_token_id
            ),
            use_cache=False,
        ).logits

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the blocks, in order."""
        return [*self.model.encoder.block, *self.model.decoder.block]

    @property
    def roots(self) -> list[nn.Module]:
        """Return the modules whose calls hold those of the blocks."""
        return [self.model.encoder, self.model.decoder]


def split_caption(caption: str, uid: str, seed: int) -> tuple[str, str]:
    """Return the words for the encoder and those for the decoder to predict."""
    words = caption.split()
    if len(words) < 2:
        return "", caption
    # Of the methods of random.Random only random() is promised to stay the same between versions of Python.
    uniform = random.Random(seed_for("split", seed, uid, caption)).random()
    split = 1 + int(uniform * (len(words) // 2))
    return " ".join(words[:split]), " ".join(words[split:])


_FAMILIES = {"opt": DecoderOnly, "t5": EncoderDecoder}


def load_language(config: LanguageConfig) -> DecoderOnly | EncoderDecoder:
    """Load the language model that ``[language]`` names, on the CPU.

    Raises:
        CapfiltError: no such model, a file is missing, or it is of another family.
    """
    where, family = "language.model", _FAMILIES[config.family]
    _require_family(config, config_file(config.model, config.revision, where).get("model_type"))
    folder = model_folder(config.model, config.revision, where)
    model = load_model(family.model_class, folder, where, dtype=DTYPES[config.precision])
    return family(config, model, language_tokenizer(config))


def language_tokenizer(config: LanguageConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the language model that ``[language]`` names; raises CapfiltError as ``load_language``."""
    where = "language.model"
    return load_tokenizer(tokenizer_folder(config.model, config.revision, where), where)


def language_without_data(
    config: LanguageConfig, shape: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> DecoderOnly | EncoderDecoder:
    """Build a language model of a shape on ``meta``; torch's generators stay as they are."""
    family = _FAMILIES[config.family]
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return family(config, family.model_class(shape), tokenizer)


def empty_language(config: LanguageConfig, device: torch.device | str) -> DecoderOnly | EncoderDecoder:
    """Build the language model that ``[language]`` names without its weights: on ``meta``, or at random on a device."""
    family, default = _FAMILIES[config.family], torch.get_default_dtype()
    shape = language_shape(config)
    torch.set_default_dtype(DTYPES[config.precision])
    try:
        with torch.device(device):
            return family(config, family.model_class(shape), None)
    finally:
        torch.set_default_dtype(default)


def language_shape(config: LanguageConfig) -> PretrainedConfig:
    """Return the shape of the language model: known for the published ones, else from its folder or the hub.

    Raises:
        CapfiltError: as ``load_language``.
    """
    values = _PUBLISHED.get(config.model)
    if values is None:
        values = config_file(config.model, config.revision, "language.model")
        _require_family(config, values.get("model_type"))
    else:
        _require_family(config, "opt" if "ffn_dim" in values else "t5")
    kind = _FAMILIES[config.family].model_class.config_class
    return model_config(kind, values, Path(config.model) / "config.json")


def _require_family(config: LanguageConfig, family: object) -> None:
    if family != config.family:
        raise CapfiltError(
            f"language.model = {config.model!r} is of the family {printable(str(family or 'unknown'))[:40]!r}; "
            f"language.family = {config.family!r}"
        )


def _use_exact_gelu(model: nn.Module) -> None:
    """Replace the tanh approximation by GELU, as LAVIS does and BLIP-2 was trained."""
    model.config.dense_act_fn = "gelu"
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense.act = nn.GELU()


def _at_least_float(logits_TV: Tensor) -> Tensor:
    return logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
