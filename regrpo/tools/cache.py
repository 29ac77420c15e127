"""A bounded mapping that forgets what was used longest ago."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRU(Generic[K, V]):
    """At most `size` values; `on_evict` releases one that is dropped."""

    def __init__(self, size: int, on_evict: Callable[[V], object] | None = None) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self._size = size
        self._on_evict = on_evict
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of `key`, made on first use. Does not evict: call `trim` when values may go."""
        if key in self._values:
            self._values.move_to_end(key)
        else:
            self._values[key] = make()
        return self._values[key]

    def trim(self) -> None:
        """Drop the oldest values until at most `size` are left."""
        while len(self._values) > self._size:
            _, value = self._values.popitem(last=False)
            if self._on_evict:
                self._on_evict(value)
