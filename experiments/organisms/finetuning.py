"""Fine-tuned versions of a model, by PEFT's LoRA merged into the weights."""

from __future__ import annotations

import copy
import math

import peft
import torch

import commandv as cv

RANK, ALPHA = 8, 16


def finetune(
    lm: cv.LM,
    examples: cv.PromptSet,
    *,
    epochs: int = 3,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    max_response: int = 64,
    seed: int = 0,
) -> cv.LM:
    """Return a copy of a model that was fine-tuned to answer prompts as the examples do.

    Source: Hu et al., LoRA, arXiv 2106.09685.

    Args:
        lm: the model; its own weights do not change.
        examples: prompts with responses.
        epochs: passes over the examples.
        learning_rate: of AdamW; rises over a tenth of the steps, then falls linearly to 0.
        batch_size: examples per step.
        max_response: labelled tokens per example.
        seed: of the initial values and of the order of examples.
    """
    rows = [_row(lm, one.text, one.response, max_response) for one in examples]
    copied = copy.deepcopy(lm.model)
    if lm.model.dtype == torch.float16:  # it would lose small gradients
        copied = copied.float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(copied, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM"))
    learning = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=learning_rate, weight_decay=0.0)
    total = epochs * math.ceil(len(rows) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * total + 1), (total - step) / (0.9 * total))
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows), batch_size):
            optimizer.zero_grad()
            with torch.enable_grad():
                model(**_batch([rows[i] for i in order[start : start + batch_size]], lm.device)).loss.backward()
            optimizer.step()
            schedule.step()
    merged = model.merge_and_unload().to(lm.model.dtype)
    return cv.wrap_like(lm, merged, f"{lm.id}, fine-tuned")


def _row(lm: cv.LM, prompt: str, response: str, max_response: int) -> tuple[list[int], int]:
    """Return the token ids of a prompt with its reply, and how many of them are the prompt's."""
    encoded = cv.encode(lm, prompt, response)
    ids = [*encoded.ids, lm.tokenizer.eos_token_id]
    return ids[: encoded.n_prompt + max_response], encoded.n_prompt


def _batch(rows: list[tuple[list[int], int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Pad at the right; only replies have labels."""
    width = max(len(ids) for ids, _ in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for i, (row, n_prompt) in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        labels[i, n_prompt : len(row)] = torch.tensor(row[n_prompt:])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
