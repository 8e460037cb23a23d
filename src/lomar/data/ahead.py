"""Shards that are fetched while those before them are read."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from heapq import heappop, heappush
from typing import Any

from torch.utils.data import Dataset

from lomar.data.cache import cache_limit, tell
from lomar.data.order import Lanes, Order
from lomar.data.shards import Shard
from lomar.errors import UserError
from lomar.launch import launched

_REMEMBERED = 10_000  # groups of shards that were asked for


def fetched_ahead(dataset: Dataset[Any], order: Order, share: range) -> Dataset[Any]:
    """The same samples, while the shards that they and later ones come from are fetched.

    Args:
        dataset: makes samples of keys.
        order: by which they come.
        share: the slots of each batch that this process has.

    Raises:
        UserError: LOMAR_CACHE_GB is no number.
    """
    if not isinstance(order, Lanes):
        return dataset
    needed = min(launched().local_count * order.bytes_at_once(share), order.bytes_at_once(range(order.batch_size)))
    limit = cache_limit()
    if needed > limit:
        tell(
            f"batches come from shards of {needed / 1e9:.1f} GB at a time, but LOMAR_CACHE_GB keeps {limit / 1e9:g}: "
            "they are fetched again and again"
        )
    return _Ahead(dataset, order, next_too=2 * needed <= limit)


class _Ahead(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any], order: Lanes, next_too: bool) -> None:
        self._dataset, self._order, self._next_too = dataset, order, next_too
        self._fetching: _Fetching | None = None  # of this process; workers are started before it is

    def __getitems__(self, keys: list[Any]) -> Any:
        if self._fetching is None:
            self._fetching = _Fetching()
        for key in keys:
            now, after = self._order.needed(key.batch, key.slot)
            self._fetching.want(now, urgent=True)
            if self._next_too:
                self._fetching.want(after, urgent=False)
        return self._dataset.__getitems__(keys)  # type: ignore[attr-defined]


class _Fetching:
    """A thread that fetches what is wanted and ends when nothing is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: list[tuple[bool, int, Shard]] = []
        self._asked: set[tuple[str, ...]] = set()
        self._count = 0
        self._running = False

    def want(self, shards: Sequence[Shard], urgent: bool) -> None:
        """Fetch these, urgent ones first."""
        asked = tuple(shard.path for shard in shards)
        with self._lock:
            if asked in self._asked:
                return
            if len(self._asked) >= _REMEMBERED:
                self._asked.clear()
            self._asked.add(asked)
            for shard in shards:
                self._count += 1
                heappush(self._wanted, (not urgent, self._count, shard))
            if not self._running:
                self._running = True
                threading.Thread(target=self._fetch, daemon=True).start()

    def _fetch(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._running = False
                    return
                *_, shard = heappop(self._wanted)
            with suppress(OSError, UserError):  # whoever reads it says why
                shard.fetch(wait=False)
