"""What vectors that are added to a model's stream do to words: the meter of `features.py`, and the models it is for."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor

import commandv as cv
from commandv.steering import profile_stream
from experiments.organisms.siblings import rotated
from experiments.sae.training import DONOR, LAYER, donor

TWIN = "twin (rotated to 768)"
N_MATCHED = 20  # words that were as likely, for each word
PASSAGE_WORDS = 30


@functools.cache
def model(name: str) -> cv.LM:
    if name == DONOR:
        return donor()
    return rotated(donor(), 768) if name == TWIN else cv.load_model(name)


@functools.cache
def profiled(name: str) -> cv.Profile:
    prompts, text = cv.load_prompts("builtin:general"), cv.load_prompts("builtin:text")
    return cv.profile(model(name), prompts, text=text, places="words")


@functools.cache
def passages(split: str) -> cv.PromptSet:
    """Return neutral passages that neither the SAE nor a converter has seen: every other one is for development."""
    found = [
        cv.Prompt(one.text, " ".join(one.response.split(" ")[:PASSAGE_WORDS]))
        for one in cv.load_prompts("builtin:drift")
    ]
    return cv.PromptSet(tuple(found[split == "test" :: 2]), f"drift, {split}")


@functools.cache
def vocabulary(name: str) -> dict[str, int]:
    """Return the tokens that are a space and a word of three letters or more, by their text."""
    table = model(name).tokenizer.get_vocab()
    texts = ((re.sub("^[Ġ▁]", " ", text), number) for text, number in table.items())
    return {text: number for text, number in texts if re.fullmatch(r" [A-Za-z]{3,}", text)}


class Meter:
    """Measures what vectors that are added to the stream do to the words of one model, on one split.

    Attributes:
        layer: whose output they are added to, at every token.
        words: the words.
        plain: mean logit of each word without them, [n_words], over the places where a word is about to start.
    """

    def __init__(self, name: str, split: str, words: list[str]) -> None:
        self.name, self.words, self.lm = name, words, model(name)
        self.layer = LAYER * self.lm.n_layers // model(DONOR).n_layers
        self.norm = profile_stream(profiled(name), self.layer).norm
        head = self.lm.model.get_output_embeddings().weight.detach()
        self.head, self.rows = head, head[[vocabulary(name)[word] for word in words]].float()
        self.inputs = []
        for passage in passages(split):
            one = cv.encode(self.lm, passage.text, passage.response)
            places = [at for at, end in enumerate(one.text_ends) if end > 0 and passage.response[end : end + 1] == " "]
            self.inputs.append((torch.tensor([one.ids]), places))
        unmoved, nowhere = self._run(torch.zeros(1, self.lm.d_model), None)
        self.plain, self.reference = unmoved[0], nowhere[:, 0]

    def shifts(self, directions: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Return what directions [n, d_model] do at a length of `share` of the stream's typical norm.

        Returns:
            (how much each raises the mean logit of each word [n, n_words], drift of each in nats per token [n]).
        """
        added = torch.nn.functional.normalize(directions.float()) * share * self.norm
        logits, log_probs = self._run(added, self.reference)
        return logits - self.plain, log_probs

    @torch.inference_mode()
    def _run(self, added: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mean logits [n, n_words] and drift [n], or without a reference log-probabilities [passages, n, ...].

        The blocks up to the layer run once for all vectors, which `attach` could not do. Logits are linear in the state
        after the last norm, so that is averaged instead. Drift is taken at one place per passage.
        """

        def widen(_block: Any, _inputs: Any, output: Tensor) -> Tensor:
            return output + added[:, None].to(output.dtype)

        total, some = torch.zeros(added.shape), []
        handle = self.lm.blocks[self.layer].register_forward_hook(widen)
        try:
            for number, (ids, places) in enumerate(self.inputs):
                final = self.lm.owner(input_ids=ids, use_cache=False).last_hidden_state[:, places]
                total += final.float().sum(1)
                log_probs = (final[:, len(places) // 2] @ self.head.T).float().log_softmax(-1)
                if reference is not None:
                    plain = reference[number]
                    log_probs = (plain.exp() * (plain - log_probs)).sum(-1)
                some.append(log_probs)
        finally:
            handle.remove()
        logits = (total / sum(len(places) for _, places in self.inputs)) @ self.rows.T
        return logits, torch.stack(some) if reference is None else torch.stack(some).mean(0)

    def effects(self, shifts: Tensor, top: list[list[int]]) -> Tensor:
        """Return how much each shift raises each feature's words, [n_shifts, n_features].

        Mean rise of their log-probability, less that of as likely words: the `N_MATCHED` nearest to each in mean logit.
        """
        columns = []
        for own in top:
            gaps = (self.plain[own][:, None] - self.plain).abs()
            gaps[:, own] = torch.inf
            matched = gaps.topk(N_MATCHED, largest=False).indices
            columns.append(shifts[:, own].mean(1) - shifts[:, matched].mean((1, 2)))
        return torch.stack(columns, 1)
