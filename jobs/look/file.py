"""The first screen as one file: images inside, no script, no request."""

import base64

from jobs.look.overview import overview
from jobs.look.page import Pages
from jobs.look.snapshot import Row, Snapshot
from pipeline.images.decode import ImageError, thumbnail

_ROWS, _SIDE_PX = 8, 224


def overview_file(snapshot: Snapshot, corpus: str, *, images: int) -> str:
    """Return the HTML of the file; its eight rows have ``images`` images in all, at most."""
    shown = overview(snapshot, cards=max(1, images // _ROWS))
    return Pages(corpus, "", lambda card: _data_url(snapshot, card)).overview(snapshot, shown)


def _data_url(snapshot: Snapshot, card: Row) -> str:
    """Return a card's image, made small; empty where it has none that decodes."""
    data = snapshot.images.read(card["source"], card["shard"], card["key"])
    if data is None:
        return ""
    try:
        small = thumbnail(data, _SIDE_PX)
    except ImageError:
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(small).decode()}"
