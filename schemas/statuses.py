"""How a sample can end: every status and every reason, declared once.

A sample of the crawl ends with a status and, unless it is ``ok``, a reason; a reason belongs to exactly
one status and says whether another try may succeed without a change (``--retry transient``). The others can be
tried again by name once their cause is removed (``--retry forbidden_address``).
"""

from dataclasses import dataclass
from typing import Literal

from schemas.errors import CapfiltError, did_you_mean

SampleStatus = Literal["ok", "failed", "refused", "opted_out", "invalid"]

SAMPLE_STATUSES: dict[str, str] = {
    "ok": "the image was fetched, checked, resized and stored",
    "failed": "the server or the network did not deliver it",
    "refused": "capfilt stopped the fetch at one of its limits: address, scheme, redirects, size or time",
    "opted_out": "the site reserves its content (X-Robots-Tag, TDM-Reservation or robots.txt)",
    "invalid": "what was delivered is not a usable image",
}


@dataclass(frozen=True, slots=True)
class Reason:
    """One way for a sample not to be stored."""

    status: SampleStatus
    meaning: str
    transient: bool = False


REASONS: dict[str, Reason] = {
    # failed: the other side
    "dns": Reason("failed", "the host name did not resolve", transient=True),
    "connect": Reason("failed", "no connection: refused, unreachable or reset", transient=True),
    "tls": Reason("failed", "the TLS handshake or certificate check failed"),
    "timeout": Reason("failed", "the URL's total time ran out, retries included", transient=True),
    "bad_response": Reason("failed", "the answer, or its Content-Encoding, cannot be read", transient=True),
    "body_truncated": Reason(
        "failed", "the body, or what was compressed in it, ended before its end", transient=True
    ),
    "rate_limited": Reason("failed", "429 on every attempt", transient=True),
    "http_4xx": Reason("failed", "a client error; http_status has the code"),
    "http_5xx": Reason("failed", "a server error on every attempt; http_status has the code", transient=True),
    "http_other": Reason("failed", "a status that brings no image, such as 204, 206, 304 or 999"),
    "host_down": Reason(
        "failed", "not asked: the host had failed 20 times in a row (dns, connect, timeout)", transient=True
    ),
    "unreadable_file": Reason("failed", "the file that holds the picture is not there or cannot be read"),
    "retried": Reason("failed", "not asked: a later shard tries this URL again"),
    # refused: our guards
    "bad_url": Reason("refused", "not an absolute http(s) URL with a host"),
    "bad_scheme": Reason("refused", "a scheme other than http and https, at first or after a redirect"),
    "forbidden_address": Reason(
        "refused",
        "the host is loopback, private, link-local, reserved or metadata, and not of crawl.allow_hosts",
    ),
    "forbidden_file": Reason(
        "refused", "a file outside the folders of the source's input, or of crawl.allow_files"
    ),
    "too_many_redirects": Reason("refused", "more redirects than crawl.max_redirects"),
    "redirect_loop": Reason("refused", "a redirect back to a URL already visited"),
    "header_too_large": Reason("refused", "response headers over crawl.max_header_bytes"),
    "body_too_large": Reason("refused", "a body over crawl.max_body_bytes: declared, sent or decompressed"),
    # opted out
    "x_robots_tag": Reason("opted_out", "an X-Robots-Tag directive that crawl.opt_out_directives names"),
    "tdm_reservation": Reason("opted_out", "the TDM-Reservation header is 1"),
    "robots_txt": Reason("opted_out", "robots.txt disallows the path for our user agent"),
    # invalid: the bytes
    "empty_body": Reason("invalid", "zero bytes"),
    "not_an_image": Reason("invalid", "HTML, text or unknown bytes"),
    "format_refused": Reason("invalid", "an image format outside crawl.formats (SVG, TIFF, animations, ...)"),
    "too_many_pixels": Reason("invalid", "more pixels than crawl.max_pixels, read from the header alone"),
    "image_truncated": Reason("invalid", "the image data stops before its end or does not decode"),
    "too_small": Reason("invalid", "the shorter side is under crawl.min_size_px"),
    "aspect_ratio": Reason("invalid", "long side / short side over crawl.max_aspect_ratio"),
    "missing_member": Reason(
        "invalid", "the tar or table that should hold the image holds none for this sample"
    ),
}

# How an image that was captioned and scored can fail to reach the curated shards.
DROP_REASONS: dict[str, str] = {
    "no_candidates": "no caption is left after clean-up",
    "not_scored": "the stored image does not decode, so that nothing could be captioned or scored",
    "filtered_out": "no candidate reaches select.min_match: the filter refuses every text",
    "below_min_score": "no candidate reaches select.min_score",
    "marked": "someone marked the image, or every caption that was left (`capfilt mark`)",
}

# What a person says of samples (`capfilt mark`), and what these are named by.
What = Literal["drop", "not-this-caption"]
By = Literal["uid", "url", "host", "sha256"]


class SampleError(Exception):
    """Say why a sample is not stored: a reason of ``REASONS``, and what was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


TRANSIENT = frozenset(name for name, reason in REASONS.items() if reason.transient)
# What a later shard tries already is decided there.
_RETRYABLE = {name: reason for name, reason in REASONS.items() if name != "retried"}
_STATUSES = tuple(status for status in SAMPLE_STATUSES if status != "ok")


def retried_reasons(words: str) -> frozenset[str]:
    """Return the reasons that comma-separated words name. Raises CapfiltError for any other word."""
    return frozenset().union(*(_named(word.strip().lower()) for word in words.split(",")))


def _named(word: str) -> frozenset[str]:
    if word == "transient":
        return TRANSIENT
    if word in _STATUSES:
        return frozenset(name for name, reason in _RETRYABLE.items() if reason.status == word)
    if word in _RETRYABLE:
        return frozenset((word,))
    near = did_you_mean(word, ("transient", *_STATUSES, *_RETRYABLE)) or "."
    raise CapfiltError(
        f"--retry {word!r} is not a reason or a status{near} Statuses: transient, "
        f"{', '.join(_STATUSES)}. Reasons: {', '.join(_RETRYABLE)}"
    )
