"""The stages of a corpus, declared once: everything that is said of a stage by its name stands in one table.

Imports nothing but the statuses, so that the command line names the stages without waiting for a library.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from schemas.statuses import SAMPLE_STATUSES

Stage = Literal["urls", "crawl", "caption", "rank", "filter", "select"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInfo:
    """What holds for every shard of a stage."""

    # The folder under the corpus in which its files lie, and the names of the outputs in its records.
    folder: str
    outputs: tuple[str, ...]
    # What its output is a function of, apart from config, weights and input: raise it when code changes the output.
    version: int = 1
    # Of a source that does not go through one of these, the others are read.
    reads: tuple[Stage, ...] = ()
    # What its rows end as: of the counts of its records, those that sum up to rows_in. All others are notes.
    row_statuses: tuple[str, ...] = ()
    # Estimates until a corpus has measured its own, from the operations counted in docs/benchmarks.md: of one worker,
    # a CPU's, or for a model of full size one H200 in bf16; and of one core in float32 with that model.
    images_per_s: float = 0.0
    bytes_per_image: float = 0.0
    cpu_images_per_s: float | None = None
    # Of its command's --help.
    help: str = ""


STAGE_INFO: dict[Stage, StageInfo] = {
    "urls": StageInfo(folder="urls", outputs=("parquet",)),
    "crawl": StageInfo(
        folder="raw",
        outputs=("parquet", "tar"),
        reads=("urls",),
        row_statuses=tuple(SAMPLE_STATUSES),
        images_per_s=80.0,
        bytes_per_image=45e3,
        help="Fetch the images of the lists into raw shards.",
    ),
    "caption": StageInfo(
        folder="captions",
        outputs=("parquet",),
        version=2,
        reads=("crawl",),
        row_statuses=("ok", "failed"),
        images_per_s=500.0,
        bytes_per_image=600.0,
        cpu_images_per_s=0.33,
        help="Write the synthetic captions of every crawled image.",
    ),
    "rank": StageInfo(
        folder="scores",
        outputs=("parquet",),
        version=2,
        reads=("crawl", "caption"),
        row_statuses=("scored", "unscored"),
        images_per_s=1300.0,
        bytes_per_image=700.0,
        cpu_images_per_s=0.90,
        help="Score every candidate caption with CLIP.",
    ),
    "filter": StageInfo(
        folder="matches",
        outputs=("parquet",),
        reads=("crawl", "caption", "rank"),
        row_statuses=("scored", "unscored"),
        images_per_s=520.0,
        bytes_per_image=800.0,
        cpu_images_per_s=0.23,
        help="Judge every candidate caption with BLIP's filter.",
    ),
    "select": StageInfo(
        folder="curated",
        outputs=("parquet", "tar"),
        reads=("crawl", "rank", "filter"),
        row_statuses=("kept", "dropped"),
        images_per_s=2000.0,
        bytes_per_image=45e3,
        help="Keep the best captions and write the curated shards. Needs no GPU.",
    ),
}

# Order of the work; ``urls`` is made by the intake, the others by workers.
STAGES: tuple[Stage, ...] = tuple(stage for stage in STAGE_INFO if stage != "urls")
STAGE_FOLDERS: dict[Stage, str] = {stage: info.folder for stage, info in STAGE_INFO.items()}


@cache
def stages_of_source(kind: str, *, filtered: bool, chosen_by: str) -> tuple[Stage, ...]:
    """Return the stages that a source goes through, in order.

    Human captions are neither written anew nor filtered; CLIP ranks nothing where the filter alone decides.

    Args:
        kind: ``web`` or ``human``.
        filtered: the config has a section ``[filter]``.
        chosen_by: ``select.by``.
    """
    absent: set[Stage] = set() if filtered else {"filter"}
    if kind == "human":
        absent |= {"caption", "filter"}
    elif chosen_by == "itm":
        absent.add("rank")
    return tuple(stage for stage in STAGES if stage not in absent)
