"""Judges that are models run here: classifiers and generative guards."""

from __future__ import annotations

import functools
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from commandv.arguments import checked
from commandv.errors import InputError, ModelError
from commandv.evaluation.judgments import CostlyJudge, Judgment, by_word
from commandv.models.encoding import pad
from commandv.models.generation import batches, greedy
from commandv.models.lm import LM
from commandv.models.load import load_model
from commandv.models.names import PACKAGED
from commandv.models.running import own_pass
from commandv.prompts.sets import Prompt
from commandv.storage.files import digest, file_digest

log = logging.getLogger(__name__)


@checked
@dataclass(frozen=True)
class Classifier(CostlyJudge):
    """Asks a sequence-classification model whether one of its labels is the most likely one for an answer.

    Attributes:
        model: hub id or directory; no code that comes with it is run.
        label: the label that counts, by name (any case) or index. Default: index 1 of a model with two labels.
        template: what is classified, with `{prompt}` and `{answer}`; what is too long loses its end.
        batch_size: answers per batch.
        unit: of the labels.
    """

    model: str
    label: str | int | None = None
    template: str = "{answer}"
    batch_size: int = 32
    unit: str = "rate"

    def __post_init__(self) -> None:
        if "{answer}" not in self.template or self.batch_size < 1:
            raise InputError(
                f"template {self.template!r}, batch_size={self.batch_size}: expected a template with {{answer}}, and "
                "1 or more"
            )

    @property
    def name(self) -> str:
        """Its spec, as `load_judge` takes it."""
        return f"classifier:{self.model}" + ("" if self.label is None else f"#{self.label}")

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that a label depends on."""
        asked = [None if self.label is None else str(self.label), self.template]
        return {"kind": "classifier", "model": self.model, "revision": _revision(self.model), "asked": asked}

    @torch.inference_mode()
    def judgments(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Iterator[list[Judgment]]:
        """Yield the judgments batch by batch."""
        tokenizer, model, longest = self._loaded
        counts = _label_index(model.config, self.label, self.model)
        names = model.config.id2label
        texts = [_filled(self.template, *pair) for pair in zip((p.text for p in prompts), answers, strict=True)]
        cut = sum(len(ids) > longest for ids in tokenizer(texts, verbose=False).input_ids)
        if cut:
            log.warning("judge %s: the ends of %d texts beyond %d tokens are not seen", self.name, cut, longest)
        for members in batches([len(text) for text in texts], self.batch_size):
            inputs = tokenizer(
                [texts[i] for i in members], truncation=True, max_length=longest, padding=True, return_tensors="pt"
            )
            found = model(**inputs.to(model.device)).logits.argmax(-1).tolist()
            yield [
                Judgment(i, float(index == counts), str(names[index])) for i, index in zip(members, found, strict=True)
            ]

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any, int]:
        """Tokenizer, model, longest input in tokens."""
        import transformers

        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.model, trust_remote_code=False)
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                self.model, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ModelError(
                f"{self.model}: cannot be loaded as a classifier: {error}. Expected the hub id or the directory of a "
                "sequence-classification model"
            ) from error
        if missing := sorted(info["missing_keys"]):  # transformers would make them up at random
            raise ModelError(
                f"{self.model}: {len(missing)} weights are not in its files ({', '.join(missing[:3])} ...); is it a "
                "classifier?"
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id  # decoders pool at the last token that is no padding
        # A tokenizer that states no limit says 1e30. RoBERTa's positions begin after its padding index: hence the 2.
        longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 514) - 2)
        return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), longest


@checked
@dataclass(frozen=True)
class Guard(CostlyJudge):
    """Asks a generative guard model through its own chat template and reads the first word of its reply.

    Attributes:
        model: as `load_model` takes it.
        unsafe: words that count 1.
        safe: words that count 0. Any other word is no judgment.
        lead: what replies begin with before the word, such as `"Safety:"`.
        max_new_tokens: of a reply.
        batch_size: exchanges per batch.
        unit: of the labels.
    """

    model: str
    unsafe: tuple[str, ...] = ("unsafe",)
    safe: tuple[str, ...] = ("safe",)
    lead: str = ""
    max_new_tokens: int = 8
    batch_size: int = 8
    unit: str = "rate"

    @property
    def name(self) -> str:
        """Its spec, as `load_judge` takes it."""
        return f"guard:{self.model}"

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that a label depends on."""
        asked = [self.unsafe, self.safe, self.lead, self.max_new_tokens]
        return {"kind": "guard", "model": self.model, "revision": _revision(self.model), "asked": asked}

    def judgments(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Iterator[list[Judgment]]:
        """Yield the judgments batch by batch; an exchange longer than the context gets none."""
        lm = self._lm
        rows = [_exchange(lm, prompt.text, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        limit = (lm.context_length or math.inf) - self.max_new_tokens
        if beyond := [Judgment(i, math.nan) for i, row in enumerate(rows) if len(row) > limit]:
            log.warning("judge %s: %d exchanges are longer than its context", self.name, len(beyond))
            yield beyond
        fitting = [i for i, row in enumerate(rows) if len(row) <= limit]
        for members in batches([len(rows[i]) for i in fitting], self.batch_size):
            places = [fitting[member] for member in members]
            batch = pad(lm, [rows[i] for i in places])
            with torch.inference_mode(), own_pass(lm):
                out = lm.model.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    generation_config=greedy(lm, self.max_new_tokens),
                )
            replies = lm.tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
            yield [self._read(place, reply) for place, reply in zip(places, replies, strict=True)]

    def _read(self, place: int, reply: str) -> Judgment:
        labels = {**dict.fromkeys(self.safe, 0.0), **dict.fromkeys(self.unsafe, 1.0)}
        return by_word(place, reply.strip().removeprefix(self.lead), labels)

    @functools.cached_property
    def _lm(self) -> LM:
        return load_model(self.model, template="chat")


def _exchange(lm: LM, prompt: str, answer: str) -> list[int]:
    """Return a request and its answer as the token ids of a guard's question."""
    import jinja2

    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    try:
        text = lm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise ModelError(f"{lm.id}: its chat template does not take a request with its answer: {error}") from error
    return list(lm.tokenizer(text, add_special_tokens=False).input_ids)


def _filled(template: str, prompt: str, answer: str) -> str:
    """Fill a template in one pass, so that braces in the texts stay what they are."""
    return re.sub(r"\{(prompt|answer)\}", lambda found: prompt if found[1] == "prompt" else answer, template)


def _label_index(config: Any, label: str | int | None, model: str) -> int:
    names = {int(index): str(name) for index, name in config.id2label.items()}
    listed = ", ".join(f"{index} {name}" for index, name in sorted(names.items()))
    if len(names) < 2:
        raise InputError(f"{model}: one output only, which is a score; expected a classifier with two or more labels")
    if label is None:
        if len(names) != 2:
            raise InputError(f"{model}: say which label counts, as in classifier:{model}#LABEL; it has {listed}")
        return 1
    by_name = [index for index, name in names.items() if name.lower() == str(label).lower()]
    if by_name:
        return by_name[0]
    if str(label).isdecimal() and int(label) in names:
        return int(label)
    raise InputError(f"{model}: no label {label!r}; it has {listed}")


def _state(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


@functools.lru_cache(maxsize=256)
def _hash_of(file: str, *_state: int) -> str:
    return file_digest(Path(file))


def _revision(model: str) -> str:
    """Return what tells a model's versions apart, without loading it."""
    if model in PACKAGED:
        return model
    if os.path.isdir(model):
        kept = [
            one for one in sorted(Path(model).iterdir()) if one.suffix in (".json", ".safetensors", ".jinja", ".bin")
        ]
        return digest([(one.name, _hash_of(str(one), *_state(one))) for one in kept])
    if os.path.isfile(model):
        return file_digest(Path(model))
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{model}: cannot be loaded: {error}. Expected a hub id or a model directory") from error
    return str(getattr(config, "_commit_hash", None) or "")
