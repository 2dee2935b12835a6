"""The dataset card of a corpus: what the Hub shows of it, and the ``configs`` by which ``datasets`` reads it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from pipeline.manifest.manifest import Manifest, Query
from schemas.catalog.sql_text import quote
from schemas.names import printable

Row = dict[str, Any]

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip
_LICENCE_NAMES = ("license", "licence", "license_url", "rights")
# The sections that decide what a corpus is; the others name this machine's folders and workers.
_SECTIONS = ("caption", "filter", "rank", "select")
# Said in the list of models; they may be folders of this machine.
_MODEL_KEYS = ("model", "pretrained", "revision", "rerank")
_CELL_CHARS = 200
_ROWS = 20

_SOURCES = """
    SELECT source, sum(rows_in) FILTER (stage = 'crawl')::BIGINT AS urls, sum(rows_out) FILTER (stage = 'crawl')::BIGINT
        AS images, sum(rows_out) FILTER (stage = 'select')::BIGINT AS curated,
        sum(bytes) FILTER (stage = 'select')::BIGINT AS curated_bytes
    FROM shards WHERE state = 'committed' GROUP BY source ORDER BY source"""
_OUTCOMES = """
    SELECT source, stage, status, reason, "rows" FROM outcomes
    WHERE kind = 'status' AND stage IN ('crawl', 'select') AND status NOT IN ('ok', 'kept')
    ORDER BY "rows" DESC, source, reason"""
_CAPTIONS = """
    SELECT source, split_part(name, '/', 2) AS origin, sum(number)::BIGINT AS captions FROM (
        SELECT source, unnest(map_keys(counts)) AS name, unnest(map_values(counts)) AS number
        FROM shards WHERE state = 'committed' AND stage = 'select')
    WHERE name LIKE 'captions/%' GROUP BY ALL ORDER BY ALL"""
_MARKS = """
    SELECT what, named_by, reason, count(*) AS "values" FROM marks WHERE undone_at IS NULL GROUP BY ALL
    ORDER BY count(*) DESC, what, named_by, reason"""
# Those that made the corpus; of a model in a folder of this machine, the folder's own name.
_MODELS = """
    SELECT kind, regexp_replace(name, '^(local-dir:|/).*/', '') AS name, revision, digest FROM models
    WHERE digest IN (SELECT unnest(models) FROM shards WHERE state = 'committed') ORDER BY kind, name, digest"""
_TARS = """
    SELECT source, paths['tar'] AS tar, rows_out FROM shards
    WHERE state = 'committed' AND stage = 'select' ORDER BY source, shard"""


def dataset_card(manifest: Manifest) -> str:
    """Return the card as the text of a README.md: metadata in YAML, then figures in Markdown."""
    with manifest.open(in_place=True) as query:
        sources = query.rows(_SOURCES)
        configs = _configs(query.rows(_TARS))
        body = "\n".join(_body(query, manifest.storage.name, sources))
    images = sum(row["curated"] or 0 for row in sources)
    data = DatasetCardData(
        pretty_name=manifest.storage.name,
        task_categories=["image-to-text", "text-to-image"],
        size_categories=next((name for bound, name in _SIZES if images < bound), "n>1T"),
        tags=["capfilt", "webdataset"],
        configs=configs,
    )
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _configs(tars: Sequence[Row]) -> list[Row]:
    """Return the ``configs`` of the metadata: all sources, and each where there are several."""
    by_source: dict[str, list[Row]] = {}
    for row in tars:
        by_source.setdefault(row["source"], []).append(row)
    paths = {name: source_paths for name, rows in by_source.items() if (source_paths := _paths(name, rows))}
    everything = [path for source_paths in paths.values() for path in source_paths]
    named = [("default", everything), *(paths.items() if len(paths) > 1 else ())]
    return [
        {"config_name": name, "data_files": [{"split": "train", "path": source_paths}]}
        for name, source_paths in named
        if source_paths
    ]


def _paths(source: str, rows: Sequence[Row]) -> list[str]:
    """Return a glob, or each tar by name where there are empty ones, from which ``datasets`` learns no columns."""
    full = [row["tar"] for row in rows if row["rows_out"]]
    return [f"curated/{source}/*.tar"] if full and len(full) == len(rows) else full


def _body(query: Query, name: str, sources: Sequence[Row]) -> Iterator[str]:
    total = {key: sum(row[key] or 0 for row in sources) for key in ("urls", "images", "curated")}
    yield f"# {_cell(name)}\n"
    yield (
        f"{total['urls']:,} URLs gave {total['images']:,} images, of which {total['curated']:,} are curated: each "
        "with its best captions of those that BLIP wrote and the web gave. Made by capfilt.\n"
    )
    yield "Each sample has an image, `json` (its captions, best first) and `txt` (the best one):\n"
    yield '```python\nfrom datasets import load_dataset\n\nload_dataset("path/to/this/folder")\n```\n'
    yield from _section("Sources", sources)
    yield from _section("Where the rest went", query.rows(_OUTCOMES), "Nothing was left out.")
    yield from _section("Captions by origin", query.rows(_CAPTIONS))
    yield from _licences(query)
    opted_out = [row for row in query.rows(_OUTCOMES) if row["status"] == "opted_out"]
    yield from _section("Opt-outs", opted_out, "No image was left out because its site reserves its content.")
    yield from _section("Marks", query.rows(_MARKS), "No sample is marked.")
    yield from _section("Models", query.rows(_MODELS))
    yield from _config(query)


def _licences(query: Query) -> Iterator[str]:
    """Yield the commonest values of a column of licences, if the lists have one among ``extra_columns``."""
    for name in _LICENCE_NAMES:
        rows = query.rows(
            f"""SELECT json_extract_string(extra, {quote(f'$."{name}"')}) AS licence, count(*) AS images
            FROM samples WHERE status = 'ok' AND extra LIKE {quote(f'%"{name}"%')}
            GROUP BY licence HAVING licence IS NOT NULL ORDER BY images DESC, licence LIMIT {_ROWS}"""
        )
        if rows:
            yield from _section(f"Licences (column {name} of the lists)", rows)


def _config(query: Query) -> Iterator[str]:
    rows = query.rows(
        "SELECT config FROM runs WHERE command <> 'pretrain' ORDER BY started_at DESC, run_id DESC LIMIT 1"
    )
    if rows:
        config = json.loads(rows[0]["config"])
        shown = {
            section: {key: value for key, value in config[section].items() if key not in _MODEL_KEYS}
            for section in _SECTIONS
            if config.get(section)
        }
        text = json.dumps(shown, indent=1).replace("`", "\\u0060")
        yield f"## Config\n\n```json\n{text}\n```\n"


def _section(title: str, rows: Sequence[Mapping[str, Any]], otherwise: str = "") -> Iterator[str]:
    """Yield a heading and a table; where there are no rows, a sentence, or nothing at all."""
    if not rows and not otherwise:
        return
    yield f"## {title}\n"
    if not rows:
        yield f"{otherwise}\n"
        return
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([_cell(row[name]) for name in names] for row in rows[:_ROWS])]
    yield "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    if len(rows) > _ROWS:
        yield f"and {len(rows) - _ROWS:,} more rows\n"


def _cell(value: Any) -> str:
    """Return a value as text that stays text in Markdown, whoever wrote it."""
    if value is None:
        return ""
    text = f"{value:,}" if isinstance(value, int) else printable(str(value))[:_CELL_CHARS]
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#!~" else letter for letter in text)
