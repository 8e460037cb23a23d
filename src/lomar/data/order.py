"""In what order a run meets its images, and which shards that takes.

An order gives for each slot of each global batch an epoch and an image, as a function of the seed alone: a run can
begin at any batch, and neither the processes nor their workers change what it meets.

Where all images are at hand, an epoch is a random order of them, and epochs follow each other.

Where shards must be fetched, the images are dealt to lanes. A lane is a row of contiguous slots in every batch, so
that a process, whose slots are contiguous, needs the shards of its own lanes alone. The shards are put into a random
order, once for all epochs, and cut into lanes of equally many images; a shard at a cut is shared by two. A lane goes
through its shards in a new random order each epoch, some at a time: the images of these, its pool, come in random
order. So a machine among many has few shards on its disk, and each batch is of images of many shards.

Where images are repeated, N epochs of samples are met in one epoch of the order: two images at a time come N times in
turn, as in a b a b a b for three times, each time as the sample of another epoch. So the samples are those of N epochs
without repetition, in another order.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch

from lomar.data.shards import Shard, ShardGroups
from lomar.data.sources import ImageSource
from lomar.seeding import seeded

MOST_LANES = 64
_LEAST_SHARDS = 4  # of a lane
_MOST_POOLED = 16  # shards of a pool
_TRIED_OF_A_SHARD = 2  # images, in the place of one that cannot be read
_UNTOLD_BYTES = 2**30  # of a shard whose server does not say how long it is
POOLED_GB = 16.0  # GiB of all pools if nothing else is asked; as much again of what comes next is fetched meanwhile


class Place(NamedTuple):
    """Where a run is: image `index` in its `epoch`, which is how often the image came before."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


