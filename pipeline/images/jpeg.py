"""The structure of a JPEG file, read from its markers: its scans, where their data ends, and what is missing.

Nothing is decoded here. Section numbers are those of ITU-T T.81.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

END_OF_IMAGE = b"\xff\xd9"
# A megabyte of empty scans takes minutes to decode; libjpeg-turbo's own tools stop at 500 scans.
MAX_SCANS = 500

_SOI, _EOI, _SOS, _DRI, _TEM, _RST0, _RST7 = 0xD8, 0xD9, 0xDA, 0xDD, 0x01, 0xD0, 0xD7
# Frame headers are C0 to CF (B.2.2), but for C4 (DHT), C8 (JPG) and CC (DAC).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_ARITHMETIC = frozenset(range(0xC9, 0xD0))
_COEFFICIENTS = 64
_ALL_BITS = 16


class JpegError(ValueError):
    """Say what a JPEG file lacks."""


@dataclass(slots=True)
class _Frame:
    """The frame header; the components in its order."""

    marker: int
    width: int
    height: int
    identifiers: list[int]
    sampling: list[tuple[int, int]]  # (horizontal, vertical)

    def minimum_coded_units(self) -> int:
        """Return how many MCUs a scan of all components has (A.2)."""
        # A block is 8 x 8 samples. An MCU of interleaved components covers 8 h_max x 8 v_max pixels, and the number of
        # MCUs is ceil(width / across) * ceil(height / down).
        interleaved = len(self.sampling) > 1
        across = 8 * max(h for h, _ in self.sampling) if interleaved else 8
        down = 8 * max(v for _, v in self.sampling) if interleaved else 8
        return -(-self.width // across) * -(-self.height // down)


@dataclass(slots=True)
class JpegScans:
    """The scans of a JPEG.

    Attributes:
        count: how many there are; reading stops above ``MAX_SCANS``.
        data_end: offset of the first byte behind the last scan's data.
        has_end_marker: whether the file goes on to EOI.
        is_one_scan: the first scan holds all components in full, so that libjpeg decodes it line by line.
        is_arithmetic: coded arithmetically, not by Huffman.
    """

    count: int = 0
    data_end: int = 0
    has_end_marker: bool = False
    is_one_scan: bool = False
    is_arithmetic: bool = False
    # For each component and coefficient, how many of its low bits are still to come.
    _bits_to_come: list[list[int]] = field(default_factory=list)

    def check_complete(self) -> None:
        """Raise JpegError unless the scans hold every coefficient to its last bit (G.1.2).

        A progressive JPEG that stops between two scans decodes without an error, but blurred.
        """
        if not self.count:
            raise JpegError("a JPEG without a scan")
        if any(map(any, self._bits_to_come)):
            raise JpegError(f"scans are missing behind the first {self.count}")

    def add(self, frame: _Frame, header: bytes) -> None:
        """Count a scan, and the coefficient bits it brings, by its header (B.2.3)."""
        self.count += 1
        self._bits_to_come = self._bits_to_come or [[_ALL_BITS] * _COEFFICIENTS for _ in frame.identifiers]
        # Ns, then Ns pairs of (component, tables), then Ss, Se and Ah << 4 | Al.
        identifiers = header[1 : 1 + 2 * header[0] : 2]
        first, last, approximation = header[1 + 2 * header[0] : 4 + 2 * header[0]]
        if frame.marker not in _PROGRESSIVE:
            first, last, approximation = 0, _COEFFICIENTS - 1, 0
            self.is_one_scan |= self.count == 1 and len(identifiers) == len(frame.identifiers)
        last = min(last, _COEFFICIENTS - 1)
        # Coefficients Ss to Se are complete but for their Al low bits (successive approximation, G.1.2.1).
        for component in _components(frame.identifiers, identifiers):
            self._bits_to_come[component][first : last + 1] = [approximation & 15] * (last + 1 - first)


def read_scans(data: bytes) -> JpegScans:
    """Read the markers of a JPEG to its end, or to where it stops.

    Raises:
        JpegError: a segment is damaged, or restart markers are missing or out of order.
    """
    scans, frame, restart_interval, position = JpegScans(), None, 0, 2
    markers, restarts = _find_markers(data)
    for offset in markers.tolist():
        marker = data[offset + 1]
        # Markers inside a segment belong to something else, such as a thumbnail.
        if offset < position or marker in (_SOI, _TEM):
            continue
        if marker == _EOI:
            scans.has_end_marker = True
            break
        # A segment's length counts its own two bytes, not the marker's.
        position = offset + 2 + int.from_bytes(data[offset + 2 : offset + 4])
        segment = data[offset + 4 : position]
        try:
            if marker in _FRAMES:
                frame = _read_frame(marker, segment)
                scans.is_arithmetic = marker in _ARITHMETIC
            elif marker == _DRI:
                (restart_interval,) = struct.unpack(">H", segment)
            elif marker == _SOS and frame is not None:
                scans.add(frame, segment)
        except (struct.error, ValueError, IndexError) as error:
            raise JpegError(f"the segment {marker:#x} is damaged") from error
        if marker == _SOS and frame is not None:
            scans.data_end = _first_from(markers, position, len(data.rstrip(b"\xff")))
            inside = restarts[np.searchsorted(restarts, position) : np.searchsorted(restarts, scans.data_end)]
            _check_restarts([data[at + 1] - _RST0 for at in inside.tolist()], restart_interval, frame, scans)
            if scans.count > MAX_SCANS:
                break
    return scans


def _find_markers(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets of all markers but restarts, and those of restarts.

    In entropy-coded data every 0xff is followed by a zero (B.1.1.5); 0xff before 0xff is a fill byte.
    """
    octets = np.frombuffer(data, np.uint8)
    offsets = np.flatnonzero(octets[:-1] == 0xFF)
    codes = octets[offsets + 1]
    is_restart = (codes >= _RST0) & (codes <= _RST7)
    return offsets[(codes != 0) & (codes != 0xFF) & ~is_restart], offsets[is_restart]


