"""The errors that commandv raises on purpose; each says what was got, what was expected and what to do next."""

import difflib
from collections.abc import Iterable
from numbers import Integral


class CommandVError(Exception):
    """Base of every error that this library raises on purpose."""


class InputError(CommandVError, ValueError):
    """A value from the user (prompt, layer, option, data file) cannot be used as it is."""


class MismatchError(CommandVError, ValueError):
    """Two things that must belong together do not: profile and model, adapter and model, two profiles."""


class FormatError(CommandVError, ValueError):
    """A file is not what it should be: truncated, tampered with, unknown version, unsafe, or another format."""


class ModelError(CommandVError, RuntimeError):
    """A model cannot be loaded, or has a structure that commandv cannot attach to."""


class StorageError(CommandVError, OSError):
    """A file could not be written (disk full, no permission); what was complete before is kept."""


class HubError(CommandVError, RuntimeError):
    """The hub cannot be reached, does not have what was asked for, or does not give or take it."""


class JudgeError(CommandVError, RuntimeError):
    """A judge gave up before every answer was judged; `judged` says how many are."""

    def __init__(self, message: str, *, judged: int = 0) -> None:
        super().__init__(message)
        self.judged = judged


class WorkerError(CommandVError, RuntimeError):
    """Workers elsewhere cannot be reached, do not start or are lost; what they finished before is kept."""


MOST_SEED = (1 << 32) - 1


def require_seed(seed: int) -> None:
    """Raise `InputError` for a seed that is not a whole number from 0 to 2^32 - 1, which every generator takes."""
    if not isinstance(seed, Integral) or not 0 <= seed <= MOST_SEED:
        raise InputError(f"seed={seed!s:.40}: expected a whole number from 0 to 2^32 - 1")


def require_positive(**counts: int | None) -> None:
    """Raise `InputError` for a count below 1; None stands for none asked for."""
    if wrong := [f"{name}={value}" for name, value in counts.items() if value is not None and value < 1]:
        raise InputError(f"{', '.join(wrong)}: expected 1 or more")


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return " (did you mean X?)" for a name that is nearly one of those known, else ""; X has `prefix` before it."""
    names = {one.lower(): one for one in known}
    near = [names[one] for one in difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.6)]
    return f" (did you mean {' or '.join(prefix + one for one in near)}?)" if near else ""


def require_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise `InputError` unless a name is one of those known, with those that are near it."""
    names = list(known)
    if name not in names:
        raise InputError(
            f"{what} {name!r}{did_you_mean(str(name), names)}: expected one of {', '.join(names)}".lstrip()
        )
