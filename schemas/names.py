"""Names that somebody else wrote: confined to the folder they belong to, and safe to print."""

import contextlib
import re
from ipaddress import ip_address
from typing import Any
from urllib.parse import unquote

from schemas.errors import CapfiltError

# Windows and S3 both allow less; nothing that capfilt or a model library writes comes near.
_MAX_NAME = 1024
_DRIVE_OR_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
# As DuckDB, Arrow and Python read it.
URL_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?(?P<host>\[[^\]]*\]|[^/?#:]*)"
# Where imported tars may lie. Not everything that fsspec opens: chains ("::"), archives and code hosts are left out.
_SCHEMES = ("file:///", "s3://", "s3a://", "gs://", "gcs://", "az://", "abfss://", "https://", "http://")


def confined_name(name: object, where: str) -> str:
    """Return a relative file name unchanged if it stays inside the folder it is relative to.

    For every file name that comes from a record, an index, an archive, a list or a config that somebody else
    may have written; called before anything is opened. Checks the text alone: a link inside the folder may
    still lead out of it (the hub's cache is made of such links).

    Args:
        name: what stands in the file; anything but a usable name is rejected.
        where: the file that holds the name, for the message.

    Raises:
        CapfiltError: the name is not a text, empty, too long, absolute, has a drive or a scheme, a backslash, a
            control character, or an empty, ``.`` or ``..`` part.
    """
    if not isinstance(name, str):
        raise CapfiltError(f"{where}: a file name is expected, not {printable(repr(name)[:80])}")
    if not is_confined(name):
        raise CapfiltError(
            f"{where}: the file name {printable(name)[:200]!r} leads outside its folder or is not usable; "
            "nothing was read. Use only files from a source that you trust"
        )
    return name


def is_confined(name: str) -> bool:
    """Tell whether a relative file name stays inside its folder, as ``confined_name`` asks."""
    return (
        0 < len(name) <= _MAX_NAME
        and not _DRIVE_OR_SCHEME.match(name)
        and "\\" not in name
        and name.isprintable()
        and not {"", ".", ".."} & set(name.split("/"))
    )


def is_one_part(name: str) -> bool:
    """Tell whether a name is confined and has no folder: what a record may make a file's name of."""
    return is_confined(name) and "/" not in name


def is_hidden(name: str, *, by_folder: bool = True) -> bool:
    """Tell whether a file is hidden, as those that macOS and editors add: ``._a.jpg``, ``__MACOSX/a.jpg``, ``.git/a``.

    Args:
        name: relative to the folder or the tar that is read.
        by_folder: a folder whose name begins with a dot hides its files. Of tars it does not: ``./a.jpg`` is usual.
    """
    *folders, file = name.split("/")
    dotted = (*folders, file) if by_folder else (file,)
    return "__MACOSX" in (*folders, file) or any(part.startswith(".") for part in dotted)


def is_outside_tar(path: str) -> bool:
    """Tell whether a path is that of a tar where it lies: absolute, or the URL of an object store or web server.

    None has a ``.`` or ``..`` part, written as percent escapes neither, except that the intake keeps them in a file://
    URL as the config spells it; whoever opens a tar of this machine's disk compares its folder with the config's.
    """
    absolute = path.startswith(("/", *_SCHEMES))
    # Web clients decode these before they resolve the dots; in a file's or an object's name they stand for themselves.
    spelled = unquote(path) if path.startswith(("https://", "http://")) else path
    direct = path.startswith("file://") or not {".", ".."} & set(spelled.replace("\\", "/").split("/"))
    return absolute and direct and "::" not in path and path.isprintable() and path.endswith(".tar")


def url_host(url: str) -> str:
    """Return the host of a URL, lower case, without port; empty where it has none. SQL has the same function."""
    host = re.match(URL_HOST, url)
    return host["host"].lower() if host else ""


def fits_utf8(text: str) -> bool:
    """Tell whether UTF-8 can hold a text: JSON can spell halves of surrogate pairs, and arguments bytes of any kind."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """Return text without what a terminal would act on: control characters and the like become spaces."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def shown(value: Any) -> str:
    """Return the beginning of somebody else's value for a message."""
    text = printable(value if isinstance(value, str) else repr(value))
    return text if len(text) <= 60 else f"{text[:60]}..."


def depth_of(value: Any) -> int:
    """Return how many objects and arrays are inside one another."""
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return depth


def name_server(text: str) -> tuple[str, int]:
    """Return address and port of a DNS server: ``10.0.0.2``, ``10.0.0.2:5353``, ``[::1]:5353``. Raises ValueError."""
    host, _, port = text.rpartition(":")
    has_port = port.isascii() and port.isdigit() and 0 < int(port) < 65_536
    for address, number in ((text, 53), (host, int(port))) if has_port else ((text, 53),):
        with contextlib.suppress(ValueError):
            return str(ip_address(address.removeprefix("[").removesuffix("]"))), number
    raise ValueError(f"{text!r} is not the IP address of a DNS server, such as 10.0.0.2 or 10.0.0.2:5353")


def header_text(text: str) -> str:
    """Return a text that an HTTP header may hold. Raises ValueError."""
    if not re.fullmatch(r"[ -~\xa0-\xff]*", text):
        raise ValueError(f"{text!r} has characters that an HTTP header cannot hold: use ASCII or Latin-1")
    return text
