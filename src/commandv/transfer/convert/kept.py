"""What is made once and kept: factorisations and fits, for as long as their owner lives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
from torch import Tensor


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

    def drop(self, name: Hashable) -> None:
        """Keep no value of `name` any longer; whoever has it goes on with it."""
        with self._lock:
            self._entries.pop(name, None)

    def __contains__(self, name: Hashable) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return sum(entry.made for entry in self._entries.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that the values hold, each counted once."""
        arrays: dict[int, int] = {}
        _measure(self, arrays, {})
        return sum(arrays.values())


class _Entry:
    def __init__(self) -> None:
        self.lock, self.made, self.value = threading.RLock(), False, None


def _measure(value: Any, arrays: dict[int, int], seen: dict[int, Any]) -> None:
    """Add the memory of all arrays in a value, address -> bytes."""
    if isinstance(value, Tensor):
        arrays[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, np.ndarray):
        arrays[value.ctypes.data] = value.nbytes
    elif id(value) not in seen:
        seen[id(value)] = value  # kept alive, so that no other takes its id
        if isinstance(value, Kept):
            with value._lock:
                inner = [entry.value for entry in value._entries.values()]
        elif isinstance(value, (list, tuple)):
            inner = list(value)
        elif isinstance(value, Mapping):
            inner = list(value.values())
        else:
            inner = list(vars(value).values()) if is_dataclass(value) and not isinstance(value, type) else []
        for one in inner:
            _measure(one, arrays, seen)
