"""What ``--retry`` names, and what becomes of the URLs that it queues again."""

import json
from pathlib import Path

import pytest

from pipeline.intake.retries import count_retries, queue_retries
from pipeline.stages.crawl import CrawlWorker
from pipeline.web.dns import Resolver
from pipeline.web.urls import FetchError, WebUrl
from schemas.config import CrawlConfig
from schemas.errors import CapfiltError
from schemas.records import ShardTask
from schemas.statuses import REASONS, TRANSIENT, retried_reasons
from tests.hostile import HostileSite
from tests.processes import cli_here
from tests.test_crawl import listed_task, samples_of
from tests.url_tasks import corpus_config, new_records


def named_by_status(status: str) -> set[str]:
    return {name for name, reason in REASONS.items() if reason.status == status} - {"retried"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("transient", set(TRANSIENT)),
        ("forbidden_address", {"forbidden_address"}),
        ("http_4xx,forbidden_address", {"http_4xx", "forbidden_address"}),
        (" Refused , dns ", named_by_status("refused") | {"dns"}),
        ("failed,refused,opted_out,invalid", set(REASONS) - {"retried"}),
        ("transient,image_truncated", {*TRANSIENT, "image_truncated"}),
    ],
)
def test_words_name_reasons(words: str, expected: set[str]) -> None:
    assert retried_reasons(words) == expected


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("forbiden_address", "did you mean forbidden_address?"),
        ("dns,refussed", "'refussed' is not a reason or a status; did you mean refused?"),
        ("transiant", "did you mean transient?"),
        ("zzz", "'zzz' is not a reason or a status. Statuses: transient, failed, refused"),
        ("", "'' is not a reason or a status. Statuses"),
        ("dns,", "'' is not a reason"),
        ("ok", "'ok' is not a reason or a status"),
        ("retried", "'retried' is not a reason or a status"),
    ],
)
def test_a_wrong_word_is_told_with_the_right_ones(words: str, hint: str) -> None:
    with pytest.raises(CapfiltError) as caught:
        retried_reasons(words)
    assert hint in str(caught.value) and "Reasons: dns, connect," in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["run", "crawl"])
def test_a_wrong_word_ends_a_command_before_the_config_is_read(command: str) -> None:
    told = cli_here(command, "-c", "no-such.toml", "--retry", "transient", "--retry", "http_5x")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith(
        "capfilt: --retry 'http_5x' is not a reason or a status; did you mean http_5xx?"
    )


def test_refused_addresses_are_tried_again_once_they_are_allowed(tmp_path: Path) -> None:
    """Nothing but the key is missing, and nothing but the retry brings the URLs back: each of them, once."""
    with HostileSite() as site:
        paths = ["/plain.jpg", "/404", "/redirect/chain"]
        records, settings = new_records(tmp_path), site.crawl_settings()
        refusing, allowing = (
            corpus_config(tmp_path, settings | changed) for changed in ({"allow_hosts": ()}, {})
        )
        task = listed_task(records, [site.url(path) for path in paths])
        first = CrawlWorker(refusing, records)(task)
        assert first.counts == {"refused": 3, "refused/forbidden_address": 3}
        host = f"127.0.0.1:{site.port}"
        assert {row["detail"] for row in samples_of(records, first)} == {
            f'127.0.0.1 is not a public address; crawl.allow_hosts = ["{host}"] would exempt it'
        }

        [outcome] = queue_retries(allowing, records, "run")
        assert outcome.record is None
        reasons = retried_reasons("forbidden_address")
        assert count_retries(allowing, records, reasons) == {"web": 3}
        [outcome] = queue_retries(allowing, records, "run", reasons)
        assert outcome.record is not None and list(outcome.record.shards) == ["00001"]
        for again in (reasons, retried_reasons("refused"), retried_reasons("refused,failed")):
            [outcome] = queue_retries(allowing, records, "run", again)
            assert outcome.record is None
        second = CrawlWorker(allowing, records)(retry_of_shard(records, "00001"))
        assert second.counts == {"ok": 2, "failed": 1, "failed/http_4xx": 1}
        before, after = samples_of(records, first), samples_of(records, second)
        assert [(row["uid"], row["url"], row["captions"]) for row in before] == [
            (row["uid"], row["url"], row["captions"]) for row in after
        ]
        assert {row["retry_of"] for row in after} == {"00000"}

        # What failed otherwise at its last try is not "refused" any more, whatever it was before.
        [outcome] = queue_retries(allowing, records, "run", retried_reasons("refused"))
        assert outcome.record is None
        [outcome] = queue_retries(allowing, records, "run", retried_reasons("http_4xx,dns"))
        assert outcome.record is not None and outcome.record.rows_new == 1


