"""An image made smaller once, so that it need not be decoded whole each time: what becomes of it, as a file."""

import io
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import simplejpeg
from torch.utils.data import Dataset

from lomar.data.decode import Image, PixelFormat, Size, is_jpeg, is_upright_jpeg, read_image
from lomar.data.sources import ImageSource
from lomar.data.survey import reason_for
from lomar.data.workers import loaded
from lomar.errors import BadImageError

_AT_ONCE = 8  # images that a worker hands over together
_DAMAGE_SIDE_PX = 16  # decoded to so little, a JPEG shows that it is whole at the least cost
# Of what the decoder shrinks, so much is left to be resized properly. It is Pillow's choice for thumbnails as well.
_FINER = 2


@dataclass(frozen=True)
class Prepared:
    """A member of a shard.

    Args:
        ending: "jpg" or "npy".
        content: of the file.
        kept: whether it is the original, byte for byte.
    """

    ending: str
    content: bytes
    kept: bool = False


@dataclass(frozen=True)
class Preparation:
    """What becomes of images.

    Args:
        short_side_px: of a larger image; a smaller one keeps its size.
        encoding: "jpeg", for 8-bit gray and colour, what else there is becoming an array; or "raw", arrays alone.
        quality: of JPEG.
    """

    short_side_px: int
    encoding: str
    quality: int

    def __call__(self, data: bytes, name: str) -> Prepared:
        """The file that an image file becomes, upright.

        A JPEG that is small enough and needs no turn stays as it is. What was JPEG has its colour at half the
        resolution again (4:2:0), what was not at the full one (4:4:4).

        Args:
            data: the content of the file.
            name: of the file.

        Raises:
            BadImageError: it is damaged, no image, or an array that could not be told from one in another order.
        """
        image = read_image(data, name)
        size = self._size(image)
        jpeg = self.encoding == "jpeg" and image.dtype == "uint8" and image.channels in (1, 3)
        if jpeg and size == (image.height, image.width) and is_upright_jpeg(data):
            _pixels(image, (_DAMAGE_SIDE_PX, _DAMAGE_SIDE_PX))
            return Prepared("jpg", data, kept=True)
        pixels = _pixels(image, size, _FINER)
        if not jpeg:
            return Prepared("npy", _npy(pixels))
        if image.channels == 1:
            return Prepared("jpg", simplejpeg.encode_jpeg(pixels, self.quality, "GRAY", "Gray"))
        sampling = "420" if is_jpeg(data) else "444"
        return Prepared("jpg", simplejpeg.encode_jpeg(pixels, self.quality, "RGB", sampling))

    def _size(self, image: Image) -> Size:
        share = min(1.0, self.short_side_px / min(image.height, image.width))
        return round(image.height * share), round(image.width * share)


def _pixels(image: Image, size: Size, finer: int = 1) -> np.ndarray:
    """(rows, columns, channels) of the whole image, of its own type."""
    whole = (0, 0, image.height, image.width)
    pixels = image.crop(whole, size, PixelFormat(image.channels, image.dtype), finer=finer)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _npy(pixels: np.ndarray) -> bytes:
    """A .npy file of (rows, columns, channels), without the axis of a single channel."""
    rows, columns, channels = pixels.shape
    if channels == 1:
        pixels = pixels[:, :, 0]
    elif rows < channels:  # it would be read as (channels, rows, columns)
        if channels >= columns:
            raise BadImageError(f"{rows} x {columns} pixels are too few for an array of {channels} channels")
        pixels = pixels.transpose(2, 0, 1)
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False)
    return file.getvalue()


@dataclass(frozen=True)
class _Preparing(Dataset[list[Prepared | str]]):
    source: ImageSource
    preparation: Preparation

    def __getitems__(self, indices: list[int]) -> list[Prepared | str]:
        return [self._prepared(index) for index in indices]

    def _prepared(self, index: int) -> Prepared | str:
        try:
            return self.preparation(bytes(self.source.read(index)), self.source.name(index))
        except (BadImageError, OSError) as error:
            return reason_for(error)


def prepared_images(
    source: ImageSource, preparation: Preparation, first: int, workers: int
) -> Generator[tuple[list[int], list[Prepared | str]], None, None]:
    """What becomes of each image in order, some at a time.

    Args:
        source: the images.
        preparation: what is done to them.
        first: the image to begin with.
        workers: processes that do it; 0 does it in this one.

    Yields:
        Numbers of the images, and what each became, or why it cannot be read.
    """
    starts = range(first, len(source), _AT_ONCE)

    def numbers() -> Iterator[list[int]]:
        return (list(range(start, min(start + _AT_ONCE, len(source)))) for start in starts)

    found = loaded(_Preparing(source, preparation), numbers(), workers, pin_memory=False)
    with closing(found):
        for some in numbers():
            yield some, next(found)
