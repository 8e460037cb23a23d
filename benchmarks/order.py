"""The order of a run over very many images in shards that must be fetched, worked out without an image: whether each
comes once, what each machine reads, how well it is mixed, what it costs. Prints a Markdown table.

    python benchmarks/order.py [--shards 10000] [--images 10000] [--kb 1 20 100] [--batch 4096 16384] [--nodes 64]

- once: images that came a second time in the first epoch, and those that never came, of all images of so many lanes as
  are gone through in --seconds, slot by slot.
- shards a machine needs, and what all read in an epoch, in sizes of the data; disk: GB of the pools of one machine, and
  with those that come next.
- mixed, of 32 batches at random, each beside a perfect shuffle: shards that a batch is drawn from; pairs of it that are
  of one shard, in thousands; entropy of its labels in bits, if shards are sorted by class (1,000 classes). Moved: mean
  distance of an image's place in the epoch from that in storage, in epochs; of a perfect shuffle 1/3.
- cost in one process: seconds until the order is there; ms for a whole batch, which each process works out; MiB.
"""

import argparse
import time
import tracemalloc
from typing import ClassVar

import numpy as np

from lomar.data.order import Lanes
from lomar.data.shards import Shard, ShardGroups

SAMPLED, CLASSES = 32, 1000
COLUMNS = (
    "batch | image kB | lanes | shards of a pool | once: lanes: twice: never | shards a machine | read by all "
    "| disk GB: with next | shards in a batch | same shard ‰ | entropy | moved | begun s | batch ms | MiB"
)


class Far(Shard):
    remote: ClassVar[bool] = True


def mixing(shards: np.ndarray, of: int) -> list[float]:
    """Of the shards of a batch: how many differ, pairs of the same in thousands, bits of labels."""
    pairs = (np.bincount(shards) ** 2).sum() - len(shards)
    share = np.unique(shards * CLASSES // of, return_counts=True)[1] / len(shards)
    return [len(np.unique(shards)), 1000 * pairs / len(shards) / (len(shards) - 1), -(share * np.log2(share)).sum()]


def gone_through(order: Lanes, count: int, seconds: float) -> tuple[str, float]:
    """Lanes, images that came twice and never; how far images have moved."""
    seen, lane, moved, began, slots = np.zeros(count, dtype=np.uint8), 0, [], time.perf_counter(), order._slots
    while lane < order.lanes and time.perf_counter() - began < seconds:
        places = range(order._counts[lane])
        found = np.fromiter((order.at(p // slots, lane * slots + p % slots).index for p in places), dtype=np.int64)
        np.add.at(seen, found, 1)
        moved.append(np.abs(found / count - np.arange(len(found)) / len(found)).mean())
        lane += 1
    never = sum(order._counts[:lane]) - int((seen > 0).sum())
    return f"{lane}: {int((seen > 1).sum())}: {never}", float(np.mean(moved))


def row(asked: argparse.Namespace, batch_size: int, kb: int) -> str:
    shards = tuple(Far(f"{number}.tar", asked.images * kb * 1000, "") for number in range(asked.shards))
    count = asked.shards * asked.images
    groups = ShardGroups(shards, np.arange(1, asked.shards + 1) * asked.images, range(count))
    began, order = time.perf_counter(), Lanes(groups, 0, batch_size, asked.shuffle_gb)
    begun_s = time.perf_counter() - began
    needed, disk = [], 0.0
    for node in range(asked.nodes):
        slots = range(node * batch_size // asked.nodes, (node + 1) * batch_size // asked.nodes)
        lanes = range(slots.start // order._slots, (slots.stop - 1) // order._slots + 1)
        needed.append(len({piece.shard for lane in lanes for piece in order._dealt[lane]}))
        disk = max(disk, order.bytes_at_once(slots) / 1e9)
    once, moved = gone_through(order, count, asked.seconds)
    rng, mixed, batch_s = np.random.default_rng(0), [], []
    for batch in rng.integers(0, count // batch_size, SAMPLED).tolist():
        [order.at(batch, slot) for slot in range(0, batch_size, order._slots)]  # begins pools, as a run seldom must
        began = time.perf_counter()
        drawn = np.array([order.at(batch, slot).index for slot in range(batch_size)])
        batch_s.append(time.perf_counter() - began)
        perfect = rng.integers(0, count, batch_size)
        mixed.append([mixing(each // asked.images, asked.shards) for each in (drawn, perfect)])
    ours, best = np.mean(mixed, axis=0)
    tracemalloc.start()
    order = Lanes(groups, 0, batch_size, asked.shuffle_gb)
    [order.at(0, slot) for slot in range(batch_size)]
    mib = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    told = [f"{batch_size}", f"{kb}", f"{order.lanes}", f"{order.pooled}", once, f"{min(needed)} to {max(needed)}"]
    told += [f"{sum(needed) / asked.shards:.2f}", f"{disk:.2f}: {2 * disk:.2f}", f"{ours[0]:.0f} of {best[0]:.0f}"]
    told += [f"{ours[1]:.2f} of {best[1]:.2f}", f"{ours[2]:.2f} of {best[2]:.2f}", f"{moved:.3f}", f"{begun_s:.3f}"]
    return " | ".join([*told, f"{1e3 * np.median(batch_s):.1f}", f"{mib:.0f}"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"shards": 10_000, "images": 10_000, "nodes": 64, "seconds": 30}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in {"kb": [1, 20, 100], "batch": [4096, 16384]}.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    parser.add_argument("--shuffle-gb", type=float, default=16.0)
    asked = parser.parse_args()
    print(f"| {COLUMNS} |\n|" + "---|" * (COLUMNS.count("|") + 1), flush=True)  # noqa: T201
    for batch_size in asked.batch:
        for kb in asked.kb:
            print(f"| {row(asked, batch_size, kb)} |", flush=True)  # noqa: T201
