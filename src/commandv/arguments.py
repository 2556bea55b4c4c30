"""What public functions are given: another type than they take is told before anything is done with it.

By hand, because checkers of annotations (typeguard, beartype) refuse what serves here: NumPy's numbers where numbers
are asked for, generators and arrays where lists are; and pydantic would convert.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from commandv.errors import InputError

T = TypeVar("T")

# Where to get one of what is asked for, by its class.
_WAYS = {
    "LM": "load_model opens one",
    "Adapter": "load_adapter opens one",
    "Profile": "profile makes one, load_profile opens one",
    "Link": "link makes one",
    "PromptSet": "load_prompts opens one",
    "Contrast": "load_contrast opens one",
    "Demonstrations": "demonstrate makes them, load_demonstrations opens them",
    "Task": "evaluation.load_task opens one",
}
_NUMBERS: dict[Any, type] = {int: numbers.Integral, float: numbers.Real}
_MANY = (collections.abc.Sequence, collections.abc.Set, collections.abc.Iterator)
_LISTS = (list, tuple, collections.abc.Sequence)


def checked(made: T) -> T:
    """Have a public function, or the constructor of a class, refuse arguments of other types than it states.

    Whole numbers are numbers, those of NumPy too, and truth values are none; what can be gone through will do for a
    list or a tuple. Values are for the function itself to check. A call that Python itself refuses (an argument too
    many, an unknown name) stays a TypeError.

    Raises:
        InputError: when called, for an argument of another type: which, what it is, and where to get the right one.
    """
    if isinstance(made, type):
        made.__init__ = _checking(made.__init__, made.__name__)  # type: ignore[misc]
        return made
    return typing.cast(T, _checking(typing.cast(Callable[..., Any], made), made.__name__))  # type: ignore[attr-defined]


def _checking(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    signature = inspect.signature(call)

    @functools.cache
    def hints() -> dict[str, Any]:  # when first called: names may be defined further down
        return typing.get_type_hints(call)

    @functools.wraps(call)
    def checking(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        given = signature.bind_partial(*args, **kwargs).arguments if args or kwargs else {}
        for one, value in given.items():
            hint = hints().get(one, Any)
            if not fits(value, hint):
                raise InputError(f"{name}: {one} is {_said(value)}, expected {_named(hint)}{_way(hint, value)}")
        return call(*args, **kwargs)

    return checking


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of an annotated type, and what a list or mapping holds; generators are not read."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if kind is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    kind = kind or hint
    if kind is Any:
        return True
    if kind is None:
        return value is None
    if kind in _NUMBERS:
        return isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool) or type(value).__name__ == "bool"  # NumPy's
    if not isinstance(kind, type):
        return True
    if getattr(kind, "_is_protocol", False):
        wanted = [one for one in vars(kind) if not one.startswith("_")] or ["__call__"]
        return all(inspect.getattr_static(value, one, None) is not None for one in wanted)  # asks no property
    if kind in _LISTS:
        return _listed(value, kind, parts)
    if not isinstance(value, kind) or (kind is collections.abc.Iterable and isinstance(value, str | bytes)):
        return False
    return _holds(value, parts)


def _listed(value: Any, kind: type, parts: tuple[Any, ...]) -> bool:
    """Tell whether a value is a list of something, a tuple, a generator, or an array where numbers are wanted."""
    if hasattr(value, "dtype"):
        return parts[:1] in ((int,), (float,), (Any,)) or str(value.dtype).startswith(("object", "str", "<U"))
    if kind is tuple and parts and parts[-1] is not Ellipsis:  # of fixed length
        return isinstance(value, list | tuple) and _holds(value, parts)
    return isinstance(value, _MANY) and not isinstance(value, str | bytes) and _holds(value, parts)


def _holds(value: Any, parts: tuple[Any, ...]) -> bool:
    """Tell whether what a container holds is of the types that it is annotated with."""
    if isinstance(value, Mapping) and len(parts) == 2:
        return all(fits(key, parts[0]) and fits(one, parts[1]) for key, one in value.items())
    if isinstance(value, list | tuple) and type(value).__name__ in ("list", "tuple"):
        if len(parts) == 1 or (len(parts) == 2 and parts[1] is Ellipsis):
            return all(fits(one, parts[0]) for one in value)
        return not parts or (len(parts) == len(value) and all(map(fits, value, parts)))
    return True


def _said(value: Any) -> str:
    short = f" {value!r:.60}" if isinstance(value, str | int | float | Path) and not isinstance(value, bool) else ""
    return "None" if value is None else f"a {type(value).__name__}{short}"


def _named(hint: Any) -> str:
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_named, parts)))
    if hint is type(None):
        return "None"
    if kind is typing.Literal:
        return f"one of {', '.join(map(repr, parts))}"
    inner = (
        ", ".join(_named(part) for part in parts if part is not Ellipsis)
        if kind in (*_LISTS, dict, collections.abc.Mapping)
        else ""
    )
    own = getattr(kind or hint, "__name__", str(hint))
    return f"{own} of {inner}" if inner else own


def _way(hint: Any, value: Any) -> str:
    parts = typing.get_args(hint) or (hint,)
    if isinstance(value, str) and any(typing.get_origin(part) in _LISTS for part in parts):
        return "; write [text] for one"
    ways = [_WAYS[name] for part in parts if (name := getattr(part, "__name__", "")) in _WAYS]
    return f"; {ways[0]}" if ways else ""
