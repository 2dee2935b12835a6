"""Curated shards as others read them: open_clip's trainer, and the steps of LAVIS's LaionDataset."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import webdataset as wds
from PIL import Image

from pipeline.corpus.records import Records
from pipeline.storage.storage import Storage
from tests.runs import curated_rows
from tests.test_run import done, local_ray  # noqa: F401

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(done) -> list[str]:  # noqa: F811
    folder = Path(done.corpus.path) / "curated" / "world"
    return sorted(str(path) for path in folder.glob("*.tar"))


def test_open_clip_trainer_reads_every_kept_sample(done, shards: list[str]) -> None:  # noqa: F811
    from open_clip_train.data import get_wds_dataset

    kept = [row for row in curated_rows(done.corpus.path) if row["status"] == "kept"]
    args = SimpleNamespace(
        train_data=None, val_data="::".join(shards), val_num_samples=len(kept), batch_size=4, workers=0, world_size=1,
        train_data_upsampling_factors=None, seed=0,
    )  # fmt: skip
    data = get_wds_dataset(args, lambda image: image.size[0], is_train=False, tokenizer=lambda text: [text])
    texts = [text for _, batch in data.dataloader for text in batch]
    assert sorted(texts) == sorted(row["caption"] for row in kept)


def test_lavis_laion_dataset_reads_every_kept_sample(done, shards: list[str]) -> None:  # noqa: F811
    # The pipeline of LAVIS's laion_dataset.py, shard order aside; a caption is drawn from the first two.
    dataset = wds.DataPipeline(
        wds.SimpleShardList(shards),
        wds.tarfile_to_samples(),
        wds.shuffle(1000),
        wds.decode("pilrgb"),
        wds.to_tuple("jpg", "json"),
    )
    kept = [row for row in curated_rows(done.corpus.path) if row["status"] == "kept"]
    read = list(dataset)
    assert len(read) == len(kept)
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image, _ in read)
    assert sorted(texts for _, texts in read) == sorted(row["captions"] for row in kept)
    assert all(random.Random(0).choice(texts[:2]) for _, texts in read)


def test_a_folder_made_by_img2dataset_goes_through(base_url: str, tmp_path: Path) -> None:
    import subprocess
    import sys

    import pyarrow as pa
    import pyarrow.parquet as pq

    from jobs.demo.world.site import write_url_list
    from tests.runs import do_run, small_config, with_values

    write_url_list(tmp_path / "urls.parquet", base_url, 24)
    rows = pq.read_table(tmp_path / "urls.parquet")
    # img2dataset fetches a repeated URL again: then a tar holds an image that is not a new sample.
    pq.write_table(pa.concat_tables([rows, rows.slice(0, 4)]), tmp_path / "urls.parquet")
    finished = subprocess.run(
        [
            sys.executable, "-c", "from img2dataset.main import main; main()",
            "--url_list", str(tmp_path / "urls.parquet"), "--input_format", "parquet",
            "--url_col", "url", "--caption_col", "caption", "--output_format", "webdataset",
            "--output_folder", str(tmp_path / "theirs"), "--image_size", "128", "--resize_mode", "keep_ratio",
            "--number_sample_per_shard", "10", "--processes_count", "1", "--thread_count", "8", "--timeout", "2",
            "--enable_wandb", "False", "--compute_hash", "sha256",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    tars = sorted((tmp_path / "theirs").glob("*.tar"))
    assert len(tars) == 3, finished.stderr
    config = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url)
    source = config.source[0].model_copy(
        update={"format": "img2dataset", "input": (str(tmp_path / "theirs"),)}
    )
    config = with_values(config).model_copy(update={"source": (source,)})
    before = {path: path.read_bytes() for path in tars}
    assert do_run(config).exit_code == 0
    succeeded = pa.concat_tables(
        [pq.read_table(path) for path in sorted((tmp_path / "theirs").glob("*.parquet"))]
    ).filter(pa.compute.field("status") == "success")
    rows = curated_rows(config.corpus.path)
    first_keys = {
        row["url"]: row["key"] for row in sorted(succeeded.to_pylist(), key=lambda row: row["key"])[::-1]
    }
    assert len(first_keys) < succeeded.num_rows
    assert {row["url"]: row["key"] for row in rows} == first_keys and len(rows) == len(first_keys)
    assert any(row["status"] == "kept" and "synthetic" in row["origins"] for row in rows)
    assert {path: path.read_bytes() for path in tars} == before
    # Imported where they lie: no second copy of the images under raw/.
    records = Records(Storage(config.corpus.path))
    assert not [info.path for info in records.storage.list("raw") if info.path.endswith(".tar")]
    assert do_run(config).record.shards_done == 0
