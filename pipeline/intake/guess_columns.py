"""Which columns of a list hold its URLs and its captions: guessed from names and from the first rows."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pipeline.intake.lists.preview import ListPreview

_URL = re.compile(r"\s*(?:https?|data):", re.I)
_PATH = re.compile(r"\s*file:|[^\n]*\.(?:jpe?g|png|webp|gif|bmp)\s*", re.I)
# In this order, of columns whose cells fit; names are compared without case, "_", "-" and blanks.
_URL_NAMES = (
    "url",
    "imageurl",
    "imgurl",
    "contenturl",
    "link",
    "uri",
    "src",
    "image",
    "filename",
    "filepath",
    "path",
)
_CAPTION_NAMES = (
    "caption", "captions", "text", "alttext", "alt", "title", "description", "sentence", "sentences", "prompt"
)  # fmt: skip
# Columns that are sentences in most of their cells, though no name says so.
_LEAST_WORDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GuessedColumns:
    """Columns of a list: ``url`` holds URLs or, where ``holds_paths``, paths of files; no caption is empty."""

    url: str
    caption: str
    others: tuple[str, ...]
    holds_paths: bool
    own_hosts: tuple[str, ...]


def guess_columns(preview: ListPreview) -> GuessedColumns | None:
    """Return what the columns of a list are, or None where none holds URLs or paths of images."""
    texts = {name: _texts(preview.rows, name) for name in preview.names if name not in preview.image_names}
    urls = [name for name, cells in texts.items() if _share(_URL, cells) > 0.5]
    paths = [name for name, cells in texts.items() if _share(_PATH, cells) > 0.5 and name not in urls]
    if not (image_columns := urls or paths):
        return None
    url = min(image_columns, key=lambda name: _place(name, _URL_NAMES))
    caption = guess_caption(texts, (*urls, *paths))
    return GuessedColumns(
        url=url,
        caption=caption,
        others=tuple(name for name in preview.names if name not in (url, caption)),
        holds_paths=not urls,
        own_hosts=_own_hosts(texts[url]) if urls else (),
    )


def guess_caption(texts: dict[str, list[str]], taken: Sequence[str] = ()) -> str:
    """Return the column of captions: by its name, else the one with the most words; empty where none is likely."""
    rest = {name: cells for name, cells in texts.items() if cells and name not in taken}
    named = [name for name in rest if _place(name, _CAPTION_NAMES) < len(_CAPTION_NAMES)]
    if named:
        return min(named, key=lambda name: _place(name, _CAPTION_NAMES))
    words = {name: sum(len(cell.split()) for cell in cells) / len(cells) for name, cells in rest.items()}
    return max((name for name in words if words[name] >= _LEAST_WORDS), key=words.__getitem__, default="")


def _texts(rows: Sequence[dict[str, Any]], name: str) -> list[str]:
    """Return a column's texts; of a list of texts its first."""
    cells = (row.get(name) for row in rows)
    firsts = (cell[0] if isinstance(cell, list) and cell else cell for cell in cells)
    return [cell for cell in firsts if isinstance(cell, str) and cell.strip()]


def _share(pattern: re.Pattern[str], cells: Sequence[str]) -> float:
    return sum(pattern.match(cell) is not None for cell in cells) / max(len(cells), 1)


def _place(name: str, names: Sequence[str]) -> int:
    plain = re.sub(r"[\s_-]", "", name).casefold()
    return names.index(plain) if plain in names else len(names)


def _own_hosts(urls: Sequence[str]) -> tuple[str, ...]:
    """Return host:port of the URLs whose host is written as an address of this machine or network."""
    hosts: dict[str, None] = {}
    for url in urls:
        try:
            parts = urlsplit(url.strip())
            host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
            if host == "localhost" or not ipaddress.ip_address(host).is_global:
                hosts[f"[{host}]:{port}" if ":" in host else f"{host}:{port}"] = None
        except ValueError:  # a name, or no URL at all
            continue
    return tuple(hosts)
