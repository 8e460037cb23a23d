"""Damage done to bytes, as hypothesis draws it, and how much of it.

The suite draws a few fixed examples. LOMAR_FUZZ=5000 in the environment draws so many of each, other ones every time.
"""

import os
import struct
import zlib
from collections.abc import Callable, Sequence

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_ASKED = int(os.environ.get("LOMAR_FUZZ", "0"))
# Numbers that headers break on: none, one, the ends of signed and unsigned types, a few large sizes.
_TELLING = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x100, 0x3FFF, 0x7FFF, 0x8000, 0xFFFF, 60_000, 0x7FFFFFFF, 0xFFFFFFFF)


def examples(few: int) -> Callable[..., None]:
    """Settings of a property: `few` fixed examples, or as many other ones as LOMAR_FUZZ asks for."""
    return settings(
        max_examples=_ASKED or few,
        derandomize=not _ASKED,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def mutated(draw: st.DrawFn, originals: Sequence[bytes]) -> bytes:
    """One of some files after one to six changes: bits, numbers, pieces cut, doubled, or put in from another."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 6))):
        _change(draw, content, originals)
    if content.startswith(b"\x89PNG") and draw(st.booleans()):
        return with_check_sums(bytes(content))
    return bytes(content)


def _change(draw: st.DrawFn, content: bytearray, originals: Sequence[bytes]) -> None:
    if not content:
        return
    last = len(content) - 1
    at = draw(st.integers(0, min(last, 200)) | st.integers(0, last))  # mostly in the header
    length = draw(st.integers(1, 64))
    match draw(st.sampled_from(("bit", "number", "number", "number", "cut", "end", "double", "other", "zeros"))):
        case "bit":
            content[at] ^= 1 << draw(st.integers(0, 7))
        case "number":
            kind = draw(st.sampled_from(("B", "<H", ">H", "<I", ">I", "<Q", ">Q")))
            value = draw(st.sampled_from(_TELLING) | st.integers(0, 2**64 - 1)) % 256 ** struct.calcsize(kind)
            packed = struct.pack(kind, value)
            content[at : at + len(packed)] = packed
        case "cut":
            del content[at : at + length]
        case "end":
            del content[at:]
        case "double":
            content[at:at] = content[at : at + length]
        case "other":
            other = draw(st.sampled_from(originals))
            start = draw(st.integers(0, len(other) - 1))
            content[at : at + length] = other[start : start + length]
        case "zeros":
            content[at : at + length] = bytes(length)


def with_check_sums(png: bytes) -> bytes:
    """A PNG whose chunks have right check sums, so that what else is wrong with them is read."""
    content, at = bytearray(png), 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        if end + 4 > len(content):
            break
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[at + 4 : end]))
        at = end + 4
    return bytes(content)
