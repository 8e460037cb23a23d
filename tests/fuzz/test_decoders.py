"""Claims about damaged image files: pixels of the size asked for, or BadImageError; in bounded time and memory."""

import io
import lzma
import resource
import signal
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import tifffile
from fuzz.mutation import examples, mutated, with_check_sums
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from lomar.data.decode import PixelFormat, quietly, read_image
from lomar.errors import BadImageError

MOST_BYTES = 4 * 2**30  # above what the process holds already: MAX_PIXELS of four channels, several times
MOST_SECONDS = 20


@contextmanager
def bounded() -> Iterator[None]:
    """Within so much memory and time; a decoder that asks for more raises MemoryError, or TimeoutError."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {MOST_SECONDS} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (held + MOST_BYTES, before[1]))
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the bounds are Linux's")


def pillow(picture: np.ndarray | Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, form, **options)
    return file.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def originals() -> dict[str, list[bytes]]:
    """Small valid files of every kind that is read, a few of each."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)
    rgba = rng.integers(0, 256, (13, 17, 4), dtype=np.uint8)
    gray16 = rng.integers(0, 65_536, (13, 17), dtype=np.uint16)
    bands = rng.integers(0, 65_536, (5, 13, 17), dtype=np.uint16)
    picture = Image.fromarray(rgb)
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = {"icc_profile": bytes(200)}
    last = {"photometric": "minisblack", "planarconfig": "contig"}
    files = {
        "JPEG": [
            pillow(rgb, "JPEG", exif=exif),
            pillow(rgb[..., 0], "JPEG", progressive=True),
            pillow(picture.convert("CMYK"), "JPEG", **profile),
        ],
        "PNG": [
            pillow(rgb, "PNG", exif=exif, **profile),
            pillow(rgba, "PNG"),
            pillow(gray16, "PNG"),
            pillow(picture.quantize(7), "PNG"),
            pillow(picture.convert("1"), "PNG"),
        ],
        "GIF": [pillow(picture.quantize(7), "GIF"), pillow(picture.quantize(7), "GIF", transparency=0, save_all=True)],
        "BMP": [pillow(rgb, "BMP"), pillow(picture.quantize(7), "BMP")],
        "WEBP": [pillow(rgb, "WEBP", exif=exif), pillow(rgba, "WEBP", lossless=True)],
        "PPM": [pillow(rgb, "PPM"), pillow(gray16, "PPM"), b"P3 2 2 255 1 2 3 4 5 6 7 8 9 10 11 12 "],
        "TIFF of Pillow": [
            pillow(rgb, "TIFF"),
            pillow(rgb, "TIFF", compression="tiff_lzw", tiffinfo={0x0112: 6}),
            pillow(rgb, "TIFF", compression="tiff_adobe_deflate"),
            pillow(rgb, "TIFF", compression="jpeg"),
            pillow(picture.convert("1"), "TIFF", compression="group4"),
            pillow(gray16, "TIFF"),
            pillow(picture, "TIFF", save_all=True, append_images=[picture]),
        ],
        "TIFF of tifffile": [
            tiff(bands, photometric="minisblack", planarconfig="separate"),
            tiff(bands.transpose(1, 2, 0), compression="zlib", **last),
            tiff(bands.transpose(1, 2, 0), compression="zlib", tile=(16, 16), predictor=True, **last),
            tiff(bands.astype(np.float32), photometric="minisblack", imagej=True),
            tiff(bands, photometric="minisblack", ome=True, metadata={"axes": "CYX"}),
            tiff(bands.astype(np.float16).transpose(1, 2, 0), compression="lzma", **last),
            tiff(bands, photometric="minisblack", bigtiff=True),
        ],
        "npy": [npy(rgb), npy(gray16), npy(bands.astype(">f4")), npy(np.asfortranarray(rgb)), npy(rgb > 9)],
    }
    if features.check("jpg_2000"):
        files["JP2"] = [pillow(rgb, "JPEG2000"), pillow(rgb, "JPEG2000", no_jp2=True)]
    if features.check("avif"):
        files["AVIF"] = [pillow(rgb, "AVIF"), pillow(rgba, "AVIF")]
    return files


ORIGINALS = originals()
FORMATS = (
    st.builds(PixelFormat, st.sampled_from((1, 3, 4, 5)), st.sampled_from(("uint8", "uint16", "float32"))) | st.none()
)  # the file's own


