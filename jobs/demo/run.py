"""``capfilt demo``: the main job on the demo world, how true its captions are, and what training makes of them.

The truth is the world's: a caption counts as true only if it parses under the world's grammar and every claim in it
holds for the scene that the picture was drawn from. No model takes part in that.
"""

import json
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape

from jobs.demo.corpus_figures import corpus_figures
from jobs.demo.train_in_pairs import train_demo
from jobs.demo.training_configs import HELD_OUT, RERANK, reads_eva
from jobs.demo.world.scenes import is_true
from jobs.demo.world.site import scene_of, serving, write_url_list
from jobs.environment import program_name
from jobs.run import RunOptions, RunResult, run
from pipeline.config import load_config
from pipeline.corpus.records import Records
from pipeline.shards.shard_reader import committed_table
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError

_HERE = Path(__file__).resolve().parent
_RECIPE = _HERE.parent / "recipes" / "demo.toml"
_WEIGHTS = _HERE / "weights"
# Not in the recipe, which experiments and benchmarks take without a filter: no override removes a section.
_FILTER = (
    f"filter.model={json.dumps(str(_WEIGHTS / 'filter'))}",
    "filter.max_tokens=16",
    'select.by="both"',
)
_USUAL_PORT = 8421
_EXAMPLES = 3


def run_demo(out: str, as_json: bool = False, corpus_only: bool = False) -> int:
    """Build the demo corpus in ``out`` (what is there already is kept), train on it, and print what came of both.

    Returns the exit code of the run. Raises CapfiltError where ``out`` holds something else.
    """
    start = time.perf_counter()
    console = Console(stderr=as_json, soft_wrap=True)
    folder = Path(out).absolute()
    urls = folder / "input" / "urls.parquet"
    if folder.exists() and any(folder.iterdir()) and not urls.exists():
        raise CapfiltError(
            f"--out {out}: the folder holds something other than a demo corpus; name another one"
        )
    port = _port_of(urls) if urls.exists() else _free_port()
    try:
        with serving(port) as base_url:
            if not urls.exists():
                urls.parent.mkdir(parents=True, exist_ok=True)
                write_url_list(urls, base_url)
            config = demo_config(folder, urls, base_url, filtered=is_filtered(folder))
            console.print(
                f"serving {pq.read_metadata(urls).num_rows:,} URLs of the demo world at {base_url}",
                highlight=False,
            )
            result = run(config, RunOptions(quiet=as_json), console)
    except OSError as error:
        raise CapfiltError(
            f"--out {out}: its URLs name port {port}, which cannot be served ({error}); remove the folder"
        ) from error
    figures = corpus_figures(config, time.perf_counter() - start)
    if not as_json:
        _print(figures, config, result, console)
    trained: dict[str, Any] = {}
    if result.exit_code == 0 and not corpus_only:
        trained = train_demo(folder, lambda text: console.print(text, highlight=False))
    if as_json:
        print(json.dumps(_rounded(figures | trained)))
    else:
        if trained:
            _print_training(trained, console)
        _print_next(config, out, bool(trained), console)
    return result.exit_code


def demo_config(
    folder: Path, urls: Path, base_url: str, overrides: Sequence[str] = (), filtered: bool = True
) -> CapfiltConfig:
    """Return the demo recipe for a corpus in ``folder`` and a world served at ``base_url``.

    Args:
        filtered: BLIP's filter judges the candidates, and refuses some of them.
    """
    return load_config(
        _RECIPE,
        [
            f"corpus.path={json.dumps(str(folder))}",
            f"source.world.input={json.dumps([str(urls)])}",
            f"caption.model={json.dumps(str(_WEIGHTS / 'captioner'))}",
            f"rank.model={json.dumps('local-dir:' + str(_WEIGHTS / 'ranker'))}",
            f"crawl.allow_hosts={json.dumps([urlsplit(base_url).netloc])}",
            *(_FILTER if filtered else ()),
            *overrides,
        ],
    )


def is_filtered(folder: Path) -> bool:
    """Tell whether the corpus is filtered; one that an earlier version made goes on as it began."""
    records = Records(Storage(str(folder)))
    return not records.list_shards(("select",)) or bool(records.list_shards(("filter",)))


