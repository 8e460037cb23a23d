"""Bytes of any supported format -> the pixels of one crop at one size.

What is read, and how:

- The content decides the format, not the name. JPEG goes through libjpeg-turbo at the scale that the crop needs;
  `.npy` through NumPy; TIFF that is not plain 8-bit through tifffile; everything else through Pillow.
- EXIF orientation is applied: all sizes and boxes are those of the upright image.
- Transparent pixels are laid on white. Palettes and CMYK become RGB. Of an animation the first frame is taken.
- 16-bit grayscale stays 16-bit. A 16-bit RGB PNG is read at 8 bits, since Pillow does so (keep such data as TIFF
  or `.npy`).
- A three-dimensional array has its channels first if the first axis is shorter than the last, otherwise last.
- Pages of a TIFF are channels only where the file says so (ImageJ, OME, tifffile's own); otherwise page one is read.
- Memory is bounded by the size of the file, not by what its header says: at most MAX_PIXELS; of a TIFF with many
  channels at most 1 GiB and 64 times the file; of a JPEG at most 100 scans.
- Gray becomes RGB by repetition and RGB gray by ITU-R 601 luma; no other change of channels is made. A change of
  type keeps pixels / scale: uint8 255 = uint16 65535 = float32 1.0. Nothing but float32 is made of float32.
"""

import io
import logging
import lzma
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import PIL.ImageOps
import simplejpeg
import tifffile
import torch
import torch.nn.functional as F

from lomar.data.augment import Box
from lomar.errors import BadImageError

Size = tuple[int, int]

MAX_PIXELS = 2 * 89_478_485  # where Pillow calls a file a decompression bomb (Image.MAX_IMAGE_PIXELS, twice)
_SCALES = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}
_JPEG = b"\xff\xd8\xff"
_NPY_HEADER = 12 + 1_000  # bytes at most; longer ones can be nested so deep that Python's parser gives up
_MOST_SCANS = 100  # of a JPEG; a progressive one has about 10, and each takes as long as decoding all pixels
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # one that does not stand within a scan
_TIFF_BYTES = 2**30  # of pixels, and as many more as the file can be expected to hold:
_TIFF_GROWTH = 64  # times its size
_MOST_PAGES = 10_000  # that are channels
# Compressions that tifffile undoes without a look at the size that should come out: how, and how far they can grow.
_UNBOUNDED: dict[int, tuple[Callable[[], Any], int]] = {
    8: (zlib.decompressobj, 1_032),
    32_946: (zlib.decompressobj, 1_032),
    34_925: (lzma.LZMADecompressor, 10_000),
}
_EXIF_ORIENTATION = 0x0112
_EXIF_REACH = 65_536  # EXIF is the first or second segment of a JPEG, and a segment is at most this long


@dataclass(frozen=True)
class PixelFormat:
    """What every crop of a data set is turned into.

    Args:
        channels: number of channels.
        dtype: "uint8", "uint16" or "float32".
    """

    channels: int
    dtype: str

    @property
    def scale(self) -> float:
        """What to divide pixels by so that integers lie in 0..1: 255, 65535, or 1 for float32."""
        return _SCALES[self.dtype]


