"""Claims about the order in which a run meets its images."""

import pickle
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
from fuzz.mutation import examples
from hypothesis import given
from hypothesis import strategies as st

from lomar.data import order as module
from lomar.data.loader import micro_batch_keys, share_of_batch, stream
from lomar.data.order import Lanes, Order, Shuffled, lanes_for, order_of, unrepeated
from lomar.data.shards import Members, Shard, ShardGroups, grouped
from lomar.data.sources import ImageSource

MB = 2**20


class Far(Shard):
    """A shard that must be fetched."""

    remote: ClassVar[bool] = True


def groups_of(counts: list[int], size: int = MB) -> ShardGroups:
    shards = tuple(Far(f"{number}.tar", size, "") for number in range(len(counts)))
    return ShardGroups(shards, np.cumsum(counts), range(sum(counts)))


def lane_of(order: Lanes, slot: int) -> int:
    return slot * order.lanes // order.batch_size


COUNTS = st.lists(st.integers(1, 13), min_size=1, max_size=40)
BATCHES = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16])


@examples(60)
@given(counts=COUNTS, batch_size=BATCHES, seed=st.integers(0, 99), size=st.sampled_from([MB, 2**30, 2**33]))
def test_each_lane_repeats_nothing_in_its_epoch_and_all_lanes_together_are_all_images(
    counts: list[int], batch_size: int, seed: int, size: int
) -> None:
    order = Lanes(groups_of(counts, size), seed, batch_size)
    met: Counter[tuple[int, int]] = Counter()
    seen: dict[int, list[tuple[int, int]]] = {}
    for batch in range(2 * sum(counts) // batch_size + 2):
        for slot in range(batch_size):
            place = order.at(batch, slot)
            met[place] += 1
            seen.setdefault(lane_of(order, slot), []).append(tuple(place))
    assert max(met.values()) == 1
    for epoch in (0, 1):
        assert {index for e, index in met if e == epoch} == set(range(sum(counts)))
    for places in seen.values():
        assert [epoch for epoch, _ in places] == sorted(epoch for epoch, _ in places)
    sizes = [sum(epoch == 0 for epoch, _ in places) for places in seen.values()]
    assert max(sizes) - min(sizes) <= 1  # so that no image is met more often than another


@examples(60)
@given(
    counts=COUNTS, batch_size=BATCHES, first=st.integers(0, 200), seed=st.integers(0, 9), world_size=st.integers(1, 8)
)
def test_a_run_begun_at_any_batch_by_any_number_of_processes_meets_the_same(
    counts: list[int], batch_size: int, first: int, seed: int, world_size: int
) -> None:
    world_size = min(world_size, batch_size)
    whole = Lanes(groups_of(counts), seed, batch_size)
    expected = [[whole.at(batch, slot) for slot in range(batch_size)] for batch in range(first + 3)][first:]
    met: list[list[object]] = [[], [], []]
    for rank in range(world_size):
        keys = stream(Lanes(groups_of(counts), seed, batch_size), batch_size, first)
        for batch, part in zip(range(3), keys, strict=False):
            for some in micro_batch_keys([part], share_of_batch(batch_size, rank, world_size), 2):
                met[batch] += [(key.epoch, key.index) for key in some]
    assert met == expected


def test_epochs_shards_and_seeds_have_orders_of_their_own() -> None:
    def first_epoch(seed: int, epoch: int) -> list[int]:
        order = Lanes(groups_of([5] * 8), seed, 1)
        return [order.at(batch, 0).index for batch in range(epoch * 40, epoch * 40 + 40)]

    orders = {tuple(first_epoch(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6 and {tuple(sorted(each)) for each in orders} == {tuple(range(40))}


@pytest.mark.parametrize(
    ("batch_size", "shards", "mean_bytes", "lanes"),
    [
        (4096, 100_000, 2**28, 64),  # 64 pools of one shard of 256 MiB
        (4096, 100_000, 2**30, 16),  # no more than 16 GiB at a time
        (4096, 100, 2**28, 16),  # 4 shards a lane
        (96, 1000, 2**20, 32),
        (97, 1000, 2**20, 1),
        (256, 3, 2**20, 1),
        (256, 1000, 2**40, 1),
    ],
)
def test_lanes_are_a_power_of_two_that_divides_the_batch_and_keeps_the_disk_small(
    batch_size: int, shards: int, mean_bytes: int, lanes: int
) -> None:
    assert lanes_for(batch_size, shards, 10**9, 16 * 2**30 // mean_bytes) == lanes


def test_a_process_needs_the_shards_of_its_own_lanes_and_few_at_a_time() -> None:
    """Of 256 shards of 256 MiB, 64 lanes: an eighth of the processes reads an eighth of them, eight at a time."""
    order = Lanes(groups_of([100] * 256, 2**28), seed=3, batch_size=128)
    assert (order.lanes, order.pooled) == (64, 1)
    share = share_of_batch(128, 3, 8)
    whole_epoch, at_once = set(), []
    for batch in range(200):
        now = {order.at(batch, slot).index // 100 for slot in share}
        whole_epoch |= now
        at_once.append(len(now))
    assert len(whole_epoch) <= 256 // 8 + 8 and max(at_once) <= 16
    assert order.bytes_at_once(share) == 8 * 2**28 and order.bytes_at_once(range(128)) == 64 * 2**28


def test_few_shards_are_all_of_one_pool() -> None:
    """So small sets are mixed as well as on a local disk, within a lane."""
    order = Lanes(groups_of([50] * 8), seed=0, batch_size=2)
    assert order.lanes == 2
    first = [order.at(batch, 0).index // 50 for batch in range(50)]
    assert len(set(first)) == 4


def test_what_is_needed_is_what_comes_and_what_is_next_comes_after_it() -> None:
    order = Lanes(groups_of([7] * 16, 2**33), seed=1, batch_size=2)  # so large that a pool is one shard
    assert (order.lanes, order.pooled) == (2, 1)
    pools: dict[tuple[int, str], str] = {}  # what is said to follow each
    for batch in range(200):
        (now,), (after,) = order.needed(batch, 1)
        place = order.at(batch, 1)
        assert f"{place.index // 7}.tar" == now.path
        pools[place.epoch, now.path] = after.path
    assert [path for _, path in pools][1:] == list(pools.values())[:-1] and len(pools) > 20


def test_in_the_place_of_a_bad_image_comes_one_of_its_shard_and_then_of_one_other() -> None:
    order = Lanes(groups_of([10] * 20), seed=5, batch_size=4)

    def shards(epoch: int, attempt: int) -> set[int]:
        return {order.instead(epoch, index, attempt) // 10 for index in range(30, 40)}

    assert shards(0, 0) == shards(0, 1) == {3}
    others = [shards(0, attempt) for attempt in range(2, 20)]
    assert all(len(each) == 1 for each in others) and len(set.union(*others)) > 3
    assert [shards(1, attempt) for attempt in range(2, 20)] != others
    assert order.instead(0, 33, 5) == Lanes(groups_of([10] * 20), 5, 4).instead(0, 33, 5)


def test_images_of_a_subset_are_dealt_by_their_shards() -> None:
    numbers = np.array([2, 0, 2, 1, 0, 2])
    groups = grouped([Far(str(n), MB, "") for n in range(4)], numbers)
    assert [shard.path for shard in groups.shards] == ["0", "1", "2"]
    assert [[int(groups.indices[place]) for place in groups.of(n)] for n in range(3)] == [[1, 4], [3], [0, 2, 5]]
    order = Lanes(groups, 0, 3)
    assert {order.at(batch, slot).index for batch in range(2) for slot in range(3)} == set(range(6))
    assert {order.instead(0, 2, 0) for _ in range(9)} <= {0, 2, 5}


def test_of_images_in_no_shard_none_is_fetched() -> None:
    groups = grouped([Far("0", MB, ""), Far("1", MB, "")], np.array([-1, 1, -1, 0]))
    assert [(shard.path, shard.remote) for shard in groups.shards] == [("", False), ("0", True), ("1", True)]
    assert [[int(groups.indices[place]) for place in groups.of(n)] for n in range(3)] == [[0, 2], [3], [1]]


def test_shards_of_a_length_that_is_not_told_count_as_large() -> None:
    order = Lanes(groups_of([100] * 256, -1), seed=3, batch_size=128)
    assert (order.lanes, order.pooled, order.bytes_at_once(range(128))) == (16, 1, 2**34)


def test_images_at_hand_come_as_before_and_those_of_shards_to_be_fetched_by_lanes() -> None:
    def source(kind: type[Shard]) -> ImageSource:
        shards = tuple(kind(f"{n}.tar", MB, "") for n in range(3))
        zeros = np.zeros(6, dtype=np.int64)
        return ImageSource(
            "", [b"%d" % n for n in range(6)], Members(shards, np.arange(6, dtype=np.int32) % 3, zeros, zeros)
        )

    assert isinstance(order_of(source(Shard), 0, 2), Shuffled) and isinstance(order_of(source(Far), 0, 2), Lanes)
    assert isinstance(order_of(ImageSource("", [b"a"]), 0, 2), Shuffled)


def test_an_order_goes_to_workers_and_means_the_same_there() -> None:
    order = Lanes(groups_of([5] * 9), 0, 4)
    order.at(3, 2)
    again = pickle.loads(pickle.dumps(order))
    assert [again.at(9, slot) for slot in range(4)] == [order.at(9, slot) for slot in range(4)]


def test_an_order_of_a_hundred_million_images_takes_little_memory() -> None:
    order = Lanes(groups_of([10_000] * 10_000, 2**28), 0, 4096)
    for slot in range(0, 4096, 64):
        order.at(10**6, slot)
    assert len(pickle.dumps(order)) < 20 * MB


def test_more_at_a_time_mixes_more_shards() -> None:
    """Shards of 200 MB: of 64 lanes one each within 16 GiB, 16 each within 256."""
    groups = groups_of([10] * 2000, 200 * MB)
    assert [(o.lanes, o.pooled) for o in (Lanes(groups, 0, 4096), Lanes(groups, 0, 4096, 256))] == [(64, 1), (64, 16)]


def test_the_bounds_are_those_that_the_guide_tells() -> None:
    assert (module.MOST_LANES, module.POOLED_GB) == (64, 16)


def test_two_and_two_images_are_repeated() -> None:
    found = [unrepeated(position, 3) for position in range(14)]
    assert [image for image, _ in found] == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 4, 5]
    assert [repetition for _, repetition in found] == [0, 0, 1, 1, 2, 2] * 2 + [0, 0]
    assert [unrepeated(position, 1) for position in range(9)] == [(position, 0) for position in range(9)]


@examples(60)
@given(counts=COUNTS, batch_size=BATCHES, repeats=st.integers(2, 5), seed=st.integers(0, 99), far=st.booleans())
def test_samples_of_repeated_images_are_those_of_as_many_epochs(
    counts: list[int], batch_size: int, repeats: int, seed: int, far: bool
) -> None:
    """Each once, and hardly one of later epochs before all were met: the two at the end of each lane's images."""
    count = sum(counts)

    def order(times: int) -> Order:
        if far:
            return Lanes(groups_of(counts), seed, batch_size, repeats=times)
        return Shuffled(count, seed, batch_size, times)

    once, batches = order(1), repeats * count // batch_size
    usual = {once.at(batch, slot) for batch in range(2 * batches + 2) for slot in range(batch_size)}
    repeated = order(repeats)
    met = [repeated.at(batch, slot) for batch in range(batches) for slot in range(batch_size)]
    late = [place for place in met if place.epoch >= repeats]
    assert len(set(met)) == len(met) and {place for place in met if place.epoch < repeats} <= usual
    assert len(late) <= 2 * repeats * (once.lanes if isinstance(once, Lanes) else 1)


@examples(60)
@given(counts=COUNTS, batch_size=st.sampled_from([2, 4, 6, 10, 12, 16]), repeats=st.integers(1, 5), far=st.booleans())
def test_neighbours_that_are_mixed_are_never_one_image(
    counts: list[int], batch_size: int, repeats: int, far: bool
) -> None:
    """But where an epoch of the order ends, and the next may begin with the image that was the last."""
    order: Order = (
        Lanes(groups_of(counts), 0, batch_size, repeats=repeats)
        if far
        else Shuffled(sum(counts), 0, batch_size, repeats)
    )
    for batch in range(2 * repeats * sum(counts) // batch_size):
        for slot in range(0, batch_size, 2):
            ours, theirs = order.at(batch, slot), order.at(batch, slot + 1)
            assert ours.index != theirs.index or ours.epoch // repeats != theirs.epoch // repeats


@examples(30)
@given(counts=COUNTS, first=st.integers(0, 50), repeats=st.integers(2, 4))
def test_what_is_needed_of_shards_is_what_repeated_images_are_of(counts: list[int], first: int, repeats: int) -> None:
    order = Lanes(groups_of(counts, 2**33), 1, 4, repeats=repeats)
    ends = np.cumsum(counts)
    for batch in range(first, first + 9):
        for slot in range(4):
            now, _ = order.needed(batch, slot)
            shard = int(np.searchsorted(ends, order.at(batch, slot).index, side="right"))
            assert f"{shard}.tar" in {each.path for each in now}
