"""Which model something was made from or for, and the hash of a model's weights."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor, nn

from commandv.errors import MismatchError

log = logging.getLogger(__name__)

# Dtypes that hold the values of one another, up to rounding to bfloat16.
_ALIKE = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class ModelRef:
    """Which model something was made from or for; empty fields are unknown."""

    id: str = ""  # the name it was loaded by, or the name of the model that it is said to be the same as
    revision: str = ""  # hub commit, or hash of the file it was converted from
    d_model: int = 0  # width of the residual stream
    n_layers: int = 0  # number of decoder blocks; 0 when unknown
    template: str = ""  # hash of the prompt format in use
    weights: str = ""  # hash of the weights, the same in float32 and bfloat16 and under a LoRA that has learned nothing
    format: str = ""  # system prompt and template options, as JSON; empty where neither is set

    def require(self, other: ModelRef, what: str) -> None:
        """Raise `MismatchError` unless `other` is the same model; fields unknown on either side are not compared.

        Equal weights are the same model, whatever it is called; where the weights of one are unknown, or were loaded
        with less precision, the revision decides, then the name. The system prompt may differ: it is recorded.
        """
        carry = "paste() carries an adapter between models"
        embeddings = ", a file of vectors that begins with the embeddings' is read with convention='hidden-states'"
        for field, hint in (
            ("d_model", f"another width; {carry}"),
            ("n_layers", f"another depth; {carry}{embeddings}"),
        ):
            self._differ(other, field, what, hint)
        if not self.weights or self.weights != other.weights:
            same = (
                "another model, or edited weights: make it again with the model in use. If they are the same model "
                f"(another precision, a fine-tuned copy), say so: load_model(..., same_as={self.id!r}), or --same-as "
                f"{self.id!r} on the command line"
            )
            # At the same precision the same model has the same hash.
            if self.weights.rpartition(":")[0] == other.weights.rpartition(":")[0]:
                self._differ(other, "weights", what, same)
            self._differ(other, "revision", what, same)
            if not (self.revision and other.revision) and _name(self.id) != _name(other.id):
                self._differ(other, "id", what, same)
        self._differ(other, "template", what, "load the model with the same prompt format (template=)")
        if self.format != other.format:
            log.info("%s: made with %s, used with %s", what, self.format or "no system prompt", other.format or "none")

    def _differ(self, other: ModelRef, field: str, what: str, hint: str) -> None:
        mine, theirs = getattr(self, field), getattr(other, field)
        if mine and theirs and mine != theirs:
            one, two = ("", "") if field == "id" else (f" ({field} {mine})", f" ({field} {theirs})")
            raise MismatchError(
                f"{what}: made for {self.id or 'a model'}{one}, got {other.id or 'a model'}{two}; {hint}"
            )


def _name(id: str) -> str:
    """Return a model's name without where it lies: a hub id's and a local copy's are the same."""
    return id.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()


# -- weights ------------------------------------------------------------------------------------------------------


class Hashed(NamedTuple):
    """What is known of a model's weights, and the state of its tensors when that was found out."""

    stamp: tuple[Any, ...]
    exact: str
    shared: str


_KNOWN: weakref.WeakKeyDictionary[nn.Module, Hashed] = weakref.WeakKeyDictionary()


def weights_hash(model: nn.Module) -> str:
    """Return the hash of a model's weights that `ModelRef.weights` holds, "" where they cannot be read.

    Every value counts, rounded to bfloat16; dtypes that round otherwise (float16, quantised ones) are hashed as they
    are, with their names before the hash. It is computed again when a tensor was replaced or, as torch counts, changed.
    """
    return hashed(model, again=False).shared


def hashed(model: nn.Module, *, again: bool) -> Hashed:
    """Return what is known of a model's weights; with `again` they are read anew, whatever torch counted."""
    stamp = tuple(_stamp(one) for _, one in _tensors(model))
    known = _KNOWN.get(model)
    if known is not None and known.stamp == stamp and not again:
        return known
    try:
        exact = _exact(model)
        # What `tensor.data` and NumPy write is not counted, so that with `again` only the content tells.
        shared = known.shared if known is not None and known.exact == exact else _shared(model)
    except (NotImplementedError, RuntimeError, TypeError) as error:  # offloaded weights, tensors of other libraries
        log.debug("weights that cannot be read: %s", error)
        exact = shared = ""
    _KNOWN[model] = found = Hashed(stamp, exact, shared)
    return found


def _stamp(one: Tensor) -> tuple[Any, ...]:
    where = 0 if one.device.type == "meta" else one.data_ptr()
    return where, 0 if one.is_inference() else one._version, one.dtype, one.shape


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _exact(model: nn.Module) -> str:
    """Hash every byte of every parameter and buffer."""
    hashed = xxhash.xxh3_128()
    for name, one in _tensors(model):
        hashed.update(f"{name} {one.dtype} {tuple(one.shape)}".encode())
        hashed.update(_bytes(one))
    return hashed.hexdigest()


def _shared(model: nn.Module) -> str:
    """Hash the parameters as every precision and wrapping of the same model has them."""
    named = dict(model.named_parameters())
    own = {_plain_name(name): one for name, one in named.items() if not _learned_nothing(name, named)}
    hashed = xxhash.xxh3_128()
    others = set()
    for name, one in sorted(own.items()):
        hashed.update(f"{name} {tuple(one.shape)}".encode())
        if one.dtype in _ALIKE:
            for part in one.detach().reshape(-1).split(1 << 24):  # so that a large matrix is not copied whole
                hashed.update(_bytes(part.to(torch.bfloat16)))
        else:
            others.add(str(one.dtype).removeprefix("torch."))
            hashed.update(_bytes(one))
    return ":".join([*sorted(others), hashed.hexdigest()[:16]])


def _plain_name(name: str) -> str:
    """Return the name that a parameter has without PEFT around the model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _learned_nothing(name: str, named: dict[str, nn.Parameter]) -> bool:
    """True for the parts of a LoRA whose product is still zero."""
    if "lora_" not in name:
        return False
    second = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
    return second in named and "_B" in second and not named[second].any()


def _bytes(one: Tensor) -> Any:
    return one.detach().reshape(-1).view(torch.uint8).cpu().numpy()