def unrepeated(position: int, repeats: int) -> tuple[int, int]:
    """Where the image of a position is in the same order without repetition, and which repetition it is, from 0.

    Images are repeated two and two, so that neighbours, which `lomar.data.supervised` mixes, are different ones at any
    batch size: positions 0 to 7 of three times are images 0 1 0 1 0 1 2 3.

    Args:
        position: in the order with repetition, from 0.
        repeats: how often each image comes.

    Source: DeiT's repeated augmentation, three times in a row, over which its batches are cut as well.
    """
    pair, which = divmod(position, 2)
    return 2 * (pair // repeats) + which, pair % repeats


class Order(Protocol):
    """What comes when."""

    def at(self, batch: int, slot: int) -> Place:
        """The image of a slot of a global batch, both from 0."""

    def needed(self, batch: int, slot: int) -> tuple[Sequence[Shard], Sequence[Shard]]:
        """The shards that a slot's images come from now, and those they come from next."""

    def instead(self, epoch: int, index: int, attempt: int) -> int:
        """The image that is tried in the place of one that cannot be read.

        Args:
            epoch: of the sample.
            index: the one that cannot be read.
            attempt: how many were tried in its place before.
        """


class Shuffled:
    """The images in a new random order each epoch: position p is image `permutation(seed, p // n)[p % n]` of epoch
    `p // n`, and batch b is positions b * batch_size up to (b + 1) * batch_size; of repeated images, as `unrepeated`
    says.

    Args:
        count: images.
        seed: of the run.
        batch_size: samples of a global batch.
        repeats: how often two images come before others do.
    """

    def __init__(self, count: int, seed: int, batch_size: int, repeats: int = 1) -> None:
        self._count, self._seed, self._batch_size, self._repeats = count, seed, batch_size, repeats
        self._epoch, self._permutation = -1, torch.empty(0)

    def at(self, batch: int, slot: int) -> Place:
        position, repetition = unrepeated(batch * self._batch_size + slot, self._repeats)
        epoch, place = divmod(position, self._count)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = torch.randperm(self._count, generator=seeded(self._seed, epoch, "order"))
        return Place(epoch * self._repeats + repetition, int(self._permutation[place]))

    def needed(self, batch: int, slot: int) -> tuple[Sequence[Shard], Sequence[Shard]]:
        return (), ()

    def instead(self, epoch: int, index: int, attempt: int) -> int:
        chance = seeded(self._seed, epoch, index, "replacement", attempt)
        return int(torch.randint(self._count, (1,), generator=chance))


class _Piece(NamedTuple):
    """Images of a shard that are a lane's: places in the groups' `indices`."""

    shard: int
    images: range


class _Course(NamedTuple):
    """How a lane goes through its shards in one epoch.

    Args:
        epoch: which.
        pools: pieces whose images come in random order, one pool after another.
        stops: the place in the lane's epoch after the last image of each pool.
    """

    epoch: int
    pools: list[list[_Piece]]
    stops: list[int]


class _Shuffled(NamedTuple):
    """The images of a pool as they come: places in the groups' `indices`, int64 (n,)."""

    epoch: int
    pool: int
    images: np.ndarray


class Lanes:
    """The order of images in shards that must be fetched.

    Args:
        groups: the images of each shard.
        seed: of the run.
        batch_size: samples of a global batch.
        pooled_gb: GiB of shards in the pools of all lanes together, at most.
        repeats: how often two images come before others of their lane do.
    """

    def __init__(
        self, groups: ShardGroups, seed: int, batch_size: int, pooled_gb: float = POOLED_GB, repeats: int = 1
    ) -> None:
        self._groups, self._seed, self.batch_size, self._repeats = groups, seed, batch_size, repeats
        mean_bytes = max(1, sum(map(_bytes_of, groups.shards)) // len(groups.shards))
        count = int(groups.ends[-1])
        pooled_shards = int(pooled_gb * 2**30 / mean_bytes)
        self.lanes = lanes_for(batch_size, len(groups.shards), count, pooled_shards)
        self.pooled = max(1, min(_MOST_POOLED, pooled_shards // self.lanes))
        self._slots = batch_size // self.lanes
        self._dealt = self._deal(count)
        self._counts = [sum(len(piece.images) for piece in pieces) for pieces in self._dealt]
        # Of each lane, what was worked out last.
        self._courses: dict[int, _Course] = {}
        self._shuffled: dict[int, _Shuffled] = {}

    def at(self, batch: int, slot: int) -> Place:
        lane, epoch, place, repetition = self._lane(batch, slot)
        course = self._course(lane, epoch)
        pool = bisect_right(course.stops, place)
        told = self._shuffled.get(lane)
        if told is None or (told.epoch, told.pool) != (epoch, pool):
            images = np.concatenate([np.arange(piece.images.start, piece.images.stop) for piece in course.pools[pool]])
            chance = seeded(self._seed, epoch, lane, pool, "pool")
            told = _Shuffled(epoch, pool, images[torch.randperm(len(images), generator=chance).numpy()])
            self._shuffled[lane] = told
        image = told.images[place - course.stops[pool]]  # counted from the end
        return Place(epoch * self._repeats + repetition, int(self._groups.indices[int(image)]))

    def needed(self, batch: int, slot: int) -> tuple[Sequence[Shard], Sequence[Shard]]:
        lane, epoch, place, _ = self._lane(batch, slot)
        course = self._course(lane, epoch)
        pool = bisect_right(course.stops, place)
        last = pool == len(course.pools) - 1
        after = self._drawn_course(lane, epoch + 1).pools[0] if last else course.pools[pool + 1]
        shards = self._groups.shards
        return [shards[piece.shard] for piece in course.pools[pool]], [shards[piece.shard] for piece in after]

    def instead(self, epoch: int, index: int, attempt: int) -> int:
        """First one of the same shard; then of another one, which is the same for all images of this shard and epoch,
        so that a shard that is gone costs a few others and not all of them."""
        shard = int(np.searchsorted(self._groups.ends, self._place_of(index), side="right"))
        if other := attempt // _TRIED_OF_A_SHARD:
            chance = seeded(self._seed, epoch, shard, "other shard", other)
            shard = int(torch.randint(len(self._groups.shards), (1,), generator=chance))
        chance = seeded(self._seed, epoch, index, "replacement", attempt)
        images = self._groups.of(shard)
        return int(self._groups.indices[images[int(torch.randint(len(images), (1,), generator=chance))]])

    def _place_of(self, index: int) -> int:
        """Where an image is in the groups' `indices`."""
        if isinstance(self._groups.indices, range):
            return index
        return int(np.flatnonzero(np.asarray(self._groups.indices) == index)[0])

    def bytes_at_once(self, slots: range) -> int:
        """Of the shards that some slots are fed from at a time, most of all; those to come next are as much again."""
        lanes = {slot // self._slots for slot in slots}
        largest = 0
        for lane in lanes:
            shards = {piece.shard: _bytes_of(self._groups.shards[piece.shard]) for piece in self._dealt[lane]}
            largest += sum(sorted(shards.values())[-self.pooled :])
        return largest

    def _lane(self, batch: int, slot: int) -> tuple[int, int, int, int]:
        """(lane, epoch of its order, place in that, repetition) of a slot."""
        lane = slot // self._slots
        position, repetition = unrepeated(batch * self._slots + slot % self._slots, self._repeats)
        return lane, *divmod(position, self._counts[lane]), repetition

    def _course(self, lane: int, epoch: int) -> _Course:
        told = self._courses.get(lane)
        if told is None or told.epoch != epoch:
            told = self._courses[lane] = self._drawn_course(lane, epoch)
        return told

    def _drawn_course(self, lane: int, epoch: int) -> _Course:
        pieces = self._dealt[lane]
        order = torch.randperm(len(pieces), generator=seeded(self._seed, epoch, lane, "shards")).numpy()
        # As many in each as the count allows: a last pool of one shard would mix little.
        parts = np.array_split(order, -(-len(pieces) // self.pooled))
        pools = [[pieces[number] for number in part.tolist()] for part in parts]
        return _Course(epoch, pools, list(accumulate(sum(len(piece.images) for piece in pool) for pool in pools)))

    def _deal(self, count: int) -> list[list[_Piece]]:
        """The pieces of each lane."""
        order = torch.randperm(len(self._groups.shards), generator=seeded(self._seed, "lanes")).tolist()
        cuts = [lane * count // self.lanes for lane in range(1, self.lanes + 1)]
        dealt: list[list[_Piece]] = [[] for _ in cuts]
        lane = passed = 0
        for shard in order:
            images = self._groups.of(shard)
            while len(images):
                here = min(len(images), cuts[lane] - passed)
                dealt[lane].append(_Piece(shard, images[:here]))
                images, passed = images[here:], passed + here
                if passed == cuts[lane]:
                    lane += 1
        return dealt


def _bytes_of(shard: Shard) -> int:
    return shard.size if shard.size >= 0 else _UNTOLD_BYTES


def lanes_for(batch_size: int, shards: int, images: int, pooled: int) -> int:
    """The count of lanes: the largest power of two that divides the batch, leaves each lane a few shards, and keeps
    what is read at a time within bounds.

    Args:
        batch_size: samples of a global batch.
        shards: that are dealt.
        images: in all of them.
        pooled: shards that may be in pools at a time.
    """
    lanes = 1
    while 2 * lanes <= min(MOST_LANES, shards // _LEAST_SHARDS, images, pooled) and batch_size % (2 * lanes) == 0:
        lanes *= 2
    return lanes


def order_of(source: ImageSource, seed: int, batch_size: int, pooled_gb: float = POOLED_GB, repeats: int = 1) -> Order:
    """The order in which a run meets the images of a source.

    Args:
        source: the images.
        seed: of the run.
        batch_size: samples of a global batch.
        pooled_gb: as of `Lanes`, where images lie in shards that must be fetched.
        repeats: how often two images come before others do.
    """
    groups = source.by_shard()
    if groups is None:
        return Shuffled(len(source), seed, batch_size, repeats)
    return Lanes(groups, seed, batch_size, pooled_gb, repeats)
