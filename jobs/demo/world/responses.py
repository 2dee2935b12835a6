"""What the demo's web answers, and how often: quotas for every block of 400 pages."""

from typing import Literal

from jobs.demo.world.alt_texts import AltKind

ResponseKind = Literal[
    "plain", "non_ascii_path", "exif_rotated", "redirect", "redirect_chain",
    "unavailable_once", "rate_limited_once",
    "not_found", "gone", "forbidden", "server_error", "truncated_jpeg", "html_as_image",
    "tiny", "extreme_aspect", "opted_out", "redirect_loop", "hang", "drip",
]  # fmt: skip

BLOCK = 400
# Pages of each outcome in every block of 400, in shuffled order: 60 fail (15%).
SUCCESSES: dict[ResponseKind, int] = {
    "plain": 309,
    "non_ascii_path": 4,
    "exif_rotated": 4,
    "redirect": 12,
    "redirect_chain": 3,
    "unavailable_once": 6,
    "rate_limited_once": 2,
}
FAILURES: dict[ResponseKind, int] = {
    "not_found": 16,
    "gone": 5,
    "forbidden": 6,
    "server_error": 5,
    "truncated_jpeg": 6,
    "html_as_image": 7,
    "tiny": 4,
    "extreme_aspect": 4,
    "opted_out": 3,
    "redirect_loop": 2,
    "hang": 1,
    "drip": 1,
}
ALT_KINDS: dict[AltKind, int] = {"true": 200, "wrong": 108, "vague": 40, "spam": 52}
OPT_OUTS: tuple[tuple[str, str], ...] = (
    ("X-Robots-Tag", "noai"),
    ("X-Robots-Tag", "max-image-preview: large, noai, noimageai"),
    ("TDM-Reservation", "1"),
)
STATUS_BY_OUTCOME: dict[str, int] = {"not_found": 404, "gone": 410, "forbidden": 403, "server_error": 500}
