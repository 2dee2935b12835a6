"""ICC profiles put together by hand, for colours that no library writes a profile of."""

import struct

# XYZ under D50 of a wide-gamut screen's red, green and blue (Adobe RGB's).
WIDE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
_WHITE = (0.9642, 1.0, 0.8249)


def _fixed(value: float) -> int:
    return round(value * 65536)


def _profile(space: bytes, tags: dict[bytes, bytes], *, kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    tags = {b"wtpt": _xyz(_WHITE)} | tags
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    rest = struct.pack(">I", len(tags)) + table + body
    header = struct.pack(">I4sI4s4s4s", 128 + len(rest), b"lcms", 0x02400000, kind, space, pcs)
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3I", *map(_fixed, _WHITE))
    return header.ljust(128, b"\0") + rest


def _xyz(values: tuple[float, float, float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *map(_fixed, values))


def _gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(primaries: tuple[tuple[float, float, float], ...] = WIDE, gamma: float = 2.2) -> bytes:
    names = zip(b"rgb", primaries, strict=True)
    tags = {bytes([name]) + b"XYZ": _xyz(values) for name, values in names}
    return _profile(b"RGB ", tags | {bytes([name]) + b"TRC": _gamma(gamma) for name in b"rgb"})


def grey_profile(gamma: float) -> bytes:
    return _profile(b"GRAY", {b"kTRC": _gamma(gamma)})


def cmyk_profile() -> bytes:
    """A press on which all inks print nothing but grey, by the amount of black."""
    corners = b"".join(bytes([0 if black else 255, 128, 128]) for _ in range(8) for black in (0, 1))
    curves = bytes(range(256))
    matrix = struct.pack(">9i", *(_fixed(float(i % 4 == 0)) for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + 4 * curves + corners + 3 * curves
    return _profile(b"CMYK", {b"A2B0": lut}, kind=b"prtr", pcs=b"Lab ")


def lab_profile() -> bytes:
    return _profile(b"Lab ", {}, kind=b"spac")
