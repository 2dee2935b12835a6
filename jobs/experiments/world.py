"""The demo world's server at a port of its own, for the crawls of experiments."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from jobs.demo.world.site import serving
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
