"""Untrained models in the published sizes and layouts, that say about as much as the published ones do.

Speed, memory and agreement do not depend on training. What does is made up for: BLIP's own initial weights of
the vision tower are all but zero (1e-10), and a decoder without a bias for it never ends a caption.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

# Salesforce/blip-image-captioning-large.
BLIP_LARGE = {
    "text_config": {
        "vocab_size": 30_524, "hidden_size": 768, "encoder_hidden_size": 1024, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512,
        "bos_token_id": 30_522, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 102,
        "initializer_range": 0.02,
    },
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 384, "patch_size": 16, "initializer_range": 0.02,
    },
    "initializer_range": 0.02,
}  # fmt: skip
# Of a step's end: captions of five tokens at least, about eleven in the mean and twenty at most.
END_CHANCE = 0.13
_SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
_NUM_WORDS = 30_522


def blip_large(
    device: torch.device, seed: int = 0, sizes: Mapping[str, Any] = BLIP_LARGE
) -> BlipForConditionalGeneration:
    """Return a captioner of BLIP-large's size, or of other ones, with random weights, float32."""
    torch.manual_seed(seed)
    with device:
        model = BlipForConditionalGeneration(BlipConfig.from_dict(dict(sizes)))
    return model.eval()


@torch.inference_mode()
def end_after(model: BlipForConditionalGeneration, image_BPE: Tensor, chance: float) -> None:
    """Bias the end so that a step takes it with about this chance, given the 50 likeliest tokens; 0: never."""
    config = model.config.text_config
    bias_V = model.text_decoder.cls.predictions.bias
    bias_V[config.sep_token_id] = 0.0
    start = torch.full((len(image_BPE), 1), config.bos_token_id, device=image_BPE.device)
    logits_BV = model.text_decoder(start, encoder_hidden_states=image_BPE).logits[:, -1].float()
    if chance == 0:
        bias_V[config.sep_token_id] = -1e4
        return
    others = logits_BV.topk(49).values.logsumexp(-1)
    odds = torch.tensor(chance / (1 - chance), device=image_BPE.device).log()
    bias_V[config.sep_token_id] = (others + odds - logits_BV[:, config.sep_token_id]).mean()


def save_captioner(model: BlipForConditionalGeneration, folder: Path) -> Path:
    """Save the model with a tokenizer and a processor, as the hub holds it.

    Its words are words of CLIP's vocabulary, so that a caption has as many tokens there as here.
    """
    model.save_pretrained(folder)
    words = [word[:-4] for word in open_clip.get_tokenizer("ViT-L-14").encoder if word.endswith("</w>")]
    words = [word for word in words if word.isascii() and word.isalpha()]
    names = iter([*dict.fromkeys(words), *(f"word{number}" for number in range(_NUM_WORDS))])
    vocabulary = {_SPECIAL.get(index) or next(names): index for index in range(_NUM_WORDS)}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    side = model.config.vision_config.image_size
    BlipImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def save_ranker(folder: Path, name: str = "ViT-L-14", seed: int = 0) -> Path:
    """Save a CLIP of the named architecture with random weights for ``local-dir:``, OpenAI's activation in it."""
    torch.manual_seed(seed)
    model_cfg = {**open_clip.get_model_config(name), "quick_gelu": True}
    model = open_clip.CLIP(**model_cfg)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    config = {"model_cfg": model_cfg, "preprocess_cfg": {**preprocess, "interpolation": "bicubic"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder
