"""The ranking's benchmark at a small size: captions as long as asked for, operations as counted by hand."""

import numpy as np
import open_clip
import pytest
import torch

from jobs.bench.rank import measure_rank, random_captions

SMALL = "ViT-S-32-alt"


@pytest.mark.parametrize(("count", "mean_tokens"), [(1, 14), (22, 14), (200, 14), (200, 6), (50, 30)])
def test_captions_have_the_mean_length_that_is_asked_for(count: int, mean_tokens: int) -> None:
    tokenizer = open_clip.get_tokenizer(SMALL)
    texts = random_captions(tokenizer, count, mean_tokens)
    lengths = np.array([len(tokenizer.encode(text)) + 2 for text in texts])
    assert lengths.mean() == mean_tokens
    assert (lengths == 77).sum() == (count + 19) // 40 and lengths.min() >= 4
    assert len(set(texts)) == count


def test_both_sides_agree_and_ours_computes_what_is_read() -> None:
    images, captions = 2, 11
    found = measure_rank(images, captions, 14, 1, torch.device("cpu"), SMALL)
    assert found["mean_tokens"] == 14
    assert found["max_similarity_difference"] < 1e-6 and found["same_top_two"] == 1
    assert found["similarity_spread"] > 1e-3
    width, layers = 256, 10
    # Per token and layer query, key, value, output and MLP; of the attention only a bound.
    theirs = 2 * captions * 77 * layers * 12 * width**2 / 1e9
    assert theirs < found["open_clip"]["gflop_text"] < 1.1 * theirs
    ours = theirs * 14 / 77 * (layers - 1 + 1 / 6) / layers
    assert ours < found["capfilt"]["gflop_text"] < 1.15 * ours
    assert found["capfilt"]["gflop_image"] < found["open_clip"]["gflop_image"]
    for name in ("open_clip", "capfilt"):
        assert all(value > 0 for value in found[name].values()), found[name]
        assert found[name]["matmul_share"] < 1.2
    for name in ("text_ratio", "image_ratio", "tokenize_ratio", "matmul_tflop_per_s"):
        assert found[name] > 0
