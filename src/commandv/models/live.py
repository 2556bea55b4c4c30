"""What acts on a live model, and the only code that puts hooks on one.

Whatever changes the stream of a model is one of its *attachments*. They share one set of hooks, which is there exactly
as long as something is attached: a hook at the beginning of each pass finds out what the pass is (which columns, which
of them are prompt, where the padding is), asks every attachment what it changes there, and hooks the blocks that are
changed for this one pass. A pass that nothing changes runs the blocks untouched. Nothing else of the model is replaced;
graphs that torch.compile has made are made again at their next call, because they leave later hooks out.

What counts as prompt: the columns that `generate` was called with, while it runs, however it feeds them (at once, in
chunks, uncached, drafted by another model, in beams); else the first pass into a cache, which single tokens go on from;
else the pass itself. Whoever knows better says so with `n_prompt`.

Threads: an attachment acts on the thread that made it and on threads that start later. A thread that was running
already gets an error instead of another one's adapter.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from commandv.arguments import checked
from commandv.errors import InputError, ModelError
from commandv.models.hooks import Hook, attachments, is_held, live_on
from commandv.models.lm import LM
from commandv.models.passes import Change, Edit, Pass, stream_of, with_stream
from commandv.models.running import compiled, containing, generating, others_run
from commandv.positions import Positions

log = logging.getLogger(__name__)

_LOCK = threading.RLock()  # over what is attached to which model
_CACHES = ("past_key_values", "cache_params", "state")  # what architectures call what they go on from
_MARK = "commandv_prompt"  # kept on a cache, because copies of it go on from the same prompt
_OURS = ("commandv.", "transformers.")  # packages whose hooks treat every pass alike
_TOLD: ContextVar[tuple[nn.Module, int] | None] = ContextVar("prompt columns of our own passes", default=None)


def attach_change(lm: LM, change: Change) -> Attachment:
    """Attach a change to a model.

    Raises:
        ModelError: the model is compiled, so that hooks would not run.
        InputError: another thread runs the model, or has something attached to it.
    """
    _require_hooks_to_run(lm, (lm.model, lm.owner, *lm.blocks))
    with _LOCK:
        me = threading.current_thread()
        for one in attached(lm):
            one.require(me)
        if others_run(lm):
            raise InputError(
                f"{lm.id} is running in another thread, whose answers would change half-way; attach before the "
                "threads start, or load the model once more for this thread"
            )
        live = live_on(lm.owner) or Live(lm)
        made = Attachment(live, change, me, frozenset(threading.enumerate()) - {me})
        live.attachments = (*live.attachments, made)
    return made


@checked
def attached(lm: LM) -> tuple[Attachment, ...]:
    """Return what is attached to a model, in the order in which it acts."""
    return attachments(lm.owner)


def attached_positions(lm: LM) -> set[Positions]:
    """Return where the attachments act."""
    return set().union(*(one.positions for one in attached(lm)))


@checked
def detach_all(lm: LM) -> None:
    """Detach everything from a model, whoever attached it."""
    for one in attached(lm):
        one.detach()


def foreign_hooks(lm: LM) -> list[str]:
    """Return the modules whose forward hooks neither attachments nor transformers put there."""
    return [
        name or type(module).__name__
        for name, module in lm.model.named_modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not (getattr(hook, "__module__", None) or "").startswith(_OURS)
    ]


@contextlib.contextmanager
def prompts_of(lm: LM, n_prompt: int) -> Iterator[None]:
    """Tell attachments that what is run is the beginning of prompts of so many columns, or of longer ones."""
    token = _TOLD.set((lm.owner, n_prompt))
    try:
        yield
    finally:
        _TOLD.reset(token)


@contextlib.contextmanager
def reading(lm: LM, readers: Mapping[int, Callable[[Tensor], None]]) -> Iterator[None]:
    """Hand the outputs of layers, [batch, sequence, d_model] and as the next block gets them, to readers.

    Only passes of this thread are read.

    Raises:
        ModelError: the model is compiled, so that hooks would not run.
    """
    _require_hooks_to_run(lm, (lm.model, lm.owner, *lm.blocks))
    with _LOCK:
        live = live_on(lm.owner) or Live(lm)
        mine = (threading.get_ident(), readers)
        live.readers = (*live.readers, mine)
    try:
        yield
    finally:
        with _LOCK:
            live.readers = tuple(one for one in live.readers if one is not mine)
            live.end()
            live.leave()


class Attachment:
    """Something attached to a live model; `detach()`, or the end of a `with` block, restores the model exactly."""

    def __init__(
        self, live: Live, change: Change, thread: threading.Thread, strangers: frozenset[threading.Thread]
    ) -> None:
        self._live, self.change, self.active = live, change, True
        self._thread, self._strangers = thread, strangers

    @property
    def name(self) -> str:
        """What is attached."""
        return self.change.name

    @property
    def layers(self) -> list[int]:
        """The layers that it may change."""
        return self.change.layers

    @property
    def positions(self) -> set[Positions]:
        """Where it acts."""
        return self.change.positions

    def require(self, thread: threading.Thread) -> None:
        """Raise `InputError` for a thread that was running already when another one attached this."""
        if thread in self._strangers:
            raise InputError(
                f"thread {self._thread.name!r} has attached {self.name} to the model that thread {thread.name!r} is "
                "running; an attachment is for the thread that makes it and for threads started later. Load the model "
                "once more for this thread, or attach before starting it"
            )

    def detach(self) -> None:
        """Take it off; doing so twice is harmless, and so is any order."""
        with _LOCK:
            if not self.active:
                return
            if others_run(self._live.lm):
                log.warning("%s detached while another thread was answering: the rest is without it", self.name)
            self.active = False
            self._live.attachments = tuple(one for one in self._live.attachments if one is not self)
            self._live.leave()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        return str(self.change)


class Live:
    """The hooks of one model."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.attachments: tuple[Attachment, ...] = ()
        self.readers: tuple[tuple[int, Mapping[int, Callable[[Tensor], None]]], ...] = ()  # with the thread they are of
        self._names = {m: tuple(inspect.signature(m.forward).parameters) for m in (lm.model, lm.owner)}
        self._hosts = containing(lm.model, lm.owner)
        # By thread: what the pass through the whole model was given, and the hooks of the pass through the blocks.
        self._given: dict[int, dict[str, Any]] = {}
        self._open: dict[int, list[Any]] = {}
        if (
            "torch._dynamo" in sys.modules
        ):  # a wrapper made by torch.compile kept a graph without hooks, and would run it
            torch.compiler.reset()
        self._handles = [
            lm.owner.register_forward_pre_hook(Hook(self, self._begin), with_kwargs=True),
            lm.owner.register_forward_hook(Hook(self, self._finish), always_call=True),
        ]
        if lm.model is not lm.owner:
            self._handles.append(lm.model.register_forward_pre_hook(Hook(self, self._enter), with_kwargs=True))

    def leave(self) -> None:
        """Remove the hooks when nobody needs them."""
        if self.attachments or self.readers:
            return
        for handle in [*self._handles, *(handle for many in self._open.values() for handle in many)]:
            handle.remove()
        self._handles, self._open = [], {}

    def end(self) -> None:
        """End this thread's pass."""
        for handle in self._open.pop(threading.get_ident(), ()):
            handle.remove()

    def _enter(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        # Some models (Gemma 3 with its vision tower) hand the blocks' owner masks that no longer show the padding.
        _require_hooks_to_run(self.lm, (self.lm.model,))
        self._given[threading.get_ident()] = self._arguments(self.lm.model, args, kwargs)

    def _begin(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.end()  # an interrupted pass does not reach its end
        _require_hooks_to_run(self.lm, (self.lm.owner,))
        me = threading.current_thread()
        for one in self.attachments:
            one.require(me)
        run = self._pass(self._arguments(self.lm.owner, args, kwargs), self._given.pop(threading.get_ident(), {}))
        edits: defaultdict[int, list[tuple[Attachment, Edit]]] = defaultdict(list)
        for one in self.attachments:
            for layer, edit in one.change.edits(run).items():
                edits[layer].append((one, edit))
        _require_hooks_to_run(self.lm, [self.lm.blocks[layer] for layer in edits])
        hooks = self._open.setdefault(threading.get_ident(), [])
        for layer, many in edits.items():  # before other hooks, so that they and transformers' records see the edits
            hook = Hook(self, _editing(many, self.lm.stream))
            hooks.append(self.lm.blocks[layer].register_forward_hook(hook, prepend=True))
        for thread, readers in self.readers:
            if thread == threading.get_ident():
                for layer, read in readers.items():
                    hooks.append(self.lm.blocks[layer].register_forward_hook(Hook(self, _reader(read, self.lm.stream))))

    def _finish(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.end()
        parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        for cache in parts:
            if isinstance(cache, Cache) and not hasattr(cache, _MARK):
                setattr(cache, _MARK, _columns(cache))

    def _arguments(self, module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
        """Return what a call passes by name, whether by position or by keyword."""
        return kwargs if not args else {**dict(zip(self._names[module], args, strict=False)), **kwargs}

    def _pass(self, inputs: Mapping[str, Any], given: Mapping[str, Any]) -> Pass:
        """Return what a pass is, from the arguments of the blocks' owner and of the whole model around it."""
        tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
        if tokens is None:
            raise InputError(f"{self.lm.id}: a forward pass without input_ids or inputs_embeds; give one of them")
        cache = next((inputs[name] for name in _CACHES if inputs.get(name) is not None), None)
        start = 0 if cache is None else _columns(cache)
        told = _TOLD.get()
        n_prompt = told[1] if told is not None and told[0] is self.lm.owner else generating(self._hosts)
        if cache is None and n_prompt is not None and told is None and tokens.shape[1] < n_prompt:
            start = None  # the model goes on from a state that it keeps to itself
        if n_prompt is None:
            n_prompt = tokens.shape[1]
            if start != 0:  # several tokens that go on from a cache may be prompt or not
                n_prompt = getattr(cache, _MARK, None) if tokens.shape[1] == 1 else None
        if isinstance(cache, Cache) and n_prompt is not None:
            setattr(cache, _MARK, n_prompt)
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if given and not (isinstance(mask, Tensor) and mask.ndim == 2):
            mask = given.get("attention_mask")
        ids = ids if ids is not None else given.get("input_ids")
        if mask is None and start == 0 and ids is not None:
            self._require_no_padding(ids)
        return Pass(tokens, ids, mask, start, n_prompt)

    def _require_no_padding(self, ids: Tensor) -> None:
        """Raise `InputError` where a batch without a mask is padded: changes would go to the padding.

        Where padding is the end of a sequence, too, it cannot be told from text.
        """
        padding, end = self.lm.tokenizer.pad_token_id, self.lm.tokenizer.eos_token_id
        if len(ids) == 1 or padding in (None, end):
            return
        padded = ids[:, [0, -1]] == padding
        if (padded.any(0) & ~padded.all(0)).any():  # in some of the rows
            raise InputError(f"{self.lm.id}: a padded batch without an attention_mask; give it")


def _editing(many: list[tuple[Attachment, Edit]], index: int) -> Callable[[nn.Module, Any, Any], Any]:
    thread = threading.get_ident()

    def hook(_block: nn.Module, _inputs: Any, output: Any) -> Any:
        if threading.get_ident() != thread:  # another thread is in the same block, in a pass of its own
            return output
        h = stream_of(output, index)
        if type(h) is not Tensor or h.requires_grad or is_held(h, output):
            h = h.clone()  # whoever keeps what the block put out keeps it as it was
        for attachment, edit in many:
            if attachment.active:
                h = edit(h)
        return with_stream(output, h, index)

    return hook


def _reader(read: Callable[[Tensor], None], index: int) -> Callable[[nn.Module, Any, Any], None]:
    thread = threading.get_ident()

    def hook(_block: nn.Module, _inputs: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            read(stream_of(output, index))

    return hook


def _columns(cache: Any) -> int | None:
    """Return how many columns a cache holds, None of a recurrent state, which does not tell."""
    if not isinstance(cache, Cache):
        return None
    if not cache.layers or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return cache.get_seq_length()
    return None


def _require_hooks_to_run(lm: LM, modules: Iterable[nn.Module]) -> None:
    """Raise `ModelError` for a compiled model: its graph was made without our hooks, and would run without them."""
    if any(compiled(module) for module in modules):
        raise ModelError(
            f"{lm.id}: the model is compiled, and a compiled graph leaves hooks out, so that nothing can be attached "
            "or read. Use the model as it was before torch.compile"
        )
