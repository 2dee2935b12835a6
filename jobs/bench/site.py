"""A loopback server in a process of its own, so that serving is not counted as crawling."""

import multiprocessing
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection


@contextmanager
def serving(pictures: Sequence[bytes]) -> Iterator[str]:
    """Serve ``/<number>.jpg``, the pictures in turn, while the block runs; yield ``host:port``."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(theirs, pictures), daemon=True
    )
    process.start()
    theirs.close()
    try:
        yield f"127.0.0.1:{ours.recv()}"
    finally:
        # The end of the pipe is the end of the server, also where this process is killed.
        ours.close()
        process.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512  # the default of 5 drops connections of a crawler with 64 threads

    def __init__(self, pictures: Sequence[bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pictures = pictures


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    wbufsize = 1 << 18

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        number = int(self.path.strip("/").removesuffix(".jpg"))
        body = self.server.pictures[number % len(self.server.pictures)]
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _serve(pipe: Connection, pictures: Sequence[bytes]) -> None:
    server = _Server(pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(server.server_port)
    with suppress(EOFError, KeyboardInterrupt):
        pipe.recv()
    server.shutdown()
    server.server_close()
