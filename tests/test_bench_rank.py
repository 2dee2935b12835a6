"""The ranking's benchmark at a small size: captions as long as asked for, operations as counted by hand."""

import numpy as np
import open_clip
import pytest

from jobs.bench.engines.rank import measure_rank, random_captions

SMALL = "ViT-S-32-alt"


@pytest.mark.parametrize(("count", "mean_tokens"), [(1, 14), (22, 14), (200, 14), (200, 6), (50, 30)])
def test_captions_have_the_mean_length_that_is_asked_for(count: int, mean_tokens: int) -> None:
    tokenizer = open_clip.get_tokenizer(SMALL)
    texts = random_captions(tokenizer, count, mean_tokens)
    lengths = np.array([len(tokenizer.encode(text)) + 2 for text in texts])
    assert lengths.mean() == mean_tokens
    assert (lengths == 77).sum() == (count + 19) // 40 and lengths.min() >= 4
    assert len(set(texts)) == count


def test_both_sides_agree_and_capfilt_computes_only_what_is_read() -> None:
    images, captions = 2, 11
    figures = measure_rank(images, captions, 14, 1, SMALL)
    assert figures["mean_tokens"] == 14
    assert figures["max_similarity_difference"] < 1e-6 and figures["same_top_two"] == 1
    assert figures["similarity_spread"] > 1e-3
    width, layers = 256, 10
    # Per token and layer query, key, value, output and MLP; of the attention only a bound.
    full_gflops = 2 * captions * 77 * layers * 12 * width**2 / 1e9
    assert full_gflops < figures["open_clip"]["gflop_text"] < 1.1 * full_gflops
    expected_gflops = full_gflops * 14 / 77 * (layers - 1 + 1 / 6) / layers
    assert expected_gflops < figures["capfilt"]["gflop_text"] < 1.15 * expected_gflops
    assert figures["capfilt"]["gflop_image"] < figures["open_clip"]["gflop_image"]
    for name in ("open_clip", "capfilt"):
        side = figures[name]
        gflop = images * (side["gflop_text"] + side["gflop_image"])
        # Rates follow from the same seconds: all parts of a round together, and the share of the matmul rate.
        seconds = side["tokenize_s"] + side["text_s"] + side["image_s"]
        assert side["images_per_s"] == pytest.approx(images / seconds, rel=0.01)
        assert side["matmul_share"] == pytest.approx(
            gflop / 1e3 / seconds / figures["matmul_tflop_per_s"], rel=0.05, abs=0.002
        )
    for part in ("tokenize", "text", "image"):
        ratio = figures["open_clip"][f"{part}_s"] / figures["capfilt"][f"{part}_s"]
        assert figures[f"{part}_ratio"] == pytest.approx(ratio, rel=0.05, abs=0.01)
