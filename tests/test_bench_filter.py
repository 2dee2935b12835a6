"""The filter's benchmark at a small size: the ways agree, and the operations are those that the design allows for."""

import pytest

from jobs.bench.engines.filter import SIZES, measure_filter, random_tokens

SMALL = {
    "text_config": SIZES["base"]["text_config"]
    | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
       "encoder_hidden_size": 64, "vocab_size": 200, "bos_token_id": 198},
    "vision_config": SIZES["base"]["vision_config"]
    | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
       "image_size": 64},
    "image_text_hidden_size": 16,
    "initializer_range": 0.2,
}  # fmt: skip


def test_texts_have_the_mean_length_that_is_asked_for() -> None:
    tokens = random_tokens(3, 11, 14, 200)
    lengths = [len(ids) for of_image in tokens for ids in of_image]
    assert len(lengths) == 33 and sum(lengths) / 33 == 14 and min(lengths) == 7 and max(lengths) == 21


def test_the_ways_agree_and_differ_in_operations() -> None:
    figures = measure_filter(2, 11, 14, 1, SMALL)
    assert figures["max_difference"] < 1e-5 and figures["spread"] > 1e-3
    width, layers, ffn, positions, texts, tokens = 64, 2, 128, 17, 11, 14
    gflop = {name: figures[name]["gflop"] for name in ("transformers", "features_once", "capfilt")}
    # Linear layers, two operations a weight: the tower's, keys and values of the image, and the texts' own.
    tower = 2 * positions * (layers * (4 * width**2 + 2 * width * ffn) + 3 * 16**2 * width)
    image_kv = 2 * positions * layers * 2 * width**2
    text = 2 * texts * tokens * layers * (6 * width**2 + 2 * width * ffn)
    # Attention, four operations a pair and channel: within the image, to the image, and within texts padded to 21.
    attended = 4 * width * layers * (positions**2 + texts * tokens * positions + texts * 21**2)
    assert gflop["capfilt"] * 1e9 == pytest.approx(tower + image_kv + text + attended, rel=0.01)
    assert gflop["transformers"] > gflop["features_once"] > gflop["capfilt"]
    assert figures["ratio"] > 0 and figures["features_once_ratio"] > 0


def test_a_stage_1_of_blip2_agrees_and_computes_less() -> None:
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    sizes = SIZES["blip2"] | {
        "vision_config": SIZES["blip2"]["vision_config"] | shape | {"image_size": 56},
        "qformer_config": SIZES["blip2"]["qformer_config"]
        | shape
        | {"vocab_size": 200, "encoder_hidden_size": 64},
    }
    figures = measure_filter(2, 11, 14, 1, sizes)
    assert figures["max_difference"] < 1e-5 and figures["spread"] > 1e-3
    width, ffn, positions, texts, tokens, queries = 64, 128, 17, 11, 14, 32
    # Linear layers, two operations a weight: the tower's, and keys and values of the image for the first layer alone.
    tower = 2 * positions * (2 * (4 * width**2 + 2 * width * ffn) + 3 * 14**2 * width)
    image_kv = 2 * positions * 2 * width**2
    # Queries read the image in the first layer; texts have no feed-forward in the last one.
    rows = (
        2
        * texts
        * width
        * (2 * 4 * width * (queries + tokens) + 2 * ffn * (2 * queries + tokens) + 2 * width * queries)
    )
    # Attention, four operations a pair and channel: within the image, to it, and among queries and texts padded to 21.
    attended = 4 * width * (2 * positions**2 + texts * queries * positions + 2 * texts * (queries + 21) ** 2)
    head = 2 * texts * queries * width * 2
    total = tower + image_kv + rows + attended + head
    assert figures["capfilt"]["gflop"] * 1e9 == pytest.approx(total, rel=0.01)
    assert figures["transformers"]["gflop"] > figures["features_once"]["gflop"] > figures["capfilt"]["gflop"]