@dataclass(frozen=True)
class Image:
    """An image whose header has been read; pixels are decoded when a crop is asked for.

    Args:
        height: in pixels, upright.
        width: in pixels, upright.
        channels: as stored, transparency aside.
        dtype: as stored: "uint8", "uint16" or "float32".
        decode: (box, size, channels) -> array (h, w, c) of the box, upright, of any size from `size` up to the
            box's own, or of the box's own where that is smaller; c is `channels` where the decoder can convert at no
            cost, otherwise the image's own.
    """

    height: int
    width: int
    channels: int
    dtype: str
    decode: Callable[[Box, Size, int], np.ndarray]

    def crop(
        self,
        box: Box,
        size: Size,
        fmt: PixelFormat,
        lanczos: bool = False,
        finer: int = 1,
        bilinear: bool = False,
    ) -> np.ndarray:
        """The pixels of a box, resized (bicubic, antialiased).

        Args:
            box: (top, left, height, width) in pixels, inside the image.
            size: (rows, columns) of the result in pixels.
            fmt: channels and type of the result.
            lanczos: resize with Lanczos' filter instead.
            finer: what a JPEG's decoder shrinks by itself stays at least so many times the size. Against a picture made
                of every pixel, photographs at a quarter to an eighth of their size had 39 to 44 dB on average at 2,
                and 30 to 36 dB at 1.
            bilinear: resize with the bilinear filter instead, antialiased as well.

        Returns:
            (fmt.channels, rows, columns) of fmt.dtype.

        Raises:
            BadImageError: the file is damaged, or cannot be brought to this format.
        """
        if self.channels != fmt.channels and {self.channels, fmt.channels} != {1, 3}:
            raise BadImageError(f"{self.channels} channels where {fmt.channels} are wanted")
        pixels = self.decode(box, (finer * size[0], finer * size[1]), fmt.channels)  # (h, w, c)
        if pixels.shape[2] == 3 and fmt.channels == 1:
            pixels = _luma(pixels)
        pixels = _converted(pixels, fmt.dtype)
        resized = _resized_by_lanczos(pixels, size) if lanczos else _resized(pixels, size, bilinear)  # (c, rows, cols)
        if len(resized) == 1 and fmt.channels == 3:
            resized = np.repeat(resized, 3, axis=0)
        return resized


def decoded_once(image: Image, zoom: float, channels: int) -> Image:
    """An image whose pixels are there, so that many crops of it cost one decoding; boxes are as before.

    Args:
        image: not decoded yet.
        zoom: share of its sides that is fine enough; where a decoder can shrink, it may.
        channels: of the crops that will be asked for.

    Raises:
        BadImageError: the file is damaged.
    """
    size = (min(image.height, math.ceil(zoom * image.height)), min(image.width, math.ceil(zoom * image.width)))
    pixels = image.decode((0, 0, image.height, image.width), size, channels)
    down, across = pixels.shape[0] / image.height, pixels.shape[1] / image.width

    def cut(box: Box, size: Size, channels: int) -> np.ndarray:
        top, left, height, width = box
        row, column = int(top * down), int(left * across)
        bottom, right = max(row + 1, round((top + height) * down)), max(column + 1, round((left + width) * across))
        return pixels[row:bottom, column:right]

    return replace(image, decode=cut)


def read_image(data: bytes | memoryview, name: str) -> Image:
    """The image in a file's content; only the header is read where the format allows.

    Args:
        data: the whole file. Of `.npy` in mapped memory only the pages that a crop needs are read.
        name: the file's name; its ending is shown where the content is no image.

    Raises:
        BadImageError: empty, not an image, of an unsupported type, one pixel high or wide, or too large.
    """
    if not data:
        raise BadImageError("empty file")
    with _damage_reported():
        if data[:6] == b"\x93NUMPY":
            image = _read_npy(data)
        elif (data := bytes(data)).startswith(_JPEG):
            image = _read_jpeg(data)
        elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            image = _read_tiff(data)
        else:
            try:
                image = _read_pillow(data)
            except PIL.UnidentifiedImageError as error:
                ending = PurePath(name).suffix.lower()
                raise BadImageError(f"the content is not an image{ending and f', despite {ending}'}") from error
    _require_sane_size(image.height, image.width)
    return image


