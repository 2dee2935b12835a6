"""The demo world's server at a port of its own, for the crawls of experiments."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from jobs.demo.world.site import serving
from pipeline.corpus.records import Records
from pipeline.runs.survey import Totals
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError


@contextmanager
def served_world(port: int) -> Iterator[str]:
    """Serve the world while the block runs; yield its URL. Raises CapfiltError where another program has the port.

    URLs are identities: at one port equal seeds give equal corpora.
    """
    with ExitStack() as stack:
        try:
            url = stack.enter_context(serving(port, flaky=False))
        except OSError as error:
            raise CapfiltError(
                f"port {port} of the demo world cannot be served ({error}); wait until the other experiment has crawled"
            ) from error
        yield url


def require_served(corpus: str, least: float = 0.6) -> None:
    """Raise CapfiltError where the server was too slow for its crawl, as on a machine that is busy with other work.

    Args:
        least: share of the URLs that has to give an image; in a small world it differs from that of the large one.
    """
    totals = Totals.of(Records(Storage(corpus)).shards(("crawl",)).values())
    if totals.images < least * totals.urls:
        raise CapfiltError(
            f"{corpus}: {totals.images:,} of {totals.urls:,} URLs of the demo's world gave an image, where 85% do: its "
            "server did not answer in time. Remove the folder, and start again when the machine has less other work"
        )
