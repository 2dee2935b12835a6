"""Digests that decide what is done, what is missing and what is stale."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from pipeline.digests import digest_json
from schemas.config import CapfiltConfig
from schemas.stages import STAGE_INFO, Stage


def output_fields(section: BaseModel) -> dict[str, Any]:
    """Return a section's fields that decide its output: all but those declared with ``tuning()``."""
    fields = type(section).model_fields
    values = section.model_dump(mode="json")
    return {name: value for name, value in values.items() if not _is_tuning(fields[name].json_schema_extra)}


def _is_tuning(extra: Any) -> bool:
    return isinstance(extra, dict) and bool(extra.get("tuning"))


def deciding_fields(config: CapfiltConfig, stage: Stage, kind: str) -> dict[str, Any]:
    """Return the keys of a stage's section that enter its fingerprint."""
    # Human captions are all kept, whatever [select] says.
    ignored = stage == "urls" or (stage, kind) == ("select", "human")
    values = getattr(config, stage)
    section = {} if ignored or values is None else output_fields(values)
    if stage == "select" and section.get("by") == "clip":
        # Keys of the filter, which a selection by CLIP alone does not read: older corpora do not have them.
        section = {name: value for name, value in section.items() if name not in ("by", "min_match")}
    if stage == "crawl":
        # Formats that older corpora refused: no image of theirs would differ.
        section["formats"] = [name for name in section["formats"] if name not in ("AVIF", "HEIF")]
        # A key that older corpora do not have counts where it is on.
        if not section["jpeg_scaling"]:
            del section["jpeg_scaling"]
    # A model is identified by the digest of its files: the same weights at another place are the same.
    for name in ("model", "revision", "pretrained"):
        section.pop(name, None)
    if stage == "rank" and section.get("rerank"):
        section["rerank"] = {"first": section["rerank"]["first"]}
    return section


def stage_fingerprint(
    config: CapfiltConfig,
    stage: Stage,
    kind: str,
    inputs: Mapping[str, Mapping[str, str]],
    models: Sequence[str] = (),
    marks: str | None = None,
) -> str:
    """Return the digest of everything a stage's output on one shard is a function of.

    Args:
        kind: the source's kind, ``web`` or ``human``: rank and select treat them differently.
        inputs: by upstream stage, the sha256 of its outputs on this shard (``ShardRecord.input_digests``).
        models: digests of the weights that the stage loads.
        marks: the digest of the marks that select obeys (``rules_digest``); None where none concern the shard.
    """
    return digest_json(
        {
            **_of_all_shards(_Same(config), stage, kind, tuple(models)),
            "inputs": {name: dict(files) for name, files in inputs.items()},
            # Left out where there are none, so that shards without marks keep their fingerprints.
            **({"marks": marks} if marks else {}),
        }
    )


class _Same:
    """A config as a key that equals itself alone: to compare configs field by field takes as long as a fingerprint."""

    __slots__ = ("config",)

    def __init__(self, config: CapfiltConfig) -> None:
        self.config = config

    def __hash__(self) -> int:
        return id(self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.config is self.config


@functools.lru_cache(maxsize=64)
def _of_all_shards(same: _Same, stage: Stage, kind: str, models: tuple[str, ...]) -> dict[str, Any]:
    """Return what the fingerprints of all shards of a stage share: to read it off the config takes most of the time."""
    config = same.config
    return {
        "stage": stage,
        "version": STAGE_INFO[stage].version,
        "kind": kind if stage in ("rank", "select") else "",
        "seed": config.corpus.seed if stage == "caption" else 0,
        "config": deciding_fields(config, stage, kind),
        "models": list(models),
    }
