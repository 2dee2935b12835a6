"""The demo's BLIP and CLIP: the full-size classes at a width that two cores can train.

Both folders have the layout of the published models, so that the production
loaders read them unchanged: transformers' for the captioner, open_clip's
`local-dir:` for the ranker.
"""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    PreTrainedModel,
)

from jobs.demo.world.pictures import INPUT_PX
from jobs.demo.world.scenes import vocabulary

WEIGHTS_DIR = Path(__file__).parent.parent / "weights"
CAPTIONER_DIR = WEIGHTS_DIR / "captioner"
RANKER_DIR = WEIGHTS_DIR / "ranker"

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
WIDTH = 128
# 1 / sqrt(width), as open_clip draws its own. BLIP's 0.02 is right at width 768.
INITIALIZER_RANGE = 0.088
PAD_ID, SEP_ID, DEC_ID = (SPECIAL_TOKENS.index(token) for token in ("[PAD]", "[SEP]", "[DEC]"))
# The longest caption of the grammar has 11 words; [CLS], [SEP] and a full stop come on top.
CONTEXT_LENGTH = 16


def build_tokenizer() -> BertTokenizer:
    """Make BERT's tokenizer over the words of the grammar; all else is [UNK]."""
    tokens = [*SPECIAL_TOKENS, ".", ",", *vocabulary()]
    vocab = {token: index for index, token in enumerate(tokens)}
    return BertTokenizer(
        vocab=vocab, do_lower_case=True, model_max_length=CONTEXT_LENGTH, extra_special_tokens=["[DEC]"]
    )


def build_captioner(vocab_size: int) -> BlipForConditionalGeneration:
    """Make an untrained BLIP captioner of 1.4 million parameters for 64-pixel images."""
    text = {
        "vocab_size": vocab_size,
        "hidden_size": WIDTH,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": DEC_ID,
        "eos_token_id": SEP_ID,
        "sep_token_id": SEP_ID,
        "pad_token_id": PAD_ID,
        "initializer_range": INITIALIZER_RANGE,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": INPUT_PX,
        "patch_size": 8,
        # The class's default of 1e-10 is for loading weights; nothing learns from it.
        "initializer_range": INITIALIZER_RANGE,
    }
    config = BlipConfig(text_config=text, vision_config=vision, initializer_range=INITIALIZER_RANGE)
    return BlipForConditionalGeneration(config)


def ranker_config(vocab_size: int) -> dict:
    """Describe the ranker as open_clip's `model_cfg` does."""
    return {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "image_size": INPUT_PX,
            "layers": 4,
            "width": WIDTH,
            "head_width": 32,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "width": WIDTH,
            "heads": 4,
            "layers": 3,
            "mlp_ratio": 3.0,
            # Any non-empty name: open_clip reads the files beside the config.
            "hf_tokenizer_name": "capfilt/demo-ranker",
            "tokenizer_kwargs": {"strip_sep_token": False},
            "pool_type": "eos",
            "eos_id": SEP_ID,
        },
    }


def build_ranker(vocab_size: int) -> open_clip.CLIP:
    """Make an untrained CLIP of 1.5 million parameters."""
    return open_clip.CLIP(**ranker_config(vocab_size))


def _half(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """Write a model with tensors in half precision; `config.json` says float32, which `from_pretrained` loads."""
    model.save_pretrained(folder, state_dict=_half(model))
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text()) | {"dtype": "float32"}
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_captioner(model: BlipForConditionalGeneration, tokenizer: BertTokenizer, folder: Path) -> None:
    """Write the folder that `BlipForConditionalGeneration.from_pretrained` reads."""
    save_half(model, folder)
    save_tokenizer(tokenizer, folder)
    BlipImageProcessor(size={"height": INPUT_PX, "width": INPUT_PX}).save_pretrained(folder)


def save_ranker(model: open_clip.CLIP, tokenizer: BertTokenizer, folder: Path) -> None:
    """Write the folder that `open_clip.create_model_and_transforms("local-dir:…")` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_half(model), folder / "open_clip_model.safetensors")
    preprocess = {
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    config = {"model_cfg": ranker_config(len(tokenizer)), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: BertTokenizer, folder: Path) -> None:
    """Write the tokenizer's files, `vocab.txt` among them."""
    tokenizer.save_pretrained(folder)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
