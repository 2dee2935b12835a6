"""Arrow without pandas: half of a command's start, and 40 MB."""

import sys
from importlib.abc import MetaPathFinder
from typing import Any


def import_arrow_alone() -> None:
    """Import Arrow's datasets without pandas, which they load if it is installed: half of a reading command's start.

    Arrow asks again where pandas is really needed (``to_pandas``), so nothing is lost.
    """
    if "pandas" in sys.modules:
        return
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        import pyarrow.dataset  # noqa: F401
    finally:
        sys.meta_path.remove(finder)


class _NoPandas(MetaPathFinder):
    """Answers ``import pandas`` as if it were not installed."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("No module named 'pandas'", name=name)
