"""What the ranks of a training read of the shards, counted with its own sampler on the paper's mix of sources.

A shard is read whole for the part of its samples that a reader needs. The reader is a node, whose ranks share one
checked copy, and for comparison each rank by itself.
"""

import time
from collections.abc import Collection
from typing import Any

from jobs.bench.fixtures.corpus import curated_corpus
from jobs.bench.fixtures.pictures import jpegs
from pipeline.storage.scratch import temporary_folder
from schemas.pretrain import DataConfig
from schemas.records import OutputFile, SnapshotShard
from training.data.node_files import node_file
from training.data.sampler import SampleIndex, Sampler
from training.data.shard_index import index_tar, open_shard
from training.data.snapshot import Snapshot, Source

# BLIP-2, section 4.1 and appendix: the images of each source, and the batch of stage 1 with ViT-g.
_IMAGES = {
    "cc12m": 10_000_000,
    "cc3m": 3_000_000,
    "coco": 113_000,
    "laion": 115_000_000,
    "sbu": 860_000,
    "vg": 100_000,
}
_BATCH_SIZE = 1_680
# A crawled shard of 10,000 URLs keeps about so many.
_IMAGES_PER_SHARD = 7_500
_RANKS_PER_NODE = 8
# Some thirty groups of LAION's shards.
_SAMPLES = 2_000_000
_SHUFFLE_SHARDS = DataConfig.model_fields["shuffle_shards"].default
_IMAGES_OPENED = 10_000


def measure_shard_reads(ranks: int) -> dict[str, Any]:
    """Count what ``ranks`` ranks read, eight on a node, and measure the opening of one shard of 10,000 images."""
    return bytes_read(ranks, _SAMPLES) | _opening()


def bytes_read(ranks: int, samples: int) -> dict[str, float]:
    """Count the bytes read for each byte that is trained on, over the first samples; images count as equally large."""
    nodes = -(-ranks // _RANKS_PER_NODE)
    snapshot = Snapshot(tuple(_source(name, images) for name, images in _IMAGES.items()), digest="")
    sampler = Sampler(snapshot, 0, _SHUFFLE_SHARDS)
    by_node: set[tuple[int, int, int]] = set()
    by_rank: set[tuple[int, int, int]] = set()
    for start in range(0, samples, _BATCH_SIZE):
        indices = sampler.indices(start, start + _BATCH_SIZE)
        by_node |= _openings(indices, nodes)
        by_rank |= _openings(indices, ranks)

    def ratio(openings: Collection[tuple[int, int, int]]) -> float:
        return round(sum(snapshot.shards[shard].samples for _, shard, _ in openings) / samples, 2)

    return {
        "ranks": ranks,
        "nodes": nodes,
        "batch_size": _BATCH_SIZE,
        "samples": samples,
        "bytes_read_per_byte_used": ratio(by_node),
        "by_each_rank_alone": ratio(by_rank),
    }


def _openings(indices: list[SampleIndex], readers: int) -> set[tuple[int, int, int]]:
    """Return (reader, shard, group) of a step's samples: a reader keeps a shard open while its group lasts."""
    return {
        (place * readers // len(indices), index.shard, index.group) for place, index in enumerate(indices)
    }


def _source(name: str, images: int) -> Source:
    firsts = range(0, images, _IMAGES_PER_SHARD)
    return Source(
        slice=0, name=name, kind="web", shards=tuple(_shard(name, first, images) for first in firsts)
    )


def _shard(source: str, first: int, images: int) -> SnapshotShard:
    rows = min(_IMAGES_PER_SHARD, images - first)
    name = f"{first // _IMAGES_PER_SHARD:05}"
    return SnapshotShard(
        corpus="", source=source, shard=name, tar=OutputFile(path=name, bytes=rows, sha256="", rows=rows)
    )


def _opening() -> dict[str, float]:
    """Return the CPU seconds of the thread that opens a checked shard: by its Parquet, and by walking its tar."""
    with temporary_folder() as folder:
        corpus, [record] = curated_corpus(folder, 1, _IMAGES_OPENED, jpegs((64, 64)))
        tar_file, parquet = record.outputs["tar"], record.outputs["parquet"]
        path = corpus.config.corpus.path
        shard = SnapshotShard(
            corpus=path, source=record.source, shard=record.shard, tar=tar_file, parquet=parquet
        )
        with node_file(corpus.records, tar_file) as tar, node_file(corpus.records, parquet):
            start = time.thread_time()
            with open_shard(corpus.records, shard) as opened:
                by_parquet_s = time.thread_time() - start
                assert len(opened) == record.rows_out
            start = time.thread_time()
            assert len(index_tar(tar, adjacent=True).keys) == record.rows_out
            return {"open_cpu_s": round(by_parquet_s, 3), "walk_cpu_s": round(time.thread_time() - start, 3)}
