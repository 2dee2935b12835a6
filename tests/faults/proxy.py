"""A TCP proxy on loopback before a server that can be told to refuse, hang, cut or slow its connections."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Literal

Mode = Literal["pass", "refuse", "hang", "cut", "slow"]
_CHUNK = 16_384
# Of a slow connection: bytes at a time, each after a pause.
_SLOW_CHUNK, _SLOW_PAUSE_S = 4_096, 0.02


class Proxy:
    """Forwards connections to ``host:port``.

    ``refuse``: nobody listens. ``hang``: bytes are taken and nothing comes back. ``cut``: a connection is reset after
    ``cut_after`` bytes of an answer. ``slow``: a few hundred kB a second. A change reaches open connections too.
    """

    def __init__(self, port: int, cut_after: int = 100) -> None:
        self._target, self._cut_after = port, cut_after
        self.mode: Mode = "pass"
        self.connections = 0
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.port = self._listen(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def be(self, mode: Mode) -> None:
        """Change what becomes of connections."""
        before, self.mode = self.mode, mode
        if mode == "refuse":
            self.close()
        elif before == "refuse":
            self._listen(self.port)

    def close(self) -> None:
        """Listen no more, and reset what is open."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for connection in list(self._open):
            _reset(connection)

    def _listen(self, port: int) -> int:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener.getsockname()[1]

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            server = socket.create_connection(("127.0.0.1", self._target))
            self._open |= {client, server}
            for source, target, is_answer in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pump, args=(source, target, is_answer), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(_SLOW_CHUNK if self.mode == "slow" else _CHUNK):
                while self.mode == "hang":
                    time.sleep(0.02)
                if self.mode == "slow":
                    time.sleep(_SLOW_PAUSE_S)
                if self.mode == "cut" and is_answer and passed + len(data) > self._cut_after:
                    target.sendall(data[: self._cut_after - passed])
                    break
                target.sendall(data)
                passed = passed + len(data) if self.mode == "cut" else 0
        for connection in (source, target):
            _reset(connection)
            self._open.discard(connection)


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextlib.contextmanager
def proxy_to(url: str) -> Iterator[Proxy]:
    """Run a proxy before the server at a URL while the block runs."""
    proxy = Proxy(int(url.rpartition(":")[2]))
    try:
        yield proxy
    finally:
        proxy.close()
