"""Untrained BLIP and CLIP models of a few kilobytes, saved in the layout of the published ones."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
)

VOCABULARY = (
    "a the red green blue black white small large circle square triangle dog cat car tree on under near of "
    "picture photo and with two three in street grass sky ' s . - , running sitting"
)
WORDS = VOCABULARY.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
END_ID = SPECIAL.index("[SEP]")
START_ID = len(SPECIAL) + len(WORDS)
IMAGE_PX = 32


def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: index for index, word in enumerate([*SPECIAL, *WORDS])})


def _blip_config(**more: int) -> BlipConfig:
    text = {
        "vocab_size": START_ID + 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
        "bos_token_id": START_ID,
        "eos_token_id": 2,
        "sep_token_id": END_ID,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE_PX,
        "patch_size": 8,
        "initializer_range": 0.2,
    }
    return BlipConfig(text_config=text, vision_config=vision, initializer_range=0.2, **more)


def save_captioner(folder: Path, *, seed: int = 0, end_bias: float = 1.0) -> Path:
    """Save a captioner whose start token, as the published one's, is not in the tokenizer's vocabulary.

    The weights are large enough for the image and the words so far to matter; the end has a bias, or no
    caption would ever end.
    """
    torch.manual_seed(seed)
    model = BlipForConditionalGeneration(_blip_config())
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[END_ID] = end_bias
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    BlipImageProcessor(size={"height": IMAGE_PX, "width": IMAGE_PX}).save_pretrained(folder)
    return folder


def save_matcher(folder: Path, *, seed: int = 0, head: float = 1.0) -> Path:
    """Save a retrieval model whose match probabilities are spread over the whole range; ``head`` scales its logits."""
    torch.manual_seed(seed)
    model = BlipForImageTextRetrieval(_blip_config(image_text_hidden_size=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.itm_head.weight.mul_(head)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    BlipImageProcessor(size={"height": IMAGE_PX, "width": IMAGE_PX}).save_pretrained(folder)
    return folder


def save_qformer_matcher(folder: Path, *, seed: int = 0) -> Path:
    """Save a stage 1 of BLIP-2, with the image token that its processor adds to the tokenizer."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    vision = {**shape, "hidden_size": 48, "image_size": IMAGE_PX, "patch_size": 8}
    qformer = {
        **shape,
        "vocab_size": START_ID,
        "max_position_embeddings": 48,
        "encoder_hidden_size": 48,
        "cross_attention_frequency": 2,
        "use_qformer_text_input": True,
    }
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, num_query_tokens=6, image_text_hidden_size=16
    )
    model = Blip2ForImageTextRetrieval(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    images = BlipImageProcessor(size={"height": IMAGE_PX, "width": IMAGE_PX})
    Blip2Processor(images, tokenizer()).save_pretrained(folder)
    return folder


def save_ranker(folder: Path, *, seed: int = 0, context_length: int = 16, bert: bool = True) -> Path:
    """Save a CLIP for ``local-dir:``, with BERT's tokenizer or open_clip's own."""
    torch.manual_seed(seed)
    text = {"context_length": context_length, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    if bert:
        text |= {
            "vocab_size": START_ID + 2,
            "hf_tokenizer_name": "tiny/ranker",
            "tokenizer_kwargs": {"strip_sep_token": False},
            "pool_type": "eos",
            "eos_id": END_ID,
        }
    model_cfg = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": IMAGE_PX, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": text,
    }
    model = open_clip.CLIP(**model_cfg)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if bert:
        tokenizer().save_pretrained(folder)
    return folder
