"""The benchmarks at tiny sizes: they run, their numbers add up, and they leave nothing behind. No times are judged."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.bench.caption import measure_caption
from jobs.bench.fixtures.models import BLIP_LARGE
from jobs.bench.fixtures.pictures import jpeg
from jobs.cli.main import app
from pipeline.images.decode import decode_rgb
from schemas.errors import CapfiltError

# As BLIP-large, but for depth and width.
SMALL_BLIP = {
    "text_config": BLIP_LARGE["text_config"]
    | {"hidden_size": 32, "encoder_hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
       "intermediate_size": 64, "initializer_range": 0.1},
    "vision_config": BLIP_LARGE["vision_config"]
    | {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
       "patch_size": 32, "initializer_range": 0.1},
    "initializer_range": 0.1,
}  # fmt: skip
MACHINE = {"date", "cpus", "architecture", "memory_gib", "python", "load_1m"}


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each benchmark a temporary folder of its own, and see that it is empty afterwards."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    assert list(folder.glob("capfilt-*")) == []


def bench(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["bench", *arguments, "--json"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    [line] = done.stdout.splitlines()
    found = json.loads(line)
    assert found["machine"].keys() == MACHINE and found["machine"]["cpus"] >= 1
    return found


def require_positive(values: dict[str, Any], *names: str) -> None:
    for name in names:
        assert values[name] > 0, (name, values)


@pytest.mark.slow
def test_crawl_measures_both_crawlers_on_the_same_images() -> None:
    found = bench("crawl", "--images", "6", "--size", "96x64")
    assert (found["images"], found["size"]) == (6, "96x64")
    assert found["bytes_per_picture"] == sum(len(jpeg(seed, (96, 64))) for seed in range(16)) // 16
    require_positive(found, "rounds", "bytes_per_picture", "rate_ratio", "cpu_ratio")
    for crawler in ("capfilt", "img2dataset"):
        require_positive(found[crawler], "images_per_s", "cpu_ms_per_image", "peak_bytes")
    shares = found["capfilt"]["share"]
    assert shares.keys() == {"fetch", "decode", "write"}
    assert all(share > 0 for share in shares.values()) and sum(shares.values()) <= 1
    assert found["img2dataset"]["share"] == {}


def test_intake_counts_every_row_and_rereads_a_grown_list() -> None:
    found = bench("intake", "--rows", "1000")
    first, grown = found["first"], found["grown"]
    counts = ("rows_in", "rows_new", "rows_duplicate", "rows_known")
    assert [first[name] for name in counts] == [1000, 900, 100, 0]
    # Repeats of a known URL are known rows too.
    assert [grown[name] for name in counts] == [1010, 9, 1, 1000]
    for reading in (first, grown):
        require_positive(reading, "rows_per_s", "seconds", "cpu_s", "shards")
        # Seconds are printed to the hundredth, from which the rate need not follow exactly.
        seconds, rate = reading["seconds"], reading["rows_per_s"]
        assert rate * (seconds - 0.005) <= reading["rows_in"] + 1 <= (rate + 1) * (seconds + 0.005) + 1
        assert reading["peak_bytes"] >= reading["idle_bytes"] > 0


def test_manifest_asks_a_whole_corpus_both_ways() -> None:
    images = 32
    found = bench("manifest", "--images", str(images))
    assert (found["urls"], found["candidates"]) == (images + images // 3, 11 * images)
    # One shard, five stages.
    assert (found["shards"], found["records"]) == (1, 5)
    require_positive(found["bytes_per_image"], "crawl", "caption", "rank", "select")
    require_positive(found, "first_compaction_s", "idle_compaction_s", "peak_bytes")
    queries = {row["query"]: row for row in found["queries"]}
    assert queries["one shard"]["rows"] == images
    assert queries["one uid"]["rows"] == 11 and queries["by shard and origin"]["rows"] == 2
    assert queries["trace"]["rows"] == 1 and queries["trace"].pop("duckdb_s") is None
    assert all(value > 0 for row in queries.values() for name, value in row.items() if name != "query")


def test_select_keeps_every_image() -> None:
    found = bench("select", "--images", "12")
    assert found["images"] == 12
    assert found["bytes_per_picture"] == sum(len(jpeg(seed, (512, 384))) for seed in range(16)) // 16
    require_positive(found["select"], "images_per_s", "cpu_ms_per_image", "peak_bytes")
    assert found["select"]["share"].keys() == {"read", "select", "write"}
    assert 0 < sum(found["select"]["share"].values()) <= 1


def test_images_are_decoded_in_every_way() -> None:
    found = bench("images", "--images", "1")
    assert found["images"] == 1
    assert [(row["size"], row["way"]) for row in found["sizes"]] == [
        (size, way) for size in ("512x384", "512x512", "1024x768") for way in ("naive", "exact", "fast")
    ]
    for row in found["sizes"]:
        require_positive(row, "images_per_core_s", "ratio")
        assert row["way"] != "naive" or row["ratio"] == 1


def test_rank_prints_both_sides() -> None:
    found = bench("rank", "--model", "ViT-S-32-alt", "--images", "1", "--rounds", "1", "--mean-tokens", "9")
    assert (found["images"], found["captions"], found["mean_tokens"]) == (1, 11, 9)
    assert found["max_similarity_difference"] < 1e-6
    require_positive(found, "text_ratio", "image_ratio", "matmul_tflop_per_s")
    for side in ("open_clip", "capfilt"):
        require_positive(found[side], "images_per_s", "gflop_text", "matmul_share", "peak_bytes")


def test_whole_shards_have_a_rate_and_a_share_of_the_engines() -> None:
    # Seven images are nine: every fourth URL of the synthetic corpus failed.
    found = bench("shard", "--size", "demo", "--images", "7", "--shards", "3", "--rounds", "1")
    assert (found["images"], found["shards"], found["dtype"]) == (9, 3, "float32")
    for stage in ("caption", "rank"):
        require_positive(found[stage], "images_per_s", "bare_images_per_s", "bare_share")
        rates = found[stage]["images_per_s"] / found[stage]["bare_images_per_s"]
        assert found[stage]["bare_share"] == pytest.approx(rates, rel=0.02) and rates <= 1
        seconds = found[stage]["seconds"]
        assert seconds.keys() == {"read", "decode", "gpu", "write", "wait", "total"}
        require_positive(seconds, "read", "gpu", "write", "total")
        # What is rounded to a millisecond, six times.
        assert max(seconds[part] for part in ("read", "gpu", "write")) <= seconds["total"] + 0.01


@pytest.mark.slow
def test_captioning_is_compared_with_transformers() -> None:
    found = measure_caption(32, 1, SMALL_BLIP, "ViT-S-32-alt")
    assert found["grid_same_tokens"] == 1
    # One round: ratios follow from the rates beside them.
    for suffix in ("", "_early_stop"):
        theirs, ours = (found[f"decode{suffix}_s_per_image{side}"] for side in ("_transformers", ""))
        assert found[f"decode_ratio{suffix}"] == pytest.approx(theirs / ours, rel=0.02, abs=0.01)
        assert 0 < found[f"gflop_ours{suffix}"] < found["gflop_transformers"]
    rates = found["images_per_s"] / found["transformers_images_per_s"]
    assert found["end_to_end_ratio"] == pytest.approx(rates, rel=0.02, abs=0.01)
    flops = found["gflop_transformers"] / found["gflop_ours"]
    assert found["decode_flops_ratio"] == pytest.approx(flops, rel=0.02)
    assert found["gflop_ours_early_stop"] < found["gflop_ours"]
    assert found["decode_early_stop_mean_tokens"] < found["decode_mean_tokens"] == 19


def test_without_json_a_table_is_printed() -> None:
    done = CliRunner().invoke(app, ["bench", "intake", "--rows", "100"])
    assert done.exit_code == 0, done.output
    header, rows_in, rows_new, *_ = map(str.split, done.stdout.splitlines())
    assert header == ["measure", "first", "grown"]
    assert rows_in == ["rows_in", "100", "101"] and rows_new == ["rows_new", "90", "1"]


@pytest.mark.parametrize("size", ["640", "640x", "32x32", "0x480", "640x480x3"])
def test_a_wrong_size_is_the_users_mistake(size: str) -> None:
    done = CliRunner().invoke(app, ["bench", "crawl", "--size", size])
    assert isinstance(done.exception, CapfiltError) and "--size" in str(done.exception)


def test_pictures_differ_by_seed_alone_and_weigh_what_photographs_do() -> None:
    picture = jpeg(1, (640, 480))
    assert picture == jpeg(1, (640, 480)) != jpeg(2, (640, 480))
    assert decode_rgb(picture).size == (640, 480)
    assert 1.2 < 8 * len(picture) / (640 * 480) < 2.2
