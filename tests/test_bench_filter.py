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
