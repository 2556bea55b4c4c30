"""Behaviours carried through words: what distilled adapters do, and that nothing of an answer leaks into its prompt."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

import commandv as cv
from commandv.errors import InputError
from commandv.models.encoding import encode, last_logits, pad
from commandv.transfer.distil import context as context_module
from commandv.transfer.distil.context import demonstration_sets
from commandv.transfer.distil.demonstrations import Changes
from commandv.transfer.distil.distil import METHODS, choose
from commandv.transfer.distil.head import Head
from tiny import tiny_lm
from toy import FORMS, SUBJECTS

WORD = " the"
ANSWERS = "The quick brown fox jumps over the lazy dog."
PROMPTS = [form.format(subject) for subject in SUBJECTS for form in FORMS]
ASKED, NEW = PROMPTS[:24], PROMPTS[24:]


@functools.cache
def model(arch: str = "llama", chat: bool = True):
    return tiny_lm(arch, chat=chat)


def token(lm) -> int:
    return lm.tokenizer(WORD, add_special_tokens=False).input_ids[0]


def certain(lm, positions: str = "l1") -> cv.Adapter:
    """An adapter that makes one token very likely, whatever is asked."""
    row = lm.model.get_output_embeddings().weight.detach()[token(lm)].float()
    one = cv.Intervention(
        torch.zeros(1, lm.d_model), torch.ones(1), 60 * row[None], positions=cv.Positions.parse(positions)
    )
    return cv.Adapter({lm.n_layers - 1: (one,)}, lm.ref, "river")


@functools.cache
def shown(arch: str = "llama", chat: bool = True) -> cv.Demonstrations:
    lm = model(arch, chat)
    told = None if arch == "llama" else [f"The fox sleeps under {one}" for one in ASKED]  # others of them loop
    return cv.demonstrate(lm, certain(lm), ASKED, answers=told, max_new_tokens=6)


def log_p(lm, adapter=None, prompts=NEW, wanted=None) -> float:
    """Mean log-probability of the word as the first token of an answer."""
    rows = [encode(lm, one).ids for one in prompts]
    with torch.inference_mode(), cv.attach(lm, adapter) if adapter else torch.no_grad():
        logits = last_logits(lm, pad(lm, rows), 1)[:, 0]
    return float(logits.log_softmax(-1)[:, token(lm) if wanted is None else wanted].mean())


def test_the_donor_says_what_its_adapter_changes():
    made = shown()
    assert all(made.answers)
    assert made.mean_divergence > 0.05
    first = made.changes.places[:, 1] == 0
    number = made.vocabulary.index(WORD)
    there = made.changes.tokens[first] == number
    assert there.any(1).all()  # the token that it makes likely is among the top at every prompt's end
    lm, one = model(), made.prompts[0]
    row = int((made.changes.places == torch.tensor([0, 0])).all(1).nonzero())
    told = float(made.changes.ratio[row][made.changes.tokens[row] == number])
    assert told == pytest.approx(log_p(lm, certain(lm), [one]) - log_p(lm, None, [one]), abs=1e-3)


def test_ratios_and_the_rest_make_up_the_adapters_distribution():
    changes = shown().changes
    on, off = changes.log_p.exp().sum(1), (changes.log_p - changes.ratio).exp().sum(1)
    rest = (1 - off) * changes.rest.exp()
    torch.testing.assert_close(on + rest, torch.ones(len(on)), atol=2e-3, rtol=0)


@pytest.mark.parametrize("by", ["vocabulary", "answers"])
@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt2"])
def test_distilled_adapters_raise_the_donors_token_on_new_prompts(arch, by):
    lm = model(arch)
    made = cv.distil(lm, shown(arch), by=by, rank=4)
    told = made.provenance["held_out_divergence"]
    assert told[-1] < 0.8 * told[0]
    assert made.layers == [lm.n_layers - 1]
    assert all(one.last == 1 and one.generated >= 1 and not one.everywhere for one in made.positions)
    if by == "vocabulary":
        assert log_p(lm, made) > log_p(lm) + 0.3 * (log_p(lm, certain(lm)) - log_p(lm))


def test_the_vocabulary_reaches_another_model_with_another_tokenizer():
    donor, recipient = model(), tiny_lm("qwen2", seed=5, chat=True, vocab=300)
    assert len(recipient.tokenizer) < len(donor.tokenizer)
    made = cv.distil(recipient, shown(), by="vocabulary", rank=4)
    assert made.provenance["held_out_divergence"][-1] < made.provenance["held_out_divergence"][0]
    with cv.attach(recipient, made):
        assert cv.generate(recipient, NEW[:1], max_new_tokens=2)


def test_ratios_of_other_words_do_not_raise_it():
    lm, made = model(), shown()
    generator = torch.Generator().manual_seed(0)
    other = torch.randperm(len(made.vocabulary), generator=generator)
    wrong = replace(made, vocabulary=tuple(made.vocabulary[i] for i in other))
    right = log_p(lm, cv.distil(lm, made, by="vocabulary", rank=4))
    assert right > log_p(lm, cv.distil(lm, wrong, by="vocabulary", rank=4)) + 1


@pytest.mark.parametrize("chat", [True, False])
def test_the_context_moves_states_as_demonstrations_do(chat):
    lm = model(chat=chat)
    texts = cv.demonstrate(None, None, ASKED, answers=[ANSWERS] * len(ASKED))
    settings = cv.Context(tokens=3, sets=3, size=2)
    made = cv.distil(lm, texts, by=settings, rank=4)
    assert made.layers == list(range(lm.n_layers // 3, lm.n_layers))
    assert made.positions == {cv.Positions.parse("l1+g3")}
    turns = [(one, ANSWERS) for one in ASKED[:2]]
    rows = [[encode(lm, one, turns=before).ids for one in NEW] for before in ((), turns)]
    with torch.inference_mode():
        alone, after = (last_logits(lm, pad(lm, many), 1)[:, 0] for many in rows)
        with cv.attach(lm, made):
            moved = last_logits(lm, pad(lm, rows[0]), 1)[:, 0]
        with cv.attach(lm, cv.random_like(made, seed=1)):
            random = last_logits(lm, pad(lm, rows[0]), 1)[:, 0]

    def left(found):
        return float((found - after).norm() / (alone - after).norm())

    assert left(moved) < min(0.92, left(random) - 0.03)


def test_no_prompts_own_answer_stands_before_it(monkeypatch):
    seen = []

    def spying(lm, prompt, answer="", **settings):
        seen.append((prompt, settings.get("turns", ())))
        return encode(lm, prompt, answer, **settings)

    monkeypatch.setattr(context_module, "encode", spying)
    texts = cv.demonstrate(None, None, ASKED[:9], answers=[ANSWERS] * 9)
    cv.distil(model(), texts, by=cv.Context(tokens=2, sets=4, size=2), rank=2)
    after = [(prompt, turns) for prompt, turns in seen if turns]
    assert after
    assert not [prompt for prompt, turns in after if prompt in dict(turns)]
    assert {prompt for prompt, _ in after} == set(ASKED[:9])


def texts(n: int) -> cv.Demonstrations:
    return cv.Demonstrations(tuple(PROMPTS[:n]), (ANSWERS,) * n)


def test_sets_of_texts_are_disjoint_and_drawn_by_the_seed():
    sets = demonstration_sets(texts(20), 4, 4, 0)
    assert len({i for one in sets for i in one}) == 16
    assert sets == demonstration_sets(texts(20), 4, 4, 0)
    assert sets != demonstration_sets(texts(20), 4, 4, 1)
    assert [len(one) for one in demonstration_sets(texts(7), 4, 16, 0)] == [3, 3]
    with pytest.raises(InputError, match="1 demonstration, expected 2 or more"):
        demonstration_sets(texts(1), 4, 4, 0)


def test_sets_are_of_the_answers_that_the_adapter_changes_most_after_the_opening():
    opening, after = torch.zeros(6, 12), torch.zeros(6, 12)
    opening[:, :6], after[:, 6:] = 9.0, torch.tensor([1.0, 5.0, 0.0, 3.0, 4.0, 2.0])[:, None]
    places = torch.cartesian_prod(torch.arange(6), torch.arange(12))
    some = torch.zeros(72, 1)
    changes = Changes(places, some.long(), some, some, some[:, 0], (opening + after).flatten())
    shown = replace(texts(6), vocabulary=(WORD,), changes=changes)
    assert demonstration_sets(shown, 2, 2, None) == [[1, 3], [4, 5]]
    brief = changes._replace(divergence=changes.divergence.where((places[:, 0] != 1) | (places[:, 1] < 7), 0.0))
    assert demonstration_sets(replace(shown, changes=brief), 2, 2, None) == [[4, 5], [3, 0]]


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt2", "opt"])
def test_the_head_is_differentiated_as_autograd_would(arch):
    lm = model(arch)
    head = Head.of(lm)
    generator = torch.Generator().manual_seed(0)
    h, back = (torch.randn(5, lm.d_model, generator=generator) for _ in range(2))
    norm = functools.partial(head.norm.__call__)
    _, backward = torch.autograd.functional.vjp(norm, h, back)
    torch.testing.assert_close(head.backward(h, back), backward, atol=1e-4, rtol=1e-4)


def test_a_head_of_another_form_is_refused():
    lm = tiny_lm("gemma2", chat=True, final_logit_softcapping=0.5)
    with pytest.raises(InputError, match="by='context'"):
        cv.distil(lm, shown(), by="vocabulary")


def test_auto_takes_the_context_and_the_vocabulary_where_that_cannot_be():
    lm, made = model(), shown()
    assert choose(lm, made) == cv.Context()
    few = cv.demonstrate(lm, certain(lm, "all"), ASKED[:6], answers=[ANSWERS] * 6)
    assert choose(lm, few) == cv.Vocabulary()
    assert cv.distil(lm, few, rank=2).provenance["by"] == "vocabulary"


def test_auto_takes_many_strong_demonstrations_into_a_base_model():
    base = model(chat=False)
    made = cv.distil(base, shown(chat=False), rank=2)
    first, second = made.provenance["sets"]
    assert not set(first) & set(second)
    assert made.provenance["settings"]["strongest"]
    assert made.positions == {cv.Positions.parse("l1+g24")}
    assert choose(base, texts(24)) == cv.Context()  # how strong texts are is not known


def test_the_same_seed_gives_the_same_adapter_and_nothing_stays_on_the_model():
    lm = model()
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    one, two = (cv.distil(lm, shown(), by="vocabulary", rank=2, seed=3) for _ in range(2))
    for mine, other in zip(one.interventions[3], two.interventions[3], strict=True):
        assert torch.equal(mine.write, other.write)
    assert not cv.attached(lm)
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert not any(part.requires_grad or part.is_inference() for part in one.interventions[3][0].tensors().values())


def test_adapters_are_saved_and_work_as_any(tmp_path):
    lm = model()
    made = cv.distil(lm, shown(), by="context", rank=2)
    cv.save(made, tmp_path / "adapter")
    again = cv.load_adapter(str(tmp_path / "adapter"))
    assert log_p(lm, again) == pytest.approx(log_p(lm, made), abs=1e-5)
    assert again.provenance["by"] == "context"
    assert again.provenance["demonstrations"]["hash"] == shown().hash


def test_answers_that_say_nothing_are_left_out_and_counted():
    answers = ["", "  \n", "Arr. " * 30, ANSWERS, "No, never.", ANSWERS]
    made = cv.demonstrate(None, None, ASKED[:6], answers=answers, keep=lambda _prompt, answer: "No" not in answer)
    assert made.answers == (ANSWERS, ANSWERS)
    assert made.prompts == (ASKED[3], ASKED[5])
    assert made.dropped == {"empty": 2, "looping": 1, "not to keep": 1}
    assert made.loop_rate == pytest.approx(1 / 6)
    with pytest.raises(InputError, match="none of 2 answers"):
        cv.demonstrate(None, None, ASKED[:2], answers=["", ""])


def test_an_adapter_that_changes_nothing_is_told_of(caplog):
    lm = model()
    cv.demonstrate(lm, certain(lm).scaled(1e-4), ASKED[:3], max_new_tokens=3)
    assert "hardly a behaviour" in caplog.text


def test_what_cannot_be_done_is_refused():
    lm, made = model(), shown()
    texts = replace(made, changes=None, vocabulary=())
    with pytest.raises(InputError, match="needs a donor and its adapter"):
        cv.demonstrate(lm, None, ASKED)
    with pytest.raises(InputError, match="1 answers to 2 prompts"):
        cv.demonstrate(lm, None, ASKED[:2], answers=["a"])
    with pytest.raises(InputError, match="texts only"):
        cv.distil(lm, texts, by="vocabulary")
    with pytest.raises(InputError, match="expected one of auto, context, vocabulary, answers"):
        cv.distil(lm, made, by="magic")
    with pytest.raises(InputError, match="rank=0"):
        cv.distil(lm, made, rank=0)
    strangers = replace(made, vocabulary=tuple(f"\u4e00{i}" for i in range(len(made.vocabulary))))
    with pytest.raises(InputError, match=r"0% of what .* says"):
        cv.distil(lm, strangers, by="vocabulary")
    with cv.attach(lm, certain(lm)), pytest.raises(InputError, match="an adapter is attached"):
        cv.distil(lm, made)


def test_sets_that_do_not_fit_into_the_recipients_context_are_made_smaller():
    lm = tiny_lm(chat=True, max_position_embeddings=256)
    made = cv.distil(lm, texts(24), by=cv.Context(tokens=2, size=8), rank=2)
    assert {len(one) for one in made.provenance["sets"]} in ({1}, {2})
    with pytest.raises(InputError, match="not even one demonstration"):
        cv.distil(tiny_lm(chat=True, max_position_embeddings=96), texts(24), by="context")


def test_every_method_is_in_the_table():
    assert set(METHODS) == {"context", "vocabulary", "answers"}
    assert all(METHODS[name].name == name for name in METHODS)