def retry_of_shard(records, shard: str) -> ShardTask:
    return ShardTask(
        corpus=records.storage.root, stage="crawl", source="web", kind="web", shard=shard, run_id="run",
        fingerprint="test", inputs={"urls": records.url_shards()["web", shard]},
    )  # fmt: skip


def test_what_was_refused_wrongly_is_tried_again(tmp_path: Path) -> None:
    """Bytes count as well: a reason of any status names its URLs, those of all shards."""
    with HostileSite() as site:
        records, config = new_records(tmp_path), corpus_config(tmp_path, site.crawl_settings())
        paths = ["/truncated.jpg", "/plain.jpg", "/html.jpg", "/opted-out/0.jpg"]
        CrawlWorker(config, records)(listed_task(records, [site.url(path) for path in paths]))
        for word, url in (("image_truncated", "/truncated.jpg"), ("opted_out", "/opted-out/0.jpg")):
            [outcome] = queue_retries(config, records, "run", retried_reasons(word))
            assert outcome.record is not None
            [shard] = outcome.record.shards
            record = CrawlWorker(config, records)(retry_of_shard(records, shard))
            assert [row["url"] for row in samples_of(records, record)] == [site.url(url)]


def test_a_dry_run_counts_what_it_would_queue(tmp_path: Path) -> None:
    with HostileSite() as site:
        records = new_records(tmp_path)
        config = corpus_config(tmp_path, site.crawl_settings() | {"allow_hosts": ()})
        CrawlWorker(config, records)(listed_task(records, [site.url("/plain.jpg"), site.url("/404")]))
    file = tmp_path / "corpus.json"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    told = cli_here("crawl", "-c", str(file), "--retry", "refused", "--dry-run", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["retries"] == {"web": 2}
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


# -- hosts that are exempt ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "form"),
    [
        ("127.0.0.1", "127.0.0.1:80"),
        ("images.example", "images.example:80"),
        ("http://127.0.0.1:8461/", "127.0.0.1:8461"),
        ("https://me@images.example/a.jpg", "images.example:443"),
        ("images.example:", "images.example:80"),
        ("images.example:99999", "images.example:80"),
        ("::1", "[::1]:80"),
        ("[fd00::1]", "[fd00::1]:80"),
        ("*.example:80", "example.org:443"),
        ("", "example.org:443"),
    ],
)
def test_an_exempt_host_without_a_port_is_refused(entry: str, form: str) -> None:
    with pytest.raises(ValueError, match="is not a host with its port") as caught:
        CrawlConfig(allow_hosts=(entry,))
    assert f'"{entry}" is not a host with its port; write "{form}"' in str(caught.value)


def test_the_config_names_the_entry(tmp_path: Path) -> None:
    file = tmp_path / "corpus.toml"
    file.write_text(
        '[corpus]\npath = "corpus"\n[[source]]\nname = "web"\ninput = ["a.tsv"]\n'
        '[crawl]\nallow_hosts = ["127.0.0.1:80", "localhost"]\n'
    )
    told = cli_here("plan", "-c", str(file))
    assert told.returncode == 2
    assert told.stderr == (
        f'capfilt: {file}:7: crawl.allow_hosts[1]: "localhost" is not a host with its port; '
        'write "localhost:80"\n'
    )


@pytest.mark.parametrize(
    ("entry", "url"),
    [
        ("127.0.0.1:8080", "http://127.0.0.1:8080/"),
        ("LocalHost:80", "http://localhost/"),
        ("::1:8080", "http://[::1]:8080/"),
        ("[::1]:443", "https://[::1]/"),
    ],
)
def test_exempt_hosts_in_every_form(entry: str, url: str) -> None:
    [entry] = CrawlConfig(allow_hosts=(entry,)).allow_hosts
    assert Resolver((entry,)).addresses(WebUrl.parse(url), 5.0)
    with pytest.raises(FetchError, match=r"forbidden_address: .* crawl\.allow_hosts = "):
        Resolver(("other.example:80",)).addresses(WebUrl.parse(url), 5.0)
