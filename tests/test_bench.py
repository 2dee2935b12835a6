"""The benchmarks at tiny sizes: they run, their numbers add up, and they leave nothing behind. No times are judged."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.bench.engines.caption import measure_caption
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
    figures = json.loads(line)
    assert figures["machine"].keys() == MACHINE and figures["machine"]["cpus"] >= 1
    return figures


def require_positive(values: dict[str, Any], *names: str) -> None:
    for name in names:
        assert values[name] > 0, (name, values)


@pytest.mark.slow
def test_crawl_measures_both_crawlers_on_the_same_images() -> None:
    figures = bench("crawl", "--images", "6", "--size", "96x64")
    assert (figures["images"], figures["size"]) == (6, "96x64")
    assert figures["bytes_per_picture"] == sum(len(jpeg(seed, (96, 64))) for seed in range(16)) // 16
    require_positive(figures, "rounds", "bytes_per_picture", "rate_ratio", "cpu_ratio")
    for crawler in ("capfilt", "img2dataset"):
        require_positive(figures[crawler], "images_per_s", "cpu_ms_per_image", "peak_bytes")
    shares = figures["capfilt"]["share"]
    assert shares.keys() == {"fetch", "decode", "write"}
    assert all(share > 0 for share in shares.values()) and sum(shares.values()) <= 1
    assert figures["img2dataset"]["share"] == {}


@pytest.mark.slow
def test_jpegs_decoded_smaller_are_about_as_near_as_encoding_leaves_them() -> None:
    for pictures in bench("jpeg-scaling", "--images", "1", "--rounds", "1")["pictures"].values():
        require_positive(pictures, "cpu_ratio", "mean_levels")
        assert pictures["scale"] >= 2 and pictures["psnr_db"] > pictures["encoding_psnr_db"] - 2


def test_intake_counts_every_row_and_rereads_a_grown_list() -> None:
    figures = bench("intake", "--rows", "1000")
    first, grown, retried = figures["first"], figures["grown"], figures["retried"]
    counts = ("rows_in", "rows_new", "rows_duplicate", "rows_known")
    assert [first[name] for name in counts] == [1000, 900, 100, 0]
    # Repeats of a known URL are known rows too.
    assert [grown[name] for name in counts] == [1010, 9, 1, 1000]
    assert [retried[name] for name in counts] == [909, 909, 0, 0]
    for reading in (first, grown, retried):
        require_positive(reading, "rows_per_s", "seconds", "cpu_s", "shards")
        # Seconds are printed to the hundredth, from which the rate need not follow exactly.
        seconds, rate = reading["seconds"], reading["rows_per_s"]
        assert rate * (seconds - 0.005) <= reading["rows_in"] + 1 <= (rate + 1) * (seconds + 0.005) + 1
        assert reading["peak_bytes"] >= reading["idle_bytes"] > 0


@pytest.mark.slow
def test_look_shows_every_page() -> None:
    figures = bench("look", "--images", "300")
    assert (figures["images"], figures["shards"]) == (300, 1)
    assert len(figures["pages"]) > 15 and {row["shards_read"] for row in figures["pages"]} == {1}
    require_positive(figures, "open_s", "resident_bytes")


@pytest.mark.slow
def test_look_serves_a_corpus_of_many_shards_that_is_kept(tmp_path: Path) -> None:
    folder = str(tmp_path / "kept")
    for _ in range(2):
        figures = bench("look", "--shards", "2", "--folder", folder)
        assert figures["shards"] == 2 and figures["peak_bytes"] > 0
        assert [row["page"] for row in figures["pages"]][:2] == ["address printed", "first screen, at once"]
    refused = CliRunner().invoke(app, ["bench", "look", "--shards", "3", "--folder", folder])
    assert "has 2 shards, not 3" in str(refused.exception)


@pytest.mark.slow
@pytest.mark.ray
def test_commits_of_idle_stages_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    # A socket's name is short.
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    [row] = bench("commits", "--shards", "12")["corpora"]
    assert (row["shards"], row["commits"]) == (12, 48)
    require_positive(row, "driver_ms", "worker_ms", "commits_per_s")


@pytest.mark.slow
def test_a_stopped_verification_is_measured_beside_a_whole_one() -> None:
    # A second of reading: a small corpus is read before the signal reaches it.
    figures = bench("verify", "--samples", "16000")
    assert (figures["samples"], figures["shards"]) == (16_000, 8)
    assert figures["differences"] > 2 and figures["whole"]["read_before"] == 0
    # Of the first half, one is damaged and is read again.
    assert figures["gone on with"]["read_before"] >= 1
    for verification in ("whole", "stopped", "gone on with"):
        require_positive(figures[verification], "peak_bytes")


@pytest.mark.slow
def test_storage_is_compared_with_s3fs_and_its_requests_counted() -> None:
    figures = bench("storage", "--operations", "16", "--rounds", "1", "--shards", "1")
    assert [row["operation"] for row in figures["operations"]] == ["create", "read"]
    assert all(
        value > 0 for row in figures["operations"] for name, value in row.items() if name != "operation"
    )
    requests = {(row["work"], row["for"]): row for row in figures["requests"]}
    for stage, data_files in {"caption": 1, "rank": 1, "select": 2}.items():
        row = requests[stage, "a shard"]
        assert row["PUT"] - data_files == 2 and row["POST"] + row["DELETE"] == 1
    assert {row["LIST"] for (_, of), row in requests.items() if of == "a shard"} == {0}
    assert requests["nothing to do", "a shard"]["PUT"] == 0


def test_manifest_asks_a_whole_corpus_both_ways() -> None:
    images = 32
    figures = bench("manifest", "--images", str(images))
    assert (figures["urls"], figures["candidates"]) == (images + images // 3, 11 * images)
    # One shard, five stages.
    assert (figures["shards"], figures["records"]) == (1, 5)
    require_positive(figures["bytes_per_image"], "crawl", "caption", "rank", "select")
    require_positive(figures, "first_compaction_s", "idle_compaction_s", "peak_bytes")
    queries = {row["query"]: row for row in figures["queries"]}
    assert queries["one shard"]["rows"] == images
    assert queries["one uid"]["rows"] == 11 and queries["by shard and origin"]["rows"] == 2
    assert queries["trace"]["rows"] == 1 and queries["trace"].pop("duckdb_s") is None
    assert all(value > 0 for row in queries.values() for name, value in row.items() if name != "query")


def test_scale_asks_a_corpus_of_many_shards() -> None:
    figures = bench("scale", "--shards", "2", "--s3", "--only", "status")
    [row] = figures["commands"]
    assert (figures["shards"], row["command"]) == (2, "status")
    require_positive(row, "cpu_s", "peak_mib", "requests")


def test_select_keeps_every_image() -> None:
    figures = bench("select", "--images", "12")
    assert figures["images"] == 12
    assert figures["bytes_per_picture"] == sum(len(jpeg(seed, (512, 384))) for seed in range(16)) // 16
    require_positive(figures["select"], "images_per_s", "cpu_ms_per_image", "peak_bytes")
    assert figures["select"]["share"].keys() == {"read", "select", "write"}
    assert 0 < sum(figures["select"]["share"].values()) <= 1


def test_images_are_decoded_in_every_way() -> None:
    figures = bench("images", "--images", "1")
    assert figures["images"] == 1
    assert [(row["size"], row["way"]) for row in figures["sizes"]] == [
        (size, resize) for size in ("512x384", "512x512", "1024x768") for resize in ("naive", "exact", "fast")
    ]
    for row in figures["sizes"]:
        require_positive(row, "images_per_core_s", "ratio")
        assert row["way"] != "naive" or row["ratio"] == 1


def test_rank_prints_both_sides() -> None:
    figures = bench("rank", "--model", "ViT-S-32-alt", "--images", "1", "--rounds", "1", "--mean-tokens", "9")
    assert (figures["images"], figures["captions"], figures["mean_tokens"]) == (1, 11, 9)
    assert figures["max_similarity_difference"] < 1e-6
    require_positive(figures, "text_ratio", "image_ratio", "matmul_tflop_per_s")
    for side in ("open_clip", "capfilt"):
        require_positive(figures[side], "images_per_s", "gflop_text", "matmul_share", "peak_bytes")


def test_whole_shards_have_a_rate_and_a_share_of_the_engines() -> None:
    # Seven images are nine: every fourth URL of the synthetic corpus failed.
    figures = bench("shard", "--size", "demo", "--images", "7", "--shards", "3", "--rounds", "1")
    assert (figures["images"], figures["shards"], figures["dtype"]) == (9, 3, "float32")
    for stage in ("caption", "rank"):
        require_positive(figures[stage], "images_per_s", "bare_images_per_s", "bare_share")
        rates = figures[stage]["images_per_s"] / figures[stage]["bare_images_per_s"]
        assert figures[stage]["bare_share"] == pytest.approx(rates, rel=0.02) and rates <= 1
        seconds = figures[stage]["seconds"]
        assert seconds.keys() == {"read", "decode", "gpu", "write", "wait", "total"}
        require_positive(seconds, "read", "gpu", "write", "total")
        # What is rounded to a millisecond, six times.
        assert max(seconds[part] for part in ("read", "gpu", "write")) <= seconds["total"] + 0.01


@pytest.mark.slow
def test_captioning_is_compared_with_transformers() -> None:
    figures = measure_caption(32, 1, SMALL_BLIP, "ViT-S-32-alt")
    assert figures["grid_same_tokens"] == 1
    # One round: ratios follow from the rates beside them.
    for suffix in ("", "_early_stop"):
        transformers_s, capfilt_s = (
            figures[f"decode{suffix}_s_per_image{side}"] for side in ("_transformers", "")
        )
        assert figures[f"decode_ratio{suffix}"] == pytest.approx(
            transformers_s / capfilt_s, rel=0.02, abs=0.01
        )
        assert 0 < figures[f"gflop_ours{suffix}"] < figures["gflop_transformers"]
    rates = figures["images_per_s"] / figures["transformers_images_per_s"]
    assert figures["end_to_end_ratio"] == pytest.approx(rates, rel=0.02, abs=0.01)
    flops = figures["gflop_transformers"] / figures["gflop_ours"]
    assert figures["decode_flops_ratio"] == pytest.approx(flops, rel=0.02)
    assert figures["gflop_ours_early_stop"] < figures["gflop_ours"]
    assert figures["decode_early_stop_mean_tokens"] < figures["decode_mean_tokens"] == 19


def test_without_json_a_table_is_printed() -> None:
    done = CliRunner().invoke(app, ["bench", "intake", "--rows", "100"])
    assert done.exit_code == 0, done.output
    header, rows_in, rows_new, *_ = map(str.split, done.stdout.splitlines())
    assert header == ["measure", "first", "grown", "retried"]
    assert rows_in == ["rows_in", "100", "101", "91"] and rows_new == ["rows_new", "90", "1", "91"]


@pytest.mark.parametrize("size", ["640", "640x", "32x32", "0x480", "640x480x3"])
def test_a_wrong_size_is_a_user_error(size: str) -> None:
    done = CliRunner().invoke(app, ["bench", "crawl", "--size", size])
    assert isinstance(done.exception, CapfiltError) and "--size" in str(done.exception)


def test_pictures_differ_by_seed_alone_and_weigh_what_photographs_do() -> None:
    picture = jpeg(1, (640, 480))
    assert picture == jpeg(1, (640, 480)) != jpeg(2, (640, 480))
    assert decode_rgb(picture).size == (640, 480)
    assert 1.2 < 8 * len(picture) / (640 * 480) < 2.2