def _first_from(offsets: np.ndarray, position: int, default: int) -> int:
    index = np.searchsorted(offsets, position)
    return int(offsets[index]) if index < len(offsets) else default


def _read_frame(marker: int, segment: bytes) -> _Frame:
    _, height, width, count = struct.unpack(">BHHB", segment[:6])
    components = [struct.unpack(">BBB", segment[6 + 3 * index : 9 + 3 * index]) for index in range(count)]
    return _Frame(
        marker=marker,
        width=width,
        height=height,
        identifiers=[identifier for identifier, _, _ in components],
        sampling=[(factors >> 4 or 1, factors & 15 or 1) for _, factors, _ in components],
    )


def _components(frame: Sequence[int], scan: bytes) -> list[int]:
    """Return which of the frame's components a scan has; some encoders give all components one identifier."""
    indices: list[int] = []
    for identifier in scan:
        indices += [i for i, known in enumerate(frame) if known == identifier and i not in indices][:1]
    return indices


def _check_restarts(numbers: Sequence[int], interval: int, frame: _Frame, scans: JpegScans) -> None:
    """Raise JpegError unless a scan's restart markers count from 0 to 7 again and again, and none is missing (E.1.4).

    Where one is missing, libjpeg continues silently and puts the following blocks into the wrong place or leaves them
    grey.
    """
    if numbers and not interval:
        raise JpegError("a restart marker, and no restart interval")
    if any(number != index % 8 for index, number in enumerate(numbers)):
        raise JpegError("restart markers out of order")
    # One marker between two intervals: ceil(MCUs / interval) - 1.
    expected = -(-frame.minimum_coded_units() // interval) - 1 if interval else 0
    if scans.is_one_scan and scans.count == 1 and len(numbers) < expected:
        raise JpegError(f"{len(numbers)} restart markers of {expected}")
