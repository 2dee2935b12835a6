"""docs/crawl.md: how a URL can end, and what bounds its fetch; the tables come from schemas/statuses.py."""

from schemas.statuses import REASONS, SAMPLE_STATUSES

_INTRODUCTION = """\
# The crawl: statuses and bounds

Every URL of every list ends with a status and, unless that is `ok`, a reason; `detail` says what was seen. They are
columns of `samples` ([manifest](manifest.md)); `capfilt failures CORPUS` counts them. `make docs` writes this page;
edit `jobs/docs/crawl_page.py` and `schemas/statuses.py`.

## Bounds
Keys are those of [`[crawl]`](config.md); what has no key is fixed.

- **Addresses**: http and https; public addresses only, checked at each redirect and then connected to;
  `allow_hosts` exempts.
- **Time**: `timeout_s` for a URL in all; `connect_timeout_s` for a connection, a TLS handshake or a silence;
  waiting in a queue of our own does not count.
- **Tries**: `max_attempts`, of transient failures only, after `backoff_s` (doubling) or `Retry-After`.
- **Redirects**: `max_redirects`, to no URL twice.
- **Headers**: `max_header_bytes`, those of interim answers (1xx, which are passed over) included.
- **Body**: `max_body_bytes`: declared, sent, and decompressed.
- **`Content-Encoding`**: none is asked for; `gzip` and `deflate` are undone, up to 4 in a row and 100 streams
  in a body, each bounded as the body is; what begins like an image is not compressed, whatever its label.
- **Requests at a host**: `requests_per_host` at once and `rate_per_host` a second, over all workers.
- **Hosts that are down**: after 20 failures in a row (`dns`, `connect`, `timeout`) left alone for as long again
  as they had failed, 10 minutes at most.
- **Names (DNS)**: `connect_timeout_s` for an answer; one look-up for all URLs of a host and port, remembered
  for 5 minutes, a failure for 1; those that nobody awaits any more end by themselves, and `threads` + 256 may
  be under way.
- **Robots.txt**: with `robots_txt = true`: the first 512,000 bytes, for a day (a failure: a minute); rules of
  1,000 sites and 50 MB are kept; a path whose length times the wildcards of the rules is over 50 million is
  left alone.
- **Images**: `max_pixels`, `min_size_px`, `max_aspect_ratio` and `formats`, judged by the header before
  anything is decoded.

Statuses 200 and 203 deliver. 999, and whatever else is over 599, is a refusal, and asked once.

"""


def crawl_page() -> str:
    """Return docs/crawl.md."""
    parts = ["## Statuses", "", "| status | meaning |", "|---|---|"]
    parts += [f"| `{status}` | {meaning} |" for status, meaning in SAMPLE_STATUSES.items()]
    parts += [
        "",
        "Transient reasons (*t*) are those of `--retry transient`. Any reason and any status but `ok` can be given to",
        "`--retry`, with commas between: [retries](intake.md#retries).",
        "",
        "| reason | status | | meaning |",
        "|---|---|---|---|",
    ]
    parts += [
        f"| `{name}` | {reason.status} | {'*t*' if reason.transient else ''} | {reason.meaning} |"
        for name, reason in REASONS.items()
    ]
    return _INTRODUCTION + "\n".join(parts) + "\n"
