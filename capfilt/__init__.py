"""capfilt in Python: a corpus to read, a run, and the captioner and the ranker by themselves.

    import capfilt

    corpus = capfilt.Corpus.open("demo-corpus")
    corpus.sql("SELECT reason, count(*) FROM samples GROUP BY reason").pandas()
    for sample in corpus.samples():
        sample.image, sample.captions
    corpus.show(uid)                                         # in a notebook: the image and its candidates
    capfilt.Corpus.run("corpus.toml", local=True)            # what `capfilt run --local` does
    capfilt.caption(["cat.jpg"])                             # [["a cat on a sofa", ...]]
    capfilt.rank(["cat.jpg"], [["a cat", "a dog"]])          # [[0.27, 0.19]]

``import capfilt`` loads no large library. A name loads what it needs when it is first used: ``Corpus`` DuckDB and
Arrow, ``Captioner``, ``Ranker``, ``caption`` and ``rank`` torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from schemas.errors import CapfiltError

if TYPE_CHECKING:
    from capfilt.corpus import Corpus, Run, SampleTrace
    from capfilt.engines import Captioner, Ranker, caption, rank
    from capfilt.query_result import QueryResult
    from capfilt.samples import Sample, SampleView

__all__ = [
    "CapfiltError", "Captioner", "Corpus", "QueryResult", "Ranker", "Run", "Sample", "SampleTrace", "SampleView",
    "caption", "rank",
]  # fmt: skip

_MODULES = {
    "Corpus": "corpus", "Run": "corpus", "SampleTrace": "corpus",
    "QueryResult": "query_result",
    "Sample": "samples", "SampleView": "samples",
    "Captioner": "engines", "Ranker": "engines", "caption": "engines", "rank": "engines",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the module of a name at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'capfilt' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"capfilt.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
