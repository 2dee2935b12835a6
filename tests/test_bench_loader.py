"""The loader's benchmark at a tiny size: both loaders load what was asked for. No times are judged."""

import pytest

from jobs.bench.loader import measure_loader

pytestmark = pytest.mark.training


@pytest.mark.slow
def test_both_loaders_load_the_same_shards() -> None:
    found = measure_loader(64)
    assert (found["images"], found["rounds"], found["size"]) == (64, 3, "512x512")
    for loader in ("capfilt", "webdataset"):
        assert found[loader].pop("share") == {}
        assert all(value > 0 for value in found[loader].values()), found[loader]
        assert found[loader]["images_per_core_s"] == pytest.approx(
            1000 / found[loader]["cpu_ms_per_image"], rel=0.05
        )
    assert found["rate_ratio"] > 0 and found["cpu_ratio"] > 0 and found["bytes_per_picture"] > 10_000
