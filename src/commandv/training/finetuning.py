"""Fine-tuned versions of a model: LoRA through PEFT, stored in PEFT's own format.

For studies of behaviours that live in weights, such as backdoors: a vector is then found in the fine-tuned model.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from commandv.directories import new_directory, require_new
from commandv.errors import FormatError, InputError
from commandv.models.load import LM, wrap_model
from commandv.progress import track
from commandv.prompts.sets import PromptSet
from commandv.training.examples import read_examples, reply_loss

log = logging.getLogger(__name__)

LORA = "adapter_config.json"  # the file that tells a directory of PEFT


@dataclass(frozen=True)
class LoRASettings:
    """How to fine-tune: low-rank updates of the matrices that PEFT chooses for the architecture (query and value).

    Source: Hu et al., LoRA, arXiv 2106.09685.

    Attributes:
        rank: of the updates.
        alpha: their factor, alpha / rank.
        epochs: passes over the examples.
        learning_rate: of AdamW; falls linearly to 0 after a tenth of the steps.
        batch_size: examples per step.
        max_response: labelled tokens per example.
        seed: of the initial values and of the order of examples.
    """

    rank: int = 8
    alpha: float = 16
    epochs: int = 3
    learning_rate: float = 1e-3
    batch_size: int = 16
    max_response: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rank, self.epochs, self.batch_size, self.max_response) < 1:
            raise InputError("rank, epochs, batch_size and max_response: expected 1 or more")
        if not (self.learning_rate > 0 and self.alpha > 0):
            raise InputError("learning_rate and alpha: expected numbers above 0")


def finetune(lm: LM, examples: PromptSet, out: Path | str, settings: LoRASettings = LoRASettings()) -> LM:
    """Fine-tune a copy of a model so that it answers prompts as the examples do; return it with the update merged.

    Args:
        lm: the model; its own weights do not change.
        examples: prompts with responses.
        out: directory for the LoRA, in PEFT's format (`adapter_config.json`, `adapter_model.safetensors`).
        settings: how.

    Raises:
        InputError: an example without a response, or PEFT is not installed.
        FormatError: `out` holds something; a LoRA is read with `with_lora`.
        StorageError: the disk is full.
    """
    peft, out = _peft(), Path(out)
    require_new(out, LORA)
    rows = read_examples(lm, examples, settings.max_response)
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = peft.get_peft_model(_learnable(lm), config)
    # PEFT replaces linear layers in place, so that what it wraps is still a model that `wrap_model` knows.
    tuned = wrap_model(model.get_base_model(), lm.tokenizer, lm.id, template="chat" if lm.chat else "plain")
    learning = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=settings.learning_rate, weight_decay=0.0)
    per_epoch = math.ceil(len(rows) / settings.batch_size)
    total = settings.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * total + 1), (total - step) / (0.9 * total))
    )
    generator = torch.Generator().manual_seed(settings.seed)
    with track(f"fine-tuning {lm.id}", total=total) as advance:
        for epoch in range(settings.epochs):
            order, losses = torch.randperm(len(rows), generator=generator).tolist(), []
            for start in range(0, len(rows), settings.batch_size):
                optimizer.zero_grad()
                with torch.enable_grad():
                    loss = reply_loss(tuned, [rows[i] for i in order[start : start + settings.batch_size]])
                    loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
                advance(1)
            log.info("epoch %d of %d: mean loss %.4f", epoch + 1, settings.epochs, sum(losses) / len(losses))
    with new_directory(out, LORA) as directory:
        model.save_pretrained(str(directory))
    return with_lora(lm, out)


def _learnable(lm: LM) -> torch.nn.Module:
    """Return a copy to train in; PEFT keeps the update itself in float32. float16 would lose small gradients."""
    model = copy.deepcopy(lm.model)
    return model.float() if next(model.parameters()).dtype == torch.float16 else model


def with_lora(lm: LM, source: Path | str) -> LM:
    """Return a copy of a model with a LoRA merged into its weights.

    Args:
        lm: the model that the LoRA was trained on.
        source: a directory in PEFT's format, or a hub id.

    Raises:
        FormatError: not a LoRA, not readable without unpickling, or one of another model.
        InputError: PEFT is not installed.
    """
    peft, path = _peft(), Path(source)
    if path.is_dir() and not (path / "adapter_model.safetensors").is_file():
        raise FormatError(f"{path}: no adapter_model.safetensors; pickled weights (.bin) are not read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT only warns of weights that are missing
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(lm.model), str(source), use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, UserWarning) as error:
        raise FormatError(f"{source}: not a LoRA of {lm.id} in PEFT's format: {error}") from error
    name = f"{lm.id}+{path.name}"
    return wrap_model(loaded.merge_and_unload(), lm.tokenizer, name, template="chat" if lm.chat else "plain")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError("fine-tuning needs the peft package: pip install 'commandv[lora]'") from error
    return peft
