"""What the files of a source are, learnt from a few of them before anything is started."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median_low

import numpy as np

from lomar.data.augment import centre_crop
from lomar.data.decode import PixelFormat, quietly, read_image
from lomar.data.sources import ImageSource
from lomar.errors import BadImageError, UserError

_DTYPES_BY_WIDTH = ("uint8", "uint16", "float32")
_FETCHED = 4  # shards that are looked into, where they must be fetched
_PROBE_SIDE_PX = 16  # small, so that JPEG decodes at an eighth; the whole file is still read to its end


@dataclass(frozen=True)
class Survey:
    """What was found.

    Args:
        count: files in the source.
        probed: files that were decoded.
        unreadable: (name, reason) of those that could not be.
        median_short_side_px: of the readable ones.
        smallest_short_side_px: of the readable ones.
        format: channels and pixel type that every file can be brought to.
    """

    count: int
    probed: int
    unreadable: list[tuple[str, str]]
    median_short_side_px: int
    smallest_short_side_px: int
    format: PixelFormat


@dataclass(frozen=True)
class _Probe:
    name: str
    short_side_px: int
    channels: int
    dtype: str


def survey(
    source: ImageSource,
    limit: int = 256,
    max_bad_share: float = 0.25,
    flag: str = "--data",
    channels: int | None = None,
) -> Survey:
    """Decodes up to `limit` files, spread evenly over the source.

    All gray: one channel. Gray and RGB: three. Any other count must be the same in all files. The pixel type is the
    widest found: uint8, uint16, float32.

    Args:
        source: the files.
        limit: most files to decode.
        max_bad_share: refuse if a larger share of them cannot be read.
        flag: the option the source came from, for messages.
        channels: the count the user asked for; by default it is found out.

    Raises:
        UserError: too many unreadable files, or channel counts that do not go together.
    """
    indices = spread_over(source, limit)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, quietly():
        outcomes = list(pool.map(lambda index: _probe(source, index), indices))
    readable = [outcome for outcome in outcomes if isinstance(outcome, _Probe)]
    unreadable = [outcome for outcome in outcomes if not isinstance(outcome, _Probe)]
    if unreadable:
        name, reason = unreadable[0]
        if not readable:
            raise UserError(f"{flag}: none of {len(indices)} files can be read, for example {name}: {reason}")
        if len(unreadable) > max_bad_share * len(indices):
            raise UserError(
                f"{flag}: {len(unreadable)} of {len(indices)} files cannot be read ({name}: {reason}); "
                f"--max-bad-share allows {max_bad_share:.0%}"
            )
    sides = [probe.short_side_px for probe in readable]
    return Survey(
        count=len(source),
        probed=len(indices),
        unreadable=unreadable,
        median_short_side_px=median_low(sides),
        smallest_short_side_px=min(sides),
        format=PixelFormat(
            _common_channels(readable, channels, flag),
            max((probe.dtype for probe in readable), key=_DTYPES_BY_WIDTH.index),
        ),
    )


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` indices below `count`, evenly spread."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int).tolist()


def spread_over(source: ImageSource, limit: int) -> list[int]:
    """At most `limit` images of a source, evenly spread; where shards must be fetched, over a few of these."""
    groups = source.by_shard()
    if groups is None:
        return spread(len(source), limit)
    places = [place for shard in spread(len(groups.shards), _FETCHED) for place in groups.of(shard)]
    return [int(groups.indices[places[number]]) for number in spread(len(places), limit)]


def _probe(source: ImageSource, index: int) -> _Probe | tuple[str, str]:
    name = source.name(index)
    try:
        image = read_image(source.read(index), name)
        native = PixelFormat(image.channels, image.dtype)
        # The header alone would not show a truncated file.
        image.crop((0, 0, image.height, image.width), (_PROBE_SIDE_PX, _PROBE_SIDE_PX), native)
    except (BadImageError, OSError) as error:
        return name, reason_for(error)
    return _Probe(name, min(image.height, image.width), image.channels, image.dtype)


def reason_for(error: BadImageError | OSError) -> str:
    """Why a file cannot be read, without its name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _common_channels(probes: list[_Probe], wanted: int | None, flag: str) -> int:
    example = {probe.channels: probe.name for probe in reversed(probes)}  # count -> the first file that has it
    target = wanted or (3 if set(example) == {1, 3} else Counter(p.channels for p in probes).most_common(1)[0][0])
    for count, name in example.items():
        if count != target and {count, target} != {1, 3}:
            other = f"{example[target]} has {target}" if wanted is None else f"--channels is {target}"
            raise UserError(f"{flag}: {name} has {count} channels, but {other}")
    return target


def channel_statistics(
    source: ImageSource, fmt: PixelFormat, size_px: int = 224, limit: int = 256
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over central crops, in units of 0..1 (pixels / fmt.scale).

    Args:
        source: the files; unreadable ones are passed over.
        fmt: the format of the pixels.
        size_px: side of the crops, best that of training, since averaging pixels narrows their spread.
        limit: most files to decode, spread evenly over the source.

    Returns:
        (mean, std), one number a channel; std is at least 1e-3, so that dividing by it is safe.

    Raises:
        UserError: no file can be read.
    """

    def moments(index: int) -> np.ndarray | None:
        try:
            image = read_image(source.read(index), source.name(index))
            pixels = image.crop(centre_crop(image.height, image.width), (size_px, size_px), fmt)
        except (BadImageError, OSError):
            return None
        values = pixels.reshape(fmt.channels, -1).astype(np.float64) / fmt.scale  # (C, size_px ** 2)
        return np.stack([values.mean(axis=1), (values**2).mean(axis=1)])  # (2, C)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, quietly():
        found = [pair for pair in pool.map(moments, spread_over(source, limit)) if pair is not None]
    if not found:
        raise UserError("no image can be read to estimate mean and standard deviation from")
    mean, square = np.mean(found, axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0.0)).clip(min=1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())