@contextmanager
def quietly() -> Iterator[None]:
    """Without what Pillow and tifffile say of oddities in files that can be read; of others BadImageError says it."""
    loggers = [logging.getLogger(name) for name in ("PIL", "tifffile")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _require_sane_size(height: int, width: int) -> None:
    if min(height, width) < 2:
        raise BadImageError(f"only {height} x {width} pixels (height x width)")
    if height * width > MAX_PIXELS:
        raise BadImageError(f"{height} x {width} pixels are more than {MAX_PIXELS:,}")


@contextmanager
def _damage_reported() -> Iterator[None]:
    """Turns whatever a decoder raises into BadImageError.

    Damaged bytes can take a decoder anywhere: Pillow and tifffile raise OSError, SyntaxError, struct.error, KeyError
    and more, so no list of types would be complete.
    """
    try:
        yield
    except (BadImageError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImageError(reason[:200]) from error


class _Turn(NamedTuple):
    """How stored pixels become upright: flip rows, flip columns, then swap the axes."""

    flip_rows: bool
    flip_columns: bool
    swap: bool

    def size(self, height: int, width: int) -> Size:
        return (width, height) if self.swap else (height, width)

    def stored_box(self, box: Box, height: int, width: int) -> Box:
        """Where a box of the upright image lies in the stored one, whose height and width are given."""
        top, left, rows, columns = box
        if self.swap:
            top, left, rows, columns = left, top, columns, rows
        if self.flip_rows:
            top = height - top - rows
        if self.flip_columns:
            left = width - left - columns
        return top, left, rows, columns

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        """A view (h, w, c) of stored pixels, upright."""
        if self.flip_rows:
            pixels = pixels[::-1]
        if self.flip_columns:
            pixels = pixels[:, ::-1]
        return pixels.swapaxes(0, 1) if self.swap else pixels


# By the value of the EXIF tag; TIFF has the same tag with the same meaning.
_TURNS = {
    1: _Turn(False, False, False),
    2: _Turn(False, True, False),
    3: _Turn(True, True, False),
    4: _Turn(True, False, False),
    5: _Turn(False, False, True),
    6: _Turn(True, False, True),
    7: _Turn(True, True, True),
    8: _Turn(False, True, True),
}


def is_jpeg(data: bytes | memoryview) -> bool:
    """Whether a file's content is a JPEG, whole or not."""
    return data[:3] == _JPEG


def is_upright_jpeg(data: bytes) -> bool:
    """Whether a file's content is a JPEG that no EXIF orientation turns."""
    return is_jpeg(data) and _jpeg_turn(data) == _TURNS[1]


def _jpeg_turn(data: bytes) -> _Turn:
    if data.find(b"Exif\0", 0, _EXIF_REACH) < 0:
        return _TURNS[1]
    try:
        return _TURNS.get(PIL.Image.open(io.BytesIO(data)).getexif().get(_EXIF_ORIENTATION, 1), _TURNS[1])
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return _TURNS[1]  # a photograph with a broken EXIF block is still a photograph


def _scans(data: bytes) -> int:
    """How often a JPEG goes over its pixels; what follows its end, such as a film, is none of it."""
    count, at = 0, 2
    while (marker := _JPEG_MARKER.search(data, at)) and data[marker.end() - 1] != 0xD9:
        count += data[marker.end() - 1] == 0xDA
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return count


def _read_jpeg(data: bytes) -> Image:
    if data.count(b"\xff\xda") > _MOST_SCANS and _scans(data) > _MOST_SCANS:  # the count alone is fast
        raise BadImageError(f"more than {_MOST_SCANS} scans in a JPEG")
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return _read_pillow(data)  # reads a few kinds more, and words the refusal better
    if colorspace not in ("Gray", "YCbCr", "RGB"):
        return _read_pillow(data)  # CMYK and YCCK
    turn = _jpeg_turn(data)

    def decode(box: Box, size: Size, channels: int) -> np.ndarray:
        mode = "GRAY" if channels == 1 or colorspace == "Gray" else "RGB"
        # The decoder can shrink by 2, 4 or 8 for less than the cost of decoding whole, and while it does so it
        # filters well enough: take the largest that leaves the crop at least as large as the result.
        shrink = next((s for s in (8, 4, 2) if box[2] >= s * size[0] and box[3] >= s * size[1]), 1)
        small = (math.ceil(height / shrink), math.ceil(width / shrink))
        try:
            pixels = simplejpeg.decode_jpeg(data, mode, min_height=small[0], min_width=small[1])
            if pixels.shape[:2] != small:  # not every kind of JPEG can be shrunk
                shrink = 1
                pixels = simplejpeg.decode_jpeg(data, mode)
        except ValueError as error:
            reason = str(error)
            if "remature" in reason or "Huffman" in reason:
                raise BadImageError(f"truncated or damaged JPEG ({reason})") from error
            # Lesser faults, such as stray bytes between segments, do not harm the picture.
            return _read_pillow(data).decode(box, size, channels)
        # The box is snapped to whole shrunk pixels: half of one at most, where resizing from between them would
        # blur more than that.
        top, left, rows, columns = turn.stored_box(box, height, width)
        first_row, end_row = _snapped(top, rows, shrink, small[0])
        first_column, end_column = _snapped(left, columns, shrink, small[1])
        return turn.upright(pixels[first_row:end_row, first_column:end_column])

    return Image(*turn.size(height, width), 1 if colorspace == "Gray" else 3, "uint8", decode)


def _snapped(start: int, length: int, shrink: int, end: int) -> tuple[int, int]:
    """First and end index, in an axis of `end` shrunk pixels, of a stretch given in full pixels."""
    first = min(round(start / shrink), end - 1)
    return first, max(first + 1, min(round((start + length) / shrink), end))


# Pillow's modes, transparency aside -> channels and type.
_PILLOW_MODES = {
    **dict.fromkeys(("1", "L", "LA", "La"), (1, "uint8")),
    **dict.fromkeys(("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"), (3, "uint8")),
    **dict.fromkeys(("I", "I;16", "I;16L", "I;16B", "I;16N"), (1, "uint16")),
    "F": (1, "float32"),
}


def _read_pillow(data: bytes) -> Image:
    picture = PIL.Image.open(io.BytesIO(data))
    if picture.mode not in _PILLOW_MODES:
        raise BadImageError(f"pixels of mode {picture.mode} are not supported")
    channels, dtype = _PILLOW_MODES[picture.mode]
    width, height = picture.size
    # Pillow turns TIFF by itself and reports the turned size already.
    if picture.format != "TIFF" and picture.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8):
        height, width = width, height

    def decode(box: Box, size: Size, wanted: int) -> np.ndarray:
        with _damage_reported():
            # Opened anew, so that a second crop does not meet a used-up decoder.
            upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
            top, left, rows, columns = box
            # Cut before the conversions: they need not touch what is thrown away.
            part = upright.crop((left, top, left + columns, top + rows))
            return _pillow_pixels(part, channels, dtype)

    return Image(height, width, channels, dtype, decode)


def _pillow_pixels(picture: PIL.Image.Image, channels: int, dtype: str) -> np.ndarray:
    """(h, w, channels) of the given type."""
    if dtype == "uint8":
        if picture.has_transparency_data:
            white = PIL.Image.new("RGBA", picture.size, "white")
            picture = PIL.Image.alpha_composite(white, picture.convert("RGBA"))
        pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    else:
        pixels = np.asarray(picture)
        if pixels.dtype == np.int32 and (pixels.min() < 0 or pixels.max() > 65_535):  # mode I
            raise BadImageError("32-bit pixels beyond 0..65535 are not supported")
        pixels = pixels.astype(dtype, copy=False)
    return pixels.reshape(*pixels.shape[:2], channels)


def _read_npy(data: bytes | memoryview) -> Image:
    file = io.BytesIO(data[:_NPY_HEADER])
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(file)
    if dtype.hasobject:
        raise BadImageError("the array holds Python objects, which are not read")
    if min(shape, default=0) < 0:
        raise BadImageError(f"an array of shape {shape} is not an image")
    body = memoryview(data)[file.tell() :]
    if len(body) < math.prod(shape) * dtype.itemsize:
        raise BadImageError(f"truncated array: {len(body)} bytes of {math.prod(shape) * dtype.itemsize}")
    array = np.frombuffer(body, dtype, math.prod(shape)).reshape(shape, order="F" if fortran_order else "C")
    return _from_array(array)


def _from_array(array: np.ndarray) -> Image:
    """An image of an array (H, W), (H, W, C) or (C, H, W); see the module's docstring for which."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise BadImageError(f"an array of shape {array.shape} is not an image")
    if array.shape[0] < array.shape[2]:
        array = np.moveaxis(array, 0, -1)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    native = "float32" if array.dtype.kind == "f" else array.dtype.newbyteorder("=").name
    if native not in _SCALES:
        raise BadImageError(f"{array.dtype.name} pixels are not supported (uint8, uint16 or float)")

    def decode(box: Box, size: Size, channels: int) -> np.ndarray:
        top, left, rows, columns = box
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            pixels = array[top : top + rows, left : left + columns].astype(native, copy=False)
        if native == "float32" and not np.isfinite(pixels).all():
            raise BadImageError("pixels that are not finite")
        return pixels

    height, width, channels = array.shape
    return Image(height, width, channels, native, decode)


def _read_tiff(data: bytes) -> Image:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page, stack = file.pages.first, _stack_in(file)
        # Pillow knows palettes, transparency and every compression, but only 8-bit and one-channel pictures.
        if stack is None and (page.samplesperpixel == 1 or (page.bitspersample == 8 and page.samplesperpixel <= 4)):
            return _read_pillow(data)
        _require_sane_size(page.imagelength, page.imagewidth)  # before memory is taken for the pixels
        pixels = page if stack is None else stack
        most = _TIFF_BYTES + _TIFF_GROWTH * len(data)
        if math.prod(pixels.shape) * (pixels.dtype.itemsize if pixels.dtype else 1) > most:
            raise BadImageError(f"pixels of shape {pixels.shape} are more than a file of {len(data)} bytes can hold")
        _require_whole_segments(page, data, most)
        array = pixels.asarray()
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and stack is None:
            array = np.moveaxis(array, 0, -1)
        orientation = page.tags.valueof(_EXIF_ORIENTATION, 1)
    if array.ndim == 3 and stack is None:
        array = _TURNS.get(orientation, _TURNS[1]).upright(array)
    return _from_array(array)


def _stack_in(file: tifffile.TiffFile) -> tifffile.TiffPageSeries | None:
    """The pages that are channels of one picture, where the file says so."""
    # Others are not asked for series: to make them all pages are read.
    if not (file.is_shaped or file.is_imagej or file.is_ome) or len(file.pages) < 2:
        return None
    if len(file.pages) > _MOST_PAGES:
        raise BadImageError(f"{len(file.pages)} pages are more than {_MOST_PAGES:,}")
    if file.is_ome:
        try:
            _require_sane_ome(file.ome_metadata or "", file.pages.first.imagelength * file.pages.first.imagewidth)
        except ElementTree.ParseError:
            return None
    series = file.series[0]
    return series if series.kind in ("shaped", "imagej", "ome") and len(series.shape) == 3 else None


def _require_sane_ome(xml: str, page_px: int) -> None:
    """Raises BadImageError: it tells of more pages than can be; tifffile would make a list of them.

    Raises ParseError: it is no XML.
    """
    for element in ElementTree.fromstring(xml).iter():
        told = element.attrib
        counts = [math.prod(int(told.get(f"Size{axis}", 1)) for axis in "XYCZT") / max(1, page_px)]
        counts += [int(told.get(name, 0)) for name in ("NumPlanes", "PlaneCount", "IFD")]
        if "Start" in told:
            counts.append((float(told["End"]) - float(told["Start"])) / float(told.get("Step", 1)))
        if max(counts) > _MOST_PAGES:
            raise BadImageError(f"OME of {max(counts):g} pages, which are more than {_MOST_PAGES:,}")


def _require_whole_segments(page: tifffile.TiffPage, data: bytes, most: int) -> None:
    """Raises BadImageError: strips or tiles are missing, or one grows to more than `most` bytes.

    tifffile would make each missing one of zeros, and undo a compression to its end.
    """
    count = math.prod(page.chunked)
    if count > len(page.dataoffsets):
        raise BadImageError(f"{len(page.dataoffsets)} of {count} parts of the picture are there")
    begin, growth = _UNBOUNDED.get(page.compression, (None, 0))
    for offset, length in zip(page.dataoffsets, page.databytecounts, strict=False):
        if begin is None or length * growth <= most:
            continue
        decompressor, grown, rest = begin(), 0, data[offset : offset + length]
        while not decompressor.eof:
            piece = len(decompressor.decompress(rest, 2**26))
            rest = getattr(decompressor, "unconsumed_tail", b"")
            grown += piece
            if grown > most:
                raise BadImageError(f"{length} bytes decompress to more than {most}")
            if not piece:
                break  # cut short, which is found out when it is decoded


def _luma(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) -> (h, w, 1) of the same type: ITU-R 601 luma, as Pillow and JPEG have it."""
    if pixels.dtype == np.float32:
        return pixels @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32)
    # Pillow's fixed-point weights: they sum to 65536, so a gray pixel keeps its value.
    weights = np.array([[19_595], [38_470], [7_471]], dtype=np.uint32)
    return ((pixels.astype(np.uint32) @ weights + 32_768) >> 16).astype(pixels.dtype)


