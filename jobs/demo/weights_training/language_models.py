"""The demo's OPT and T5: the classes of stage 2's language models at a size that a minute trains.

Both folders have the layout of the published models: config.json, model.safetensors, tokenizer files. A word of the
world's grammar is a token.
"""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from jobs.demo.weights_training.models import WEIGHTS_DIR, save_half
from jobs.demo.world.scenes import vocabulary

OPT_DIR = WEIGHTS_DIR / "opt"
T5_DIR = WEIGHTS_DIR / "t5"

# In the places of the published tokenizers; a line break ends OPT's captions, a full stop T5's sentences.
_OPT_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "\n")
_T5_SPECIAL = ("<pad>", "</s>", "<unk>", ".")


def build_opt() -> tuple[OPTForCausalLM, PreTrainedTokenizerFast]:
    """Make an untrained OPT and its tokenizer, which puts ``</s>`` first, as the published one does."""
    words = _word_level(_OPT_SPECIAL)
    words.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    config = OPTConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=96,
        word_embed_proj_dim=96,
        ffn_dim=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        # Sixteen queries and a caption, or four captions.
        max_position_embeddings=64,
        dropout=0.0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
        # 1 / sqrt(width). The class's 0.02 is right at the published widths.
        init_std=0.1,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    return OPTForCausalLM(config), tokenizer


def build_t5() -> tuple[T5ForConditionalGeneration, PreTrainedTokenizerFast]:
    """Make an untrained T5 of FlanT5's kind (gated GELU, own output head); its tokenizer puts ``</s>`` last."""
    words = _word_level(_T5_SPECIAL)
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = T5Config(
        vocab_size=words.get_vocab_size(),
        d_model=80,
        d_kv=20,
        d_ff=160,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    return T5ForConditionalGeneration(config), tokenizer


def save_language(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder that ``from_pretrained`` reads; tensors in half precision, loaded as float32."""
    save_half(model, folder)
    tokenizer.save_pretrained(folder)


def _word_level(special: tuple[str, ...]) -> Tokenizer:
    words = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate((*special, *vocabulary()))}, "<unk>")
    )
    # Words, marks and line breaks; the blanks between them go.
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation(),
        ]
    )
    return words
