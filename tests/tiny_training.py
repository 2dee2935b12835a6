"""Untrained BERT, OPT and T5 of a few kilobytes in the layout of the published ones, and runs configured on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import IMAGE_PX, SPECIAL, WORDS, save_ranker, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from schemas.pretrain import BlipKind, PretrainConfig

WIDTH, HEADS, LAYERS, FFN_WIDTH = 32, 4, 4, 64
NUM_QUERIES = 4
MAX_TEXT_TOKENS = 12
MAX_POSITIONS = 48
# BERT's words and [DEC].
VOCAB_SIZE = len(SPECIAL) + len(WORDS) + 1

# As OPT's: pad 1, start and end 2; the newline ends a caption.
_OPT_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "\n", ":", "?", "question", "answer")
_T5_TOKENS = ("<pad>", "</s>", "<unk>", ":", "?", "question", "answer")


def save_bert(folder: Path, *, seed: int = 0) -> Path:
    """Save BERT with its masked-language head and the tokenizer of ``tiny_models``."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB_SIZE - 1,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN_WIDTH,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.2,
    )
    model = BertForMaskedLM(config)
    _shake(model)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_opt(
    folder: Path, *, seed: int = 0, width: int = 24, embeddings_width: int = 0, bpe: bool = False
) -> Path:
    """Save an OPT and its tokenizer, which puts ``</s>`` first, as the published one does.

    With ``bpe`` it is byte-level BPE, also as the published one: a blank belongs to the word that follows. OPT-350m
    alone has an ``embeddings_width`` other than its width, and its norms behind the residual branches.
    """
    torch.manual_seed(seed)
    words = _byte_level_bpe() if bpe else _word_level(_OPT_TOKENS, "<unk>")
    words.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    config = OPTConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=width,
        word_embed_proj_dim=embeddings_width or width,
        do_layer_norm_before=not embeddings_width,
        ffn_dim=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
        init_std=0.2,
    )
    model = OPTForCausalLM(config)
    _shake(model)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def save_t5(folder: Path, *, seed: int = 0, width: int = 24) -> Path:
    """Save a T5 of FlanT5's kind (gated GELU, own output head) and its tokenizer, which puts ``</s>`` last."""
    torch.manual_seed(seed)
    words = _word_level(_T5_TOKENS, "<unk>")
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = T5Config(
        vocab_size=words.get_vocab_size(),
        d_model=width,
        d_kv=6,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        initializer_factor=1.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def tiny_config(
    tmp_path: Path, corpus: str | Path, stage: int = 1, **overrides: dict[str, Any]
) -> PretrainConfig:
    """Return a run of a few seconds on models saved under ``tmp_path``; they are made where they are not there yet.

    Args:
        tmp_path: of the models and, in ``run``, of the checkpoints and metrics.
        corpus: path of a corpus with curated shards.
        stage: 1; or 2, on the tiny OPT unless ``language={"family": "t5"}`` says otherwise.
        overrides: keys of a section, by its name: ``optim={"steps": 4}``.
    """
    bert = _once(tmp_path / "bert", save_bert)
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "stage": stage, "output": str(tmp_path / "run"), "seed": 7},
        "data": {
            "corpus": [{"path": str(corpus)}],
            "image_size_px": IMAGE_PX,
            "read_ahead": 2,
            "workers": 1,
        },
        "vision": {"model": f"local-dir:{_once(tmp_path / 'clip', save_ranker)}", "pretrained": ""},
        "qformer": {
            "weights": str(bert),
            "tokenizer": str(bert),
            "num_queries": NUM_QUERIES,
            "layers": LAYERS,
            "width": WIDTH,
            "heads": HEADS,
            "ffn_width": FFN_WIDTH,
            "projection_width": 16,
            "max_text_tokens": MAX_TEXT_TOKENS,
            "vocab_size": VOCAB_SIZE,
            "max_positions": MAX_POSITIONS,
        },
        "optim": {"steps": 8, "batch_size": 8, "warmup_steps": 2, "peak_lr": 1e-3},
        "performance": {"precision": "fp32"},
        "checkpoint": {"every_steps": 4, "asynchronous": False},
        "metrics": {"every_steps": 1},
        "cluster": {"cpu_ranks": 1},
    }
    if stage == 2:
        family = overrides.get("language", {}).get("family", "opt")
        model = _once(tmp_path / family, save_opt if family == "opt" else save_t5)
        values["language"] = {
            "model": str(model),
            "family": family,
            "max_text_tokens": MAX_TEXT_TOKENS,
            "precision": "fp32",
        }
    for section, changes in overrides.items():
        values.setdefault(section, {}).update(changes)
    return PretrainConfig.model_validate(values)


def tiny_blip_config(
    tmp_path: Path, corpus: str | Path, stage: BlipKind = "blip-pretrain", **overrides: dict[str, Any]
) -> PretrainConfig:
    """Return a run of a BLIP with two layers each, as ``tiny_config``; the BERT has too many layers and is not read."""
    bert = _once(tmp_path / "bert", save_bert)
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "stage": stage, "output": str(tmp_path / "run"), "seed": 7},
        "data": {"corpus": [{"path": str(corpus)}], "image_size_px": IMAGE_PX, "read_ahead": 2, "workers": 1},
        "blip": {
            "vision": {"layers": 2, "width": 32, "heads": 4, "patch_px": 8},
            "text": {
                "tokenizer": str(bert),
                "layers": 2,
                "width": WIDTH,
                "heads": HEADS,
                "ffn_width": FFN_WIDTH,
                "max_text_tokens": MAX_TEXT_TOKENS,
                "vocab_size": VOCAB_SIZE + 1,
                "max_positions": MAX_POSITIONS,
            },
            "projection_width": 16,
            "queue_size": 24,
            "negatives_of": 4,
        },
        "optim": {"steps": 8, "batch_size": 8, "warmup_steps": 2, "peak_lr": 1e-3, "decay_vectors": True},
        "performance": {"precision": "fp32"},
        "checkpoint": {"every_steps": 4, "asynchronous": False},
        "metrics": {"every_steps": 1},
        "cluster": {"cpu_ranks": 1},
    }
    for section, changes in overrides.items():
        values.setdefault(section, {}).update(changes)
    return PretrainConfig.model_validate(values)


def _once(folder: Path, save: Callable[[Path], Path]) -> Path:
    """Return a folder of a model, made where it is missing: before there are ranks, of which all would write it."""
    if not (folder / "tokenizer.json").is_file():
        assert not torch.distributed.is_initialized(), f"{folder} is to be made before the ranks are"
        save(folder)
    return folder


def _word_level(first: tuple[str, ...], unknown: str) -> Tokenizer:
    """Return a tokenizer of whole words over the vocabulary of ``tiny_models``; a newline is a word."""
    words = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate((*first, *dict.fromkeys(WORDS)))}, unknown)
    )
    # Words, punctuation marks and newlines; the blanks between them go.
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation(),
        ]
    )
    return words


def _byte_level_bpe() -> Tokenizer:
    """Return a byte-level BPE over the vocabulary of ``tiny_models`` in which each word behind a blank is one token."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        special_tokens=list(_OPT_TOKENS[:4]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    words.train_from_iterator([" ".join(["", *WORDS])] * 2, trainer)
    return words


def _shake(model: torch.nn.Module) -> None:
    """Give biases and norms values of their own: at their initial 0 and 1 a lost or swapped one goes unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