def _free_port() -> int:
    """Return the demo's usual port if it is free: URLs are identities, so equal ports give equal corpora."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", _USUAL_PORT))
        except OSError:
            return 0
    return _USUAL_PORT


def _port_of(urls: Path) -> int:
    first = pq.read_table(urls, columns=["url"])["url"][0].as_py()
    return urlsplit(first).port or 0


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return round(value, 4) if isinstance(value, float) else value


_CAPTIONS = {
    "web": "web",
    "filtered": "filtered: web, BLIP's filter says match",
    "captioned": "captioned: by BLIP, ten an image",
    "capfilt": "CapFilt: CLIP's top two of those that match",
}
# Of a demo that an earlier version began.
_UNFILTERED = "curated: CLIP's top two"


def _print(figures: dict[str, Any], config: CapfiltConfig, result: RunResult, console: Console) -> None:
    reasons = ", ".join(f"{reason} {count}" for reason, count in figures["failures_by_reason"].items())
    lines = [
        f"\n{figures['urls']:,} URLs  ->  {figures['images']:,} images  ->  {figures['curated_images']:,} curated"
        f"  ({figures['dropped']} dropped)  in {figures['seconds']:.0f} s",
        f"{figures['failures']} URLs without an image: {reasons}",
        f"\n{'captions':46}{'texts':>8}{'entirely true':>16}",
    ]
    for name, judged in figures["captions"].items():
        called = _UNFILTERED if name == "capfilt" and config.filter is None else _CAPTIONS[name]
        lines.append(f"  {called:44}{judged['texts']:8,}{judged['true_share']:16.1%}")
    console.print("\n".join(lines) + "\n", highlight=False)
    for rows in examples(config):
        _print_example(rows, console)
    for name, error in result.quarantined.items():
        console.print(f"quarantined: {name}: {escape(error)}")


def _print_training(trained: dict[str, Any], console: Console) -> None:
    chance = trained["stage1"]["chance"]
    lines = [
        f"\nretrieval among {1 / chance:.0f} new scenes, R@1 (chance {chance:.1%}), after as many steps on the same "
        "images",
        f"  {'trained on':18}{'text':>8}{'image':>8}{'text, ITM':>12}{'image, ITM':>12}{'ITM accuracy':>14}",
    ]
    widths = {
        "text_r1": 8,
        "image_r1": 8,
        "text_r1_reranked": 12,
        "image_r1_reranked": 12,
        "itm_accuracy": 14,
    }
    for captions in ("curated", "web"):
        scores = trained["stage1"][captions]
        cells = "".join(f"{scores[name]:{width}.1%}" for name, width in widths.items())
        lines.append(f"  {captions + ' captions':18}{cells}")
    lines.append("\nloss a word of a frozen language model on the true captions of these scenes")
    for family, losses in trained["stage2"].items():
        text_only, with_picture = losses["text_only_loss"], losses["caption_loss"]
        lines.append(
            f"  {family.upper():4}text alone {text_only:.3f}  ->  with the picture {with_picture:.3f}"
        )
    lines.append(f"\ntrained and evaluated in {trained['training_seconds']:.0f} s of CPU\n")
    console.print("\n".join(lines), highlight=False)


def _print_next(config: CapfiltConfig, out: str, trained: bool, console: Console) -> None:
    uid = next((rows[0]["uid"] for rows in examples(config)[-1:]), "")
    query = "SELECT reason, count(*) FROM samples GROUP BY reason ORDER BY 2 DESC"
    commands = [f"stats {out}", f"trace {out} {uid}", f'sql {out} "{query}"']
    exported = f"{out.rstrip('/')}-blip2"
    lines: list[str] = []
    if trained:
        commands += [
            f"evaluate retrieval {out}/checkpoints/stage1/demo-stage1"
            f" --annotations {out}/{HELD_OUT}/captions.json --images {out}/{HELD_OUT} --rerank {RERANK}",
            f"export {out}/checkpoints/stage2/demo-stage2-opt {exported}",
        ]
        if reads_eva(Path(config.corpus.path)):
            lines = _load_lines(exported, f"{out}/{HELD_OUT}/0000.png")
    program = program_name()
    console.print("try next:")
    for command in commands:
        console.print(f"  {program} {command}", highlight=False)
    if lines:
        console.print("and what was exported, in Python, without capfilt:")
    for line in lines:
        console.print(f"  {escape(line)}", highlight=False)


def _load_lines(exported: str, image: str) -> list[str]:
    """Return the lines of Python that load an exported model and print its caption of an image."""
    return [
        "from transformers import pipeline",
        f'blip2 = pipeline("image-text-to-text", {json.dumps(exported)}, max_new_tokens=16)',
        f'print(blip2({json.dumps(image)}, text="a picture of")[0]["generated_text"])',
    ]


def examples(config: CapfiltConfig) -> list[list[dict[str, Any]]]:
    """Return the candidates of the first images whose web caption is not true, best score first, with ``kept``."""
    records = Records(Storage(config.corpus.path))
    for (_, source, shard), record in sorted(records.shards(("select",)).items()):
        curated = {row["uid"]: row for row in committed_table(records, record.outputs["parquet"]).to_pylist()}
        ranked = records.read("filter", source, shard) or records.read("rank", source, shard)
        assert ranked is not None
        by_uid: dict[str, list[dict[str, Any]]] = {}
        for row in committed_table(records, ranked.outputs["parquet"]).to_pylist():
            final = curated[row["uid"]]
            kept = set(zip(final["origins"] or (), final["candidates"] or (), strict=True))
            row["kept"] = (row["origin"], row["candidate"]) in kept
            row["url"] = final["url"]
            row["true"] = is_true(row["text"], scene_of(final["url"]))
            by_uid.setdefault(row["uid"], []).append(row)
        chosen = [
            sorted(rows, key=lambda row: -(row["score"] if row["score"] is not None else -1.0))
            for rows in by_uid.values()
            if any(row["origin"] == "web" and not row["true"] for row in rows)
            and any(row["kept"] for row in rows)
        ]
        return chosen[:_EXAMPLES]
    return []


# The columns of numbers of a candidate, and how they are called.
_SCORES = {"score": "CLIP", "match_probability": "ITM"}


def _print_example(rows: list[dict[str, Any]], console: Console) -> None:
    console.print(f"[bold]{escape(rows[0]['url'])}[/bold]", highlight=False)
    columns = [column for column in _SCORES if column in rows[0]]
    console.print(" " * 8 + "  ".join(f"{_SCORES[column]:5}" for column in columns).rstrip(), highlight=False)
    shown: set[str] = set()
    for row in rows:
        if row["text"] in shown:
            continue
        shown.add(row["text"])
        verdict = "[green]true[/green] " if row["true"] else "[red]false[/red]"
        kept = "kept" if row["kept"] else "    "
        scores = "  ".join("  -  " if row[column] is None else f"{row[column]:.3f}" for column in columns)
        console.print(
            f"  {kept}  {scores}  {verdict}  {row['origin']:9}  {escape(row['text'])}", highlight=False
        )
    console.print()