def _converted(pixels: np.ndarray, dtype: str) -> np.ndarray:
    """The same picture in another pixel type: pixels / scale is kept."""
    native = pixels.dtype.name
    if native == dtype:
        return pixels
    if native == "float32":
        raise BadImageError(f"float32 pixels have no fixed range to become {dtype}")
    if dtype == "float32":
        return pixels.astype(np.float32) / np.float32(_SCALES[native])
    if dtype == "uint16":
        return pixels.astype(np.uint16) * np.uint16(257)
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _resized(pixels: np.ndarray, size: Size, bilinear: bool) -> np.ndarray:
    """(h, w, c) -> (c, rows, columns) of the same type, bicubic or bilinear with antialiasing."""
    # A copy, since torch takes neither read-only memory nor the negative strides of a turned image.
    tensor = torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)[None]  # (1, c, h, w)
    if pixels.shape[:2] != size:
        if pixels.dtype == np.uint16:
            tensor = tensor.to(torch.float32)
        # uint8 has its own vectorised path in torch: a fifth of the time of float32.
        tensor = F.interpolate(tensor, size, mode="bilinear" if bilinear else "bicubic", antialias=True)
    resized = tensor[0].contiguous().numpy()
    if resized.dtype != pixels.dtype:
        # Bicubic overshoots at edges. float32 data has no bounds to keep to, uint16 has.
        resized = resized.round().clip(0, 65_535).astype(np.uint16)
    return resized


def _resized_by_lanczos(pixels: np.ndarray, size: Size) -> np.ndarray:
    """(h, w, c) -> (c, rows, columns) of the same type, by Pillow, a channel at a time but for 8-bit colour."""
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        image = PIL.Image.fromarray(pixels).resize(size[::-1], PIL.Image.Resampling.LANCZOS)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    mode = np.uint8 if pixels.dtype == np.uint8 else np.float32
    channels = [
        np.asarray(PIL.Image.fromarray(channel).resize(size[::-1], PIL.Image.Resampling.LANCZOS))
        for channel in np.ascontiguousarray(pixels.astype(mode, copy=False).transpose(2, 0, 1))
    ]
    resized = np.stack(channels)
    return resized.round().clip(0, 65_535).astype(np.uint16) if pixels.dtype == np.uint16 else resized
