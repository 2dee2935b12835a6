"""The base of all records: frozen dataclasses that go to canonical JSON and back without loss, and their field types.

The JSON has sorted keys and no spaces, so a record's digest is the digest of its bytes. A corpus may come from somebody
else: ``from_json`` takes only what has the declared types, and names that stay in the corpus's own folders.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, WrapValidator

from schemas.names import is_one_part, printable

# The manifest sums over the shards into int64: half a million shards of this many are held.
MOST = 2**44


def utc_now() -> str:
    """Return the time as records hold it: ISO 8601, UTC, microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _file_name(name: str) -> str:
    if not is_one_part(name):
        raise ValueError(f"{name[:200]!r} is not usable in a file's name")
    return name


def _shard_name(name: str) -> str:
    if not (name.isascii() and name.isdigit() and len(name) < 16):
        raise ValueError(f"{name[:200]!r} is not a shard's number")
    return name


def _time(text: str) -> str:
    try:
        datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{text[:200]!r} is not a time in ISO 8601") from None
    return text


def _as_written(number: Any, check: Callable[[Any], float]) -> Any:
    """Return a checked number as the JSON has it: an int stays one in a field of floats, and its text the same."""
    check(number)
    return number


Count = Annotated[int, Field(ge=0, lt=MOST)]
Number = Annotated[float, WrapValidator(_as_written)]
Finite = Annotated[float, Field(allow_inf_nan=False), WrapValidator(_as_written)]
# Checked where a record is read, not where one is made.
FileName = Annotated[str, AfterValidator(_file_name)]
ShardName = Annotated[str, AfterValidator(_shard_name)]
Time = Annotated[str, AfterValidator(_time)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Json:
    """Base of the records: canonical JSON and back."""

    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")
    # Fields that earlier versions do not know: left out where they are None or empty, as those wrote their records.
    _ADDED: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> str:
        """Return canonical JSON."""
        fields = fields_of(self)
        unknown = {name for name in self._ADDED if fields[name] in (None, {})}
        return _encode({name: value for name, value in fields.items() if name not in unknown})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what ``to_json`` wrote, here or in a later version: fields that are unknown here are left out.

        Raises ValueError, in one line, where the text is not that.
        """
        try:
            # A class is hashable, which mypy does not know of Self.
            record: Self = _types(cls).validate_json(text)  # type: ignore[arg-type]
        except ValidationError as error:
            raise ValueError(first_error(error)) from None
        record.require_valid()
        return record

    def require_valid(self) -> None:
        """Raise ValueError where the fields contradict one another."""


def fields_of(record: Any) -> dict[str, Any]:
    """Return a dataclass's values by its fields' names.

    Not ``asdict``, which copies every number of a histogram: half of what a commit's CPU time was.
    """
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


# One encoder, since making one takes longer than it encodes.
_encode = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=fields_of
).encode


@functools.cache
def _types(cls: type[Json]) -> TypeAdapter[Any]:
    """Return what checks a record's types and builds it, nested parts included."""
    return TypeAdapter(cls)


def first_error(error: ValidationError) -> str:
    """Return the first validation error and its place, in one line that is safe to print."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    what = first["msg"].removeprefix("Value error, ")
    return printable(f"{place}: {what}" if place else what)[:400]