def decoded(data: bytes, fmt: PixelFormat | None, size: tuple[int, int], share: tuple[int, int]) -> None:
    """Reads the whole image, then a part of it; raises BadImageError where it is none, and nothing else."""
    image = read_image(data, "some.jpg")
    fmt = fmt or PixelFormat(image.channels, image.dtype)
    height, width = max(1, image.height // share[0]), max(1, image.width // share[1])
    boxes = [(0, 0, image.height, image.width), (image.height - height, image.width - width, height, width)]
    for box, lanczos in zip(boxes, (False, True), strict=True):
        pixels = image.crop(box, size, fmt, lanczos=lanczos)
        assert pixels.shape == (fmt.channels, *size) and pixels.dtype == fmt.dtype


def check(
    data: bytes, fmt: PixelFormat | None = None, size: tuple[int, int] = (7, 5), share: tuple[int, int] = (3, 2)
) -> str:
    """Why a file is refused, "" where it is read; within bounds and without a warning."""
    with bounded(), warnings.catch_warnings(record=True) as said, quietly():
        try:
            decoded(data, fmt, size, share)
            reason = ""
        except BadImageError as error:
            reason = str(error)
            assert "\n" not in reason and 0 < len(reason) <= 250
    assert not said
    return reason


@pytest.mark.parametrize("kind", ORIGINALS)
def test_the_files_are_whole_to_begin_with(kind: str) -> None:
    for data in ORIGINALS[kind]:
        decoded(data, None, (7, 5), (3, 2))


@pytest.mark.parametrize("kind", ORIGINALS)
def test_a_damaged_file_is_pixels_or_a_bad_image(kind: str) -> None:
    @examples(60)
    @given(
        data=mutated(ORIGINALS[kind]),
        fmt=FORMATS,
        size=st.tuples(st.integers(1, 19), st.integers(1, 23)),
        share=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    )
    def holds(data: bytes, fmt: PixelFormat | None, size: tuple[int, int], share: tuple[int, int]) -> None:
        check(data, fmt, size, share)

    holds()


# What a few bytes can ask for


def tiff_of(most: bytes = b"", at: int = 200, **tags: int) -> bytes:
    """A TIFF of one page with these tags over sensible ones, and bytes from an offset on."""
    numbers = {"width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262, "description": 270}
    numbers |= {"offset": 273, "samples": 277, "rows": 278, "length": 279, "planar": 284, "kind": 339}
    numbers |= {"tile_width": 322, "tile_height": 323, "tile_offset": 324, "tile_length": 325, "depth": 32997}
    told = {"width": 17, "height": 13, "bits": 16, "compression": 1, "photometric": 1, "samples": 5, "planar": 1}
    told |= {"offset": at, "rows": 2**31, "length": max(1, len(most))} if "tile_width" not in tags else {}
    told |= tags
    entries = sorted((numbers[name], 4, 1, value) for name, value in told.items())
    if "description" in tags:  # its value is where the text begins, and the text is what follows
        entries = [(270, 2, len(most), at) if entry[0] == 270 else entry for entry in entries]
    page = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return (b"II*\0" + struct.pack("<I", 8) + page + bytes(4)).ljust(at, b"\0") + most


def tiff_chain(count: int) -> bytes:
    """One page, and so many after it of a single tag each."""
    first = bytearray(tiff_of(bytes(17 * 13), samples=1, bits=8))
    ends = 8 + 2 + 12 * 10
    first[ends : ends + 4] = struct.pack("<I", len(first))
    pages = []
    for number in range(count):
        after = len(first) + 18 * (number + 1) if number + 1 < count else 0
        pages.append(struct.pack("<HHHIII", 1, 256, 4, 1, 17, after))
    return bytes(first) + b"".join(pages)


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IEND", b"")]
    made = b"".join(struct.pack(">I", len(body)) + kind + body + bytes(4) for kind, body in parts)
    return with_check_sums(b"\x89PNG\r\n\x1a\n" + made)


def gif_of(width: int, height: int, of_frame: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, of_frame, of_frame, 0) + b"\x02\x02\x4c\x01\0;"


def bmp_of(side: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + header


def webp_of(side: int) -> bytes:
    sides = 2 * struct.pack("<I", side - 1)[:3]
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + sides


def npy_of(header: str, version: bytes = b"\1\0") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header.encode()


def npy_shaped(shape: str, descr: str = "|u1") -> bytes:
    return npy_of(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n")


def jpeg_of_scans(count: int, after: bytes = b"") -> bytes:
    """A progressive JPEG that goes over its pixels many times, and what follows its end."""
    data = pillow(np.zeros((16, 16, 3), np.uint8), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * count + b"\xff\xd9" + after


OME = '<OME><Image><Pixels DimensionOrder="XYCZT" SizeX="{}" SizeY="13" SizeC="{}" SizeZ="1" SizeT="1"><TiffData {}/>'
OME += "</Pixels></Image></OME>\0"
LAUGHS = '<!DOCTYPE l [<!ENTITY a "aaaaaaaaaa">' + "".join(
    f'<!ENTITY {chr(c + 1)} "{f"&{chr(c)};" * 10}">' for c in range(97, 107)
)


def ome(text: str) -> bytes:
    """A TIFF of two pages of one channel, so that what its OME says counts."""
    data = bytearray(tiff_of(text.encode(), samples=1, description=0))
    ends = 8 + 2 + 12 * 11
    data[ends : ends + 4] = struct.pack("<I", len(data))
    second = tiff_of(samples=1)[8:]
    return bytes(data) + second


REFUSED = "REFUSED"  # in whatever words
# In this version or an earlier one these took gigabytes or minutes, raised MemoryError or were refused alike.
SMALL_BOMBS = {
    "tiff of many samples": (tiff_of(samples=65_535, width=2_000, height=2_000), "more than a file of"),
    "tiff of missing strips": (tiff_of(samples=8, bits=64, kind=3, width=13_000, height=13_000, offset=0), "can hold"),
    "tiff of few of its tiles": (
        tiff_of(width=900, height=900, tile_width=16, tile_height=16, tile_offset=8, tile_length=9),
        "1 of 3249 parts",
    ),
    "tiff of large tiles": (
        tiff_of(tile_width=2**31 - 16, tile_height=2**31 - 16, tile_offset=8, tile_length=9),
        REFUSED,
    ),
    "tiff of depth": (tiff_of(depth=2**31, tile_width=16, tile_height=16, tile_offset=8, tile_length=9), "can hold"),
    "tiff of a huge page": (tiff_of(width=60_000, height=60_000), "more than"),
    "tiff of a huge gray page": (tiff_of(width=60_000, height=60_000, samples=1), REFUSED),
    "tiff of a gray page": (tiff_of(width=13_000, height=13_000, samples=1), REFUSED),
    "tiff that leads to itself": (tiff_of(bytes(2210)).replace(bytes(4) + bytes(60), b"\x08\0\0\0" + bytes(60), 1), ""),
    "ome of many channels": (ome(OME.format(17, 2**31, "")), "which are more than 10,000"),
    "ome of a wide page": (ome(OME.format(2**40, 2, "")), "which are more than 10,000"),
    "ome of many planes": (ome(OME.format(17, 2, 'PlaneCount="9999999999"')), "which are more than 10,000"),
    "ome of entities": (ome(LAUGHS + "]><OME>&k;</OME>\0"), ""),
    "png": (png_of(60_000, 60_000, (b"IDAT", b"")), "exceeds limit"),
    "gif": (gif_of(60_000, 60_000, 60_000), "exceeds limit"),
    "gif whose frame is larger": (gif_of(10, 10, 60_000), "exceeds limit"),
    "gif cut short": (gif_of(13_300, 13_300, 13_300), "truncated"),
    "bmp": (bmp_of(60_000), "exceeds limit"),
    "bmp cut short": (bmp_of(13_000), "truncated"),
    "webp": (webp_of(16_000), "exceeds limit"),
    "ppm": (b"P6 60000 60000 255 ", "exceeds limit"),
    "ppm cut short": (b"P6 13000 13000 255 ", "truncated"),
    "npy": (npy_shaped("(1000000000000, 1000000000000)"), "truncated array"),
    "npy of digits": (npy_shaped("(99999999999999999999999999, 9999999999999999999999)"), "truncated array"),
    "npy of less than nothing": (npy_shaped("(-1, 35)") + bytes(35), "is not an image"),
    "npy of empty items": (npy_shaped("(1000000, 100000)", "|V0"), "itemsize cannot be zero"),
    "npy nested": (npy_of("-" * 8_999 + "1"), "EOF: reading array header"),
    "npy nested as far as it may": (npy_of("-" * 900 + "1"), REFUSED),
    "jpeg of many scans": (jpeg_of_scans(101), "more than 100 scans"),
}


@pytest.mark.parametrize("kind", SMALL_BOMBS)
def test_a_header_that_promises_much_is_refused_at_once(kind: str) -> None:
    data, reason = SMALL_BOMBS[kind]
    assert len(data) < 10_000
    found = check(data)
    assert found if reason is REFUSED else reason in found if reason else not found


# Built where they are used: each takes a while.
GROWING = {
    "tiff of many pages": lambda: (tiff_chain(50_000), ""),
    "zlib": lambda: (tiff_of(zlib.compress(bytes(2**27), 9) * 9, compression=8), ""),
    "lzma": lambda: (tiff_of(lzma.compress(bytes(2**26)), compression=34_925), ""),
    "png text": lambda: (png_of(9, 9, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27)))), "MAX_TEXT_CHUNK"),
    "png profile": lambda: (png_of(9, 9, (b"iCCP", b"a\0\0" + zlib.compress(bytes(2**27)))), "MAX_TEXT_CHUNK"),
    "png texts": lambda: (png_of(9, 9, *[(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6)))] * 99), "MAX_TEXT_MEMORY"),
    "png chunks": lambda: (
        png_of(9, 9, *[(b"abCd", b"")] * 50_000, (b"IDAT", zlib.compress(bytes(9 * 28)))),
        "",
    ),
}


@pytest.mark.parametrize("kind", GROWING)
def test_what_grows_when_it_is_opened_is_bounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, reason = GROWING[kind]()
    if kind in ("zlib", "lzma"):  # with a bound that is soon reached
        monkeypatch.setattr("lomar.data.decode._TIFF_BYTES", 2**24)
        monkeypatch.setattr("lomar.data.decode._TIFF_GROWTH", 1)
        reason = "decompress to more than"
    found = check(data)
    assert reason in found if reason else not found


def test_a_film_behind_a_photograph_does_not_count_as_scans() -> None:
    assert check(jpeg_of_scans(3, after=b"\xff\xda\0\0" * 500)) == ""


def test_an_array_that_float32_cannot_hold_is_refused_without_a_warning() -> None:
    assert "not finite" in check(npy(np.full((5, 7), 1e300)))
