"""What is made once and kept: factorisations and fits, for as long as their owner lives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any


class Kept:
    """Values by name, each made once whichever thread asks first; the others wait for it."""

    def __init__(self) -> None:
        self._lock, self._entries = threading.Lock(), dict[Hashable, _Entry]()

    def get(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """Return the value of `name`, made by `make()` the first time; an error keeps nothing."""
        with self._lock:
            entry = self._entries.setdefault(name, _Entry())
        with entry.lock:
            if not entry.made:
                entry.value, entry.made = make(), True
            return entry.value

    def __len__(self) -> int:
        return sum(entry.made for entry in self._entries.values())


class _Entry:
    def __init__(self) -> None:
        self.lock, self.made, self.value = threading.RLock(), False, None
