"""Azure's Blob service on loopback: as much of its protocol as a corpus needs, kept in memory."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import md5
from typing import Any
from urllib.parse import parse_qs, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

_DATE = "Sun, 29 Nov 2026 05:00:00 GMT"


@contextmanager
def serving_azure() -> Iterator[str]:
    """Serve containers of the account ``devstore``, each there once it is used; yield the account's URL."""
    blobs: dict[str, bytes] = {}
    blocks: dict[tuple[str, str], bytes] = {}

    @Request.application
    def serve(request: Request) -> Response:
        if not request.headers.get("Authorization", "").startswith("SharedKey devstore:"):
            return _error(403, "AuthenticationFailed")
        name = request.path.removeprefix("/devstore/")
        query = parse_qs(request.query_string.decode(), keep_blank_values=True)
        if query.get("comp") == ["list"]:
            return _listing(blobs, name, query)
        if query.get("comp") == ["batch"]:
            return _batch_of_deletes(request, blobs)
        if request.method == "PUT":
            return _put(request, name, query, blobs, blocks)
        if name not in blobs:
            return _error(404, "BlobNotFound")
        return _content(request, blobs[name])

    server = make_server("127.0.0.1", 0, serve, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/devstore"
    server.shutdown()
    thread.join()
    server.server_close()


def _put(
    request: Request,
    name: str,
    query: dict[str, list[str]],
    blobs: dict[str, bytes],
    blocks: dict[Any, bytes],
) -> Response:
    data = request.get_data()
    if query.get("comp") == ["block"]:
        blocks[name, query["blockid"][0]] = data
        return Response(status=201)
    if request.headers.get("If-None-Match") == "*" and name in blobs:
        return _error(409, "BlobAlreadyExists")
    if query.get("comp") == ["blocklist"]:
        data = b"".join(blocks[name, str(block.text)] for block in ElementTree.fromstring(data))
    else:
        assert request.headers["x-ms-blob-type"] == "BlockBlob"
    blobs[name] = data
    return Response(status=201, headers=_headers(data))


def _batch_of_deletes(request: Request, blobs: dict[str, bytes]) -> Response:
    """Answer requests that are parts of one body, each by its Content-ID."""
    answers = []
    for number, path in enumerate(re.findall(rb"DELETE (\S+) HTTP", request.get_data())):
        gone = blobs.pop(unquote(path.decode()).removeprefix("/devstore/"), None)
        status = "202 Accepted" if gone is not None else "404 Not Found\r\nx-ms-error-code: BlobNotFound"
        answers.append(
            f"--parts\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\nHTTP/1.1 {status}\r\n\r\n"
        )
    body = "".join(answers) + "--parts--\r\n"
    return Response(body, status=202, content_type="multipart/mixed; boundary=parts")


def _content(request: Request, data: bytes) -> Response:
    headers = _headers(data)
    asked = request.headers.get("x-ms-range") or request.headers.get("Range")
    if request.method == "HEAD" or not asked:
        response = Response(data, headers=headers)
        response.headers["Content-Length"] = str(len(data))
        return response
    start, end = asked.removeprefix("bytes=").split("-")
    part = data[int(start) : int(end) + 1]
    headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
    return Response(part, status=206, headers=headers)


def _listing(blobs: dict[str, bytes], container: str, query: dict[str, list[str]]) -> Response:
    prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
    entries = {}
    for name in sorted(blobs):
        key = name.removeprefix(f"{container}/")
        if name == key or not key.startswith(prefix):
            continue
        folder, is_below, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
        if is_below:
            entries[prefix + folder] = f"<BlobPrefix><Name>{escape(prefix + folder)}/</Name></BlobPrefix>"
        else:
            headers = _headers(blobs[name])
            entries[key] = (
                f"<Blob><Name>{escape(key)}</Name><Properties><Last-Modified>{_DATE}</Last-Modified>"
                f"<Etag>{headers['ETag']}</Etag><Content-Length>{len(blobs[name])}</Content-Length>"
                "<Content-Type>application/octet-stream</Content-Type></Properties></Blob>"
            )
    body = f"<Blobs>{''.join(entries.values())}</Blobs><NextMarker />"
    return Response(
        f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults>{body}</EnumerationResults>',
        content_type="application/xml",
    )


def _headers(data: bytes) -> dict[str, str]:
    return {"ETag": f'"{md5(data).hexdigest()}"', "Last-Modified": _DATE, "x-ms-version": "2025-01-05"}


def _error(status: int, code: str) -> Response:
    body = (
        f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{code}.</Message></Error>'
    )
    return Response(body, status=status, headers={"x-ms-error-code": code}, content_type="application/xml")
