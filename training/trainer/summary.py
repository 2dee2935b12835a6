"""How a training ended, as its process tells the one that started it. Imports no torch: that one may not need it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from schemas.json_record import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary(Json):
    """How a training ended. ``metrics`` are those of its last step."""

    run_id: str
    outcome: Literal["done", "interrupted"]
    folder: str
    step: int
    steps: int
    samples: int
    resumed_from: int = 0
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    checkpoint: str = ""
