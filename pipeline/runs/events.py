"""What happens to a shard in a run, as events: what logs and metrics are made of."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from schemas.json_record import utc_now
from schemas.records import LostAttemptRecord, ShardTask
from schemas.stages import Stage

Level = Literal["info", "warning", "error"]
# lost: an attempt ended without a commit. A retry is an attempt after the first one of a run.
EventName = Literal["start", "retry", "commit", "lost", "quarantine"]
_LEVELS: dict[EventName, Level] = {"lost": "warning", "quarantine": "error"}
_MAX_ERROR_CHARACTERS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEvent:
    """One event of one stage of one shard. ``attempt`` counts from 1 in the run; ``node`` is the host's name."""

    time: str
    event: EventName
    run_id: str
    stage: Stage
    source: str
    shard: str
    attempt: int
    node: str
    # Of an attempt that ended: of its worker, as seconds['worker'] of a record.
    seconds: float | None = None
    gpus: float = 0.0
    # Of a lost attempt: failed or killed.
    cause: str = ""
    error: str = ""

    @classmethod
    def of(
        cls, shard: ShardTask | LostAttemptRecord, event: EventName, attempt: int, node: str, **more: Any
    ) -> Self:
        """Return an event of a shard, now; ``more`` are the other fields."""
        return cls(
            time=utc_now(),
            event=event,
            run_id=shard.run_id,
            stage=shard.stage,
            source=shard.source,
            shard=shard.shard,
            attempt=attempt,
            node=node,
            **more,
        )

    @property
    def level(self) -> Level:
        """How much it matters to those who run it."""
        return _LEVELS.get(self.event, "info")

    def fields(self) -> dict[str, Any]:
        """Return what a log line of it holds, without what it does not have."""
        fields = {"level": self.level, **asdict(self), "error": self.error[-_MAX_ERROR_CHARACTERS:]}
        return {name: value for name, value in fields.items() if value not in ("", None)}

    def __str__(self) -> str:
        where = f"{self.stage} {self.source}/{self.shard}"
        last = self.error.strip().rpartition("\n")[2]
        match self.event:
            case "lost":
                return f"{where}: attempt {self.attempt} was lost ({self.cause}{f': {last}' if last else ''})"
            case "quarantine":
                return f"{where} is quarantined: {last}"
            case _:
                return f"{where}: {self.event}"
