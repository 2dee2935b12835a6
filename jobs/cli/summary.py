"""The report at the end of a run: a few lines for people, one JSON object for programs."""

import shlex
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape

from jobs.environment import program_name
from jobs.run import RunResult
from pipeline.runs.survey import Totals
from pipeline.text import readable_duration
from schemas.names import printable
from schemas.stages import STAGES
from schemas.statuses import DROP_REASONS, REASONS

# What to do about the commonest reason, where no URL gave an image or no image was kept.
_ASK_AGAIN = (
    "check the workers' network and proxy, then ask again: {program} crawl -c {config} --retry transient"
)
_ADVICE = {
    **dict.fromkeys(("dns", "connect", "timeout", "host_down", "http_5xx", "bad_response"), _ASK_AGAIN),
    "tls": "check the workers' clock and certificates",
    "rate_limited": "lower crawl.rate_per_host, then {program} crawl -c {config} --retry transient",
    "http_4xx": "the list may be old, or the site may want another crawl.user_agent",
    "bad_url": "see that source.NAME.url_column names the column of the URLs",
    "bad_scheme": "see that source.NAME.url_column names the column of the URLs",
    "forbidden_address": "a host of your own network is named in crawl.allow_hosts",
    "not_an_image": "the URLs may be those of pages; see source.NAME.url_column",
    "format_refused": "crawl.formats says which formats are accepted",
    "too_small": "crawl.min_size_px is the limit",
    "aspect_ratio": "crawl.max_aspect_ratio is the limit",
    "too_many_pixels": "crawl.max_pixels is the limit",
    "body_too_large": "crawl.max_body_bytes is the limit",
    "filtered_out": "lower select.min_match, then {program} select -c {config} --recompute",
    "below_min_score": "lower select.min_score, then {program} select -c {config} --recompute",
}
_REASONS_NAMED = 4


def result_json(result: RunResult, config_file: str = "FILE") -> dict[str, Any]:
    """Return a run's result as one JSON object."""
    record = result.record
    return {
        "run_id": record.run_id,
        "outcome": record.outcome,
        "shards_done": record.shards_done,
        "shards_skipped": record.shards_skipped,
        "quarantined": result.quarantined,
        "note": result.note,
        "seconds": round(_seconds(result), 1),
        **{name: getattr(result.totals, name) for name in Totals.__slots__},
        "warning": _warning(result, config_file),
        "next": _next(result, config_file),
        "stages": {
            stage: {"done": count.done, "total": count.total}
            for stage in STAGES
            if (count := result.survey.of(stage)).total
        },
    }


def print_result(result: RunResult, console: Console, config_file: str = "FILE") -> None:
    """Say what was done, what came of it, shard by shard what was not done, and what to do next."""
    for line in result_lines(result, config_file):
        console.print(escape(printable(line)), highlight=False)


def result_lines(result: RunResult, config_file: str) -> Iterator[str]:
    """Yield what a run ends with, line by line."""
    record, survey = result.record, result.survey
    stages = ", ".join(
        f"{stage} {count.done:,} of {count.total:,}" for stage in STAGES if (count := survey.of(stage)).total
    )
    for name, error in sorted(result.quarantined.items()):
        yield f"quarantined: {name}: {error.splitlines()[-1] if error else ''}"
    if record.outcome == "done" and not record.shards_done:
        yield f"nothing to do: {result.note or 'every shard is done'}"
    else:
        yield (
            f"{record.outcome}: {record.shards_done:,} shards in {readable_duration(_seconds(result))}, "
            f"run {record.run_id}" + (f" ({stages})" if stages else "")
        )
        yield from _yield_lines(result.totals)
        if result.note:
            yield result.note
    if warning := _warning(result, config_file):
        yield f"warning: {warning}"
    yield _next(result, config_file)


def _yield_lines(totals: Totals) -> Iterator[str]:
    """Say how many URLs gave images, how many images went on, and why the others did not."""
    parts = []
    if totals.urls:
        parts.append(f"{totals.images:,} of {totals.urls:,} URLs gave an image{_reasons(totals.lost)}")
    counts = {"images captioned": totals.captioned, "ranked": totals.ranked, "filtered": totals.filtered}
    parts += [f"{images:,} {what}" for what, images in counts.items() if images]
    if totals.selected:
        parts.append(f"{totals.kept:,} of {totals.selected:,} kept{_reasons(totals.dropped)}")
    if totals.gpu_hours:
        parts.append(f"{totals.gpu_hours:,.3g} GPU-hours")
    if parts:
        yield "; ".join(parts)


def _reasons(counted: Counter[str]) -> str:
    """Return the commonest reasons and their rows, in brackets; nothing where there are none."""
    named = [f"{rows:,} {reason}" for reason, rows in counted.most_common(_REASONS_NAMED)]
    if rest := counted.total() - sum(rows for _, rows in counted.most_common(_REASONS_NAMED)):
        named.append(f"{rest:,} for other reasons")
    return f" (lost: {', '.join(named)})" if named else ""


def _warning(result: RunResult, config_file: str) -> str:
    """Return, where the corpus yields nothing, the commonest reason and what to do about it; else nothing."""
    if not result.yields_nothing:
        return ""
    totals = result.corpus_totals
    if totals.images or not totals.urls:
        what, counted = f"none of {totals.selected:,} images is kept", totals.dropped
    else:
        what, counted = f"none of {totals.urls:,} URLs gave an image", totals.lost
    if not counted:
        return what
    [(reason, rows)] = counted.most_common(1)
    meaning = REASONS[reason].meaning if reason in REASONS else DROP_REASONS.get(reason, "")
    advice = _ADVICE.get(reason, "{program} failures {corpus} shows examples")
    advice = advice.format(
        program=program_name(), config=shlex.quote(config_file), corpus=shlex.quote(result.corpus)
    )
    return f"{what}; {rows:,} for the reason {reason} ({meaning}): {advice}"


def _next(result: RunResult, config_file: str) -> str:
    """Return what to do after this run, with the command."""
    program, corpus = program_name(), shlex.quote(result.corpus)
    match result.record.outcome:
        case "interrupted":
            return "the same command goes on where this one stopped"
        case "partial" if not result.quarantined:
            return "the same command goes on where this one stopped"
        case "partial":
            errors = f"{program} shards {corpus} --state quarantined"
            return f"the same command tries them again; {errors} shows the errors"
    if result.yields_nothing:
        dropped = f'sql {corpus} "SELECT * FROM dropped LIMIT 10"'
        return f"next: {program} {dropped if result.corpus_totals.selected else f'failures {corpus}'}"
    later = [
        stage for stage in STAGES if (count := result.survey.of(stage)).total and count.done == count.total
    ]
    if "select" not in later:
        return f"next: {program} run -c {shlex.quote(config_file)}, which does what is missing"
    return f"next: {program} stats {corpus}"


def _seconds(result: RunResult) -> float:
    record = result.record
    ended = record.finished_at or record.started_at
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(record.started_at)).total_seconds()
