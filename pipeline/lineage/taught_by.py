"""What taught the captioner and the filter of a corpus: their checkpoints, and the images that these were trained on.

A model that capfilt exported names its checkpoint. A checkpoint names the shards that it was trained on and the weights
that it began with, and shards name the models that wrote and judged their captions: so the walk goes on from round to
round of a bootstrapping.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.corpus.checkpoint_files import SavedCheckpoints
from pipeline.digests import digest_json
from pipeline.lineage.checkpoint_trace import trace_checkpoint
from pipeline.models.files.model_files import exported_from
from pipeline.models.weights import file_digests
from schemas.errors import CapfiltError

Row = dict[str, Any]

# Kinds of models that a run writes: of a corpus, and what a training of BLIP begins with.
_EXPORTED, _BEGUN_WITH = ("captioner", "filter"), "blip"


def taught_by(models: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return what taught these models, nearest first: a row for each checkpoint and source that it was trained on.

    Columns: ``model``: captioner, filter or blip (what these began with); ``checkpoint``; ``corpus`` and ``source``;
    ``images`` trained on, and the ``urls`` in the lists they come from. Models that capfilt did not train have no row,
    and of a checkpoint that was removed all but its path is None.

    Args:
        models: rows of the table ``models``.
    """
    rows: list[Row] = []
    todo, known = deque(models), set[str]()
    while todo:
        model = todo.popleft()
        checkpoint = _checkpoint(model)
        if checkpoint is None or checkpoint in known:
            continue
        known.add(checkpoint)
        try:
            traced = trace_checkpoint(checkpoint)
        except CapfiltError:  # it was removed since
            traced = {"sources": [{}], "loaded": [], "models": []}
        for source in traced["sources"]:
            named = {name: source.get(name) for name in ("corpus", "source", "images", "urls")}
            rows.append({"model": model["kind"], "checkpoint": checkpoint, **named})
        todo += [*traced["loaded"], *traced["models"]]
    return rows


def _checkpoint(model: Mapping[str, Any]) -> str | None:
    """Return the path of the checkpoint that a model is; None where that is not certain."""
    if model["kind"] == _BEGUN_WITH:
        run = SavedCheckpoints(model["name"])
        same = (record for record in run.committed() if digest_json(dict(record.sha256)) == model["digest"])
        return next((run.storage.url(record.path) for record in same), None)
    folder = Path(model["name"])
    if model["kind"] not in _EXPORTED or (checkpoint := exported_from(folder)) is None:
        return None
    # The folder may hold another model by now.
    try:
        is_same = digest_json(file_digests(folder, model["files"])) == model["digest"]
    except OSError:
        return None
    return checkpoint if is_same else None
