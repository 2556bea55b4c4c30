"""Several devices on a machine that has none: tensors that compute on the CPU and refuse to meet those of another.

A tensor on `lazy:0` or `lazy:1` is a wrapper around one on the CPU. Operations between tensors of two devices fail as
they do on hardware, but for numbers of no dimension on the CPU, and so does NumPy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

FAKE = "lazy"


class Away(Tensor):
    """A tensor that says it is on a fake device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Away:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=device, requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner.detach()
        return made

    def __repr__(self) -> str:
        return f"Away({self.inner}, {self.device})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


# Operations that may take tensors of several devices, and the argument on whose device the result is.
_MOVES = {"_to_copy": 0, "to": 1, "copy_": 0}


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    given, _ = tree_flatten((args, kwargs))
    wanted = [one for one in given if isinstance(one, torch.device)]
    tensors = [one for one in given if isinstance(one, Tensor)]
    places = {one.device for one in tensors if one.dim() or one.device.type != "cpu"}
    if len(places) > 1 and name not in _MOVES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {sorted(map(str, places))}")
    if not wanted and name in _MOVES:
        wanted = [tensors[min(_MOVES[name], len(tensors) - 1)].device]
    place = wanted[0] if wanted else next(iter(places), torch.device("cpu"))
    bare = tree_map(_here, (args, kwargs))
    found = func(*bare[0], **bare[1])
    if name.endswith("_") and not name.endswith("__") and isinstance(args[0], Away):
        return args[0]
    return tree_map(lambda one: Away(one, place) if isinstance(one, Tensor) else one, found) if _fake(place) else found


def _fake(device: Any) -> bool:
    return torch.device(device).type == FAKE


def _here(one: Any) -> Any:
    """Return an argument as the CPU has it."""
    if isinstance(one, torch.device):
        return torch.device("cpu") if _fake(one) else one
    return one.inner if isinstance(one, Away) else one


class _Fakes(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, _ = tree_flatten((args, kwargs or {}))
        away = any(isinstance(one, Away) or (isinstance(one, torch.device) and _fake(one)) for one in given)
        return _run(func, args, kwargs or {}) if away else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tensors be made on, and moved to, `lazy:0`, `lazy:1` and so on."""
    tensor = torch.tensor

    def made(data: Any, *, device: Any = None, **more: Any) -> Tensor:  # the one factory that knows no dispatch
        away = device is not None and _fake(device)
        return tensor(data, **more).to(device) if away else tensor(data, device=device, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", made)
        with _Fakes():
            yield


def spread(model: Any, at: int) -> Any:
    """Put a model on two fake devices, as accelerate does: the blocks from `at` on, and a head of its own, second."""
    import accelerate

    head = "lazy:0" if model.config.tie_word_embeddings else "lazy:1"
    places = {"model.embed_tokens": "lazy:0", "model.norm": "lazy:1", "model.rotary_emb": "lazy:0", "lm_head": head}
    places |= {f"model.layers.{i}": f"lazy:{int(i >= at)}" for i in range(len(model.model.layers))}
    return accelerate.dispatch_model(model, places, force_hooks=True, main_device="lazy:0")
