"""The loader's benchmark at a tiny size: both loaders load what was asked for. No times are judged."""

import pytest

from jobs.bench.training.loader import measure_loader

pytestmark = pytest.mark.training


@pytest.mark.slow
def test_both_loaders_load_the_same_shards() -> None:
    figures = measure_loader(64)
    assert (figures["images"], figures["rounds"], figures["size"]) == (64, 3, "512x512")
    for loader in ("capfilt", "webdataset"):
        assert figures[loader].pop("share") == {}
        assert all(value > 0 for value in figures[loader].values()), figures[loader]
        assert figures[loader]["images_per_core_s"] == pytest.approx(
            1000 / figures[loader]["cpu_ms_per_image"], rel=0.05
        )
    assert figures["rate_ratio"] > 0 and figures["cpu_ratio"] > 0 and figures["bytes_per_picture"] > 10_000
