"""The whole crawl against a hostile site, through the command line: every URL ends as it must."""

import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hostile import HostileSite
from tests.processes import cli_here, start_cli
from tests.runs import small_config, with_values

pytestmark = pytest.mark.slow

ONE_GB = 1_000_000_000


def _peak_bytes(pid: int) -> int:
    """Return the most memory a process ever held, 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 if "VmHWM:" in status else 0


def test_every_url_ends_as_it_must(tmp_path: Path) -> None:
    with HostileSite() as site:
        # A row without a URL is counted by the intake and goes no further.
        cases = [case for case in site.cases() if case.url]
        # Twice in the list, with another text: crawled once.
        twice = cases + cases[::3]
        table = pa.table(
            {
                "url": [case.url for case in twice],
                "caption": [case.caption for case in cases] + ["again"] * len(cases[::3]),
            }
        )
        pq.write_table(table, tmp_path / "urls.parquet")
        config = small_config(
            str(tmp_path / "corpus"), tmp_path / "urls.parquet", "http://127.0.0.1:1", per_shard=100
        )
        config = with_values(config, crawl={**type(config.crawl)().model_dump(), **site.crawl_settings()})
        file = tmp_path / "corpus.json"
        file.write_text(json.dumps(config.model_dump(mode="json")))
        start = time.monotonic()
        crawl = start_cli("crawl", "-c", str(file), "--local", "--json")
        peak_bytes = 0
        while crawl.poll() is None:
            peak_bytes = max(peak_bytes, _peak_bytes(crawl.pid))
            time.sleep(0.1)
        seconds = time.monotonic() - start
        output, errors = crawl.communicate()
        assert crawl.returncode == 0, output + errors
        assert site.canary.requests == 0
    query = "SELECT url, status, reason, input_rows FROM samples"
    rows = json.loads(cli_here("sql", config.corpus.path, query, "--json").stdout)
    ended = {row["url"]: (row["status"], row["reason"]) for row in rows}
    urls = {case.url for case in cases}
    assert len(rows) == len(urls)
    assert ended == {case.url: (case.status, case.reason) for case in cases}
    assert sum(row["input_rows"] for row in rows) == len(twice)
    assert 0 < peak_bytes < ONE_GB
    # Each shard's URLs wait at once; two shards' worth of the slowest, and the start.
    assert seconds < 3 * config.crawl.timeout_s + 60
    assert cli_here("verify", config.corpus.path).returncode == 0
