"""Training: it learns, it learns exactly what `attach` then applies, and nothing else is changed."""

from __future__ import annotations

import pytest
import torch

import commandv as cv
from commandv.errors import InputError
from commandv.models.encoding import encode
from commandv.models.lm import LM
from commandv.positions import EVERYWHERE, as_positions
from commandv.prompts.sets import Prompt, PromptSet
from commandv.training import train as training
from commandv.training.examples import Example, read_examples, reply_loss, shared_beginning
from commandv.training.train import TRAINABLE, TrainSettings, train
from toy import ANSWER, QUICK, assert_identical, examples, tensors

# -- it learns --------------------------------------------------------------------------------------------------------


READS = [kind for kind in TRAINABLE if kind not in ("consreft", "lobireft")]  # through an activation


@pytest.mark.parametrize(
    ("kind", "activation"), [*((kind, "linear") for kind in TRAINABLE), *((kind, "relu") for kind in READS)]
)
def test_every_kind_lowers_the_held_out_loss(kind, activation, lm):
    chosen = TRAINABLE[kind](rank=4, layers="all_layers", positions="all", activation=activation)
    settings = TrainSettings(epochs=8, batch_size=6, held_out=0.25, learning_rate=5e-2)
    losses = train(lm, examples(answer="yes"), chosen, settings).provenance["held_out_loss"]
    assert len(losses) == 9
    assert losses[-1] < 0.6 * losses[0], losses


def test_a_learned_answer_is_given_to_prompts_that_were_not_trained_on(lm):
    settings = TrainSettings(epochs=20, batch_size=6, held_out=0, learning_rate=5e-2)
    adapter = train(lm, examples(24, "yes"), cv.DiReFT(rank=4, layers="all_layers", positions="all"), settings)
    unseen = examples(32).texts[24:]
    assert "yes" not in cv.generate(lm, unseen, max_new_tokens=8)
    with cv.attach(lm, adapter):
        answers = cv.generate(lm, unseen, max_new_tokens=8)
    assert answers.count("yes") >= len(unseen) - 1, answers


def test_adapters_of_kinds_without_a_start_of_their_own_begin_as_the_unmodified_model(lm, monkeypatch):
    """Otherwise the first held-out loss would not be the loss before training."""
    seen = spy_on_losses(monkeypatch)
    for kind in ("loreft", "noreft", "direft", "nodireft", "lobireft"):
        adapter = train(lm, examples(12), TRAINABLE[kind](rank=3), QUICK)
        assert adapter.provenance["held_out_loss"][0] == pytest.approx(plain_loss(lm, seen[-1]), abs=2e-5), kind


# -- what is trained is what attach applies ---------------------------------------------------------------------------


def spy_on_losses(monkeypatch) -> list[list]:
    """Record the examples on which a training measures its held-out loss; they fit into one batch here."""
    return spy_on_batches(monkeypatch, learning=False)


def spy_on_batches(monkeypatch, learning: bool) -> list[list]:
    """Record the batches from which a training learns, or those that it only measures."""
    seen: list[list] = []
    original = training.reply_loss

    def spied(lm, batch, *more):
        if torch.is_grad_enabled() == learning:
            seen.append(batch)
        return original(lm, batch, *more)

    monkeypatch.setattr(training, "reply_loss", spied)
    return seen


def plain_loss(lm: LM, rows) -> float:
    """Mean cross-entropy over the responses' tokens: one sequence at a time, no padding, no cache."""
    losses = []
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.response]])
        with torch.no_grad():
            logits = lm.model(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(row.response), reduction="none").tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("positions", ["l1", "l3", "f2+l1", "f3", "g2", "l1+g2", "all"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom"])
def test_attached_adapter_has_the_loss_seen_in_training(arch, positions, tiny_lm, monkeypatch):
    lm = tiny_lm(arch)
    seen = spy_on_losses(monkeypatch)
    adapter = train(lm, examples(), cv.DiReFT(rank=2, layers=[1, 3], positions=positions, activation="tanh"), QUICK)
    rows = seen[-1]
    assert len({len(row.prompt) for row in rows}) > 2
    total, n = 0.0, 0
    for row in rows:
        with cv.attach(lm, adapter, n_prompt=len(row.prompt)):
            total += plain_loss(lm, [row]) * len(row.response)
        n += len(row.response)
    assert total / n == pytest.approx(adapter.provenance["held_out_loss"][-1], abs=3e-5)
    assert total / n != pytest.approx(plain_loss(lm, rows), abs=1e-3)


def test_examples_are_what_the_model_sees_when_it_answers(tiny_lm, monkeypatch):
    """The trained prompt is the prompt of `generate`; the reply follows at once and ends with the end of the turn."""
    for chat in (False, True):
        lm = tiny_lm(chat=chat)
        seen = spy_on_losses(monkeypatch)
        one = examples()
        train(lm, one, cv.LobiReFT(rank=1), TrainSettings(epochs=1, held_out=0.9, batch_size=32))
        by_prompt = {tuple(encode(lm, prompt.text).ids): prompt for prompt in one}
        for row in seen[-1]:
            assert tuple(row.prompt) in by_prompt
            assert row.response[-1] == lm.tokenizer.eos_token_id
            assert lm.tokenizer.decode(row.response, skip_special_tokens=True).strip() == ANSWER


# -- the prefix without gradients is a shortcut, nothing else ---------------------------------------------------------


def learnable(lm: LM, positions: str) -> tuple[cv.Adapter, list[torch.Tensor]]:
    """An adapter on every layer, and its tensors, which learn."""
    g = torch.Generator().manual_seed(0)
    parts = [0.3 * torch.randn(2, lm.d_model, generator=g) for _ in range(2 * lm.n_layers)]
    parts += [0.3 * torch.randn(2, generator=g) for _ in range(lm.n_layers)]
    for part in parts:
        part.requires_grad_()
    read, write, bias = parts[: lm.n_layers], parts[lm.n_layers : 2 * lm.n_layers], parts[2 * lm.n_layers :]
    where = as_positions(positions)
    made = {
        layer: (cv.Intervention(read[layer], bias[layer], write[layer], "tanh", where),) for layer in range(lm.n_layers)
    }
    return cv.Adapter(made, lm.ref), parts


def gradients(lm: LM, rows, positions: str, *more) -> tuple[torch.Tensor, list[torch.Tensor]]:
    adapter, parts = learnable(lm, positions)
    loss = reply_loss(lm, rows, adapter, *more)
    loss.backward()
    return loss.detach(), [part.grad for part in parts]


def assert_same_gradients(found, full) -> None:
    torch.testing.assert_close(found[0], full[0], rtol=1e-5, atol=1e-5)
    assert any(grad.abs().max() > 1e-3 for grad in full[1])
    for grad, other in zip(found[1], full[1], strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("positions", ["l1", "l4", "l40", "g2"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "gemma3_text", "bloom", "opt", "mixtral"])
def test_prefix_gives_the_gradients_of_a_full_pass(arch, positions, tiny_lm):
    lm = tiny_lm(arch)
    rows = [Example.of(lm, one.text, one.response, 12) for one in examples(8)]
    assert len({len(row.prompt) for row in rows}) > 2
    # Where an adapter is said to act decides only from where on the pass keeps gradients.
    found, full = (gradients(lm, rows, positions, where) for where in (as_positions(positions), EVERYWHERE))
    assert_same_gradients(found, full)


@pytest.mark.parametrize("positions", ["l1", "l3", "l1+g2"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_a_shared_beginning_is_read_once_and_gives_the_same_gradients(arch, positions, tiny_lm):
    lm = tiny_lm(arch)
    where = as_positions(positions)
    long = PromptSet(tuple(one._replace(text=f"the cat sleeps in the sun and {one.text}") for one in examples(6)))
    rows = [Example.of(lm, one.text, one.response, 12) for one in long]
    beginning = shared_beginning(lm, rows, where)
    assert beginning.length >= 8
    assert_same_gradients(gradients(lm, rows, positions, where, beginning), gradients(lm, rows, positions, where))
    assert shared_beginning(lm, rows, as_positions("f1")).length == 0


def test_columns_before_the_first_changed_position_run_without_gradients(lm):
    rows = [Example.of(lm, one.text, one.response, 12) for one in examples(8)]
    longest, width = max(len(row.prompt) for row in rows), max(len(row.response) for row in rows)
    passes: list[tuple[int, bool]] = []
    handle = lm.blocks[0].register_forward_pre_hook(
        lambda _, inputs: passes.append((inputs[0].shape[1], torch.is_grad_enabled()))
    )
    for positions, before in {"l1": 1, "l3": 3, "g2": 1, "f1": None, "f1+l1": None, "all": None}.items():
        passes.clear()
        gradients(lm, rows, positions, as_positions(positions))
        whole = longest + width - 1
        untouched = longest - (before or longest)
        assert passes == [*([(untouched, False)] if untouched else []), (whole - untouched, True)], positions
    handle.remove()


# -- the model stays as it was ----------------------------------------------------------------------------------------


def hooks(lm: LM) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.model.modules()]


def test_weights_and_requires_grad_are_left_alone(lm, monkeypatch):
    frozen = next(lm.model.parameters())
    frozen.requires_grad_(False)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    flags, hooked = [parameter.requires_grad for parameter in lm.model.parameters()], hooks(lm)
    during = []
    original = torch.optim.Adam.step

    def spied(self):
        original(self)
        during.append(any(parameter.requires_grad for parameter in lm.model.parameters()))
        if len(during) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", spied)
    train(lm, examples(12), cv.DiReFT(rank=2), QUICK)  # 4 steps
    with pytest.raises(KeyboardInterrupt):
        train(lm, examples(12), cv.DiReFT(rank=2), QUICK)
    assert during == [False] * 5
    assert [parameter.requires_grad for parameter in lm.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert hooks(lm) == hooked


def test_trained_adapter_is_detached_and_saves(lm, tmp_path):
    for kind in TRAINABLE:
        adapter = train(lm, examples(12), TRAINABLE[kind](rank=2, activation="relu"), QUICK, name=f"my {kind}")
        assert not any(tensor.requires_grad for tensor in tensors(adapter))
        again = cv.load_adapter(cv.save(adapter, tmp_path / kind))
        assert (again.name, again.model) == (f"my {kind}", lm.ref)
        assert_identical(again, adapter)


# -- seeds and settings -----------------------------------------------------------------------------------------------


def test_seeds_reproduce_and_differ(lm):
    one, two, other = (
        train(lm, examples(16), cv.NodiReFT(rank=2), TrainSettings(epochs=1, held_out=0.25, seed=seed))
        for seed in (5, 5, 6)
    )
    assert_identical(one, two)
    assert not any(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_each_epoch_sees_every_example_once_in_an_order_of_its_own(lm, monkeypatch):
    seen = spy_on_batches(monkeypatch, learning=True)
    for _ in range(2):
        train(lm, examples(19), cv.LobiReFT(rank=1), TrainSettings(epochs=2, batch_size=8, held_out=0))
    assert [len(batch) for batch in seen[:3]] == [8, 8, 3]
    rows = read_examples(lm, examples(19), 512)
    first, second, again = ([rows.index(row) for batch in seen[a : a + 3] for row in batch] for a in (0, 3, 6))
    assert sorted(first) == sorted(second) == list(range(19))
    assert first == again != second


def test_a_training_that_diverges_stops_and_says_so(lm, monkeypatch):
    losses = iter([torch.tensor(1.0, requires_grad=True), torch.tensor(float("nan"), requires_grad=True)])
    monkeypatch.setattr(training, "reply_loss", lambda *_: next(losses))
    with pytest.raises(InputError, match="the loss is nan in epoch 2; take a lower learning rate"):
        train(lm, examples(6), cv.DiReFT(rank=1), TrainSettings(epochs=2, held_out=0))


def test_training_does_not_touch_the_global_generator(lm):
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    train(lm, examples(12), cv.LoReFT(rank=2), QUICK)
    assert torch.equal(torch.rand(3), expected)


def test_provenance_is_enough_to_train_again(lm):
    adapter = train(lm, examples(12), cv.LoReFT(rank=2, layers="last_half", positions="f1+l2"), QUICK)
    assert adapter.provenance["kind"] == {
        "kind": "loreft",
        "rank": 2,
        "layers": [2, 3],
        "positions": "f1+l2",
        "activation": "linear",
    }
    assert TrainSettings(**adapter.provenance["settings"]) == QUICK
    assert adapter.provenance["examples"] == {"name": "toy", "hash": examples(12).hash, "n": 12}
    assert adapter.model == lm.ref
    assert adapter.layers == [2, 3]


def test_nothing_held_out_reports_no_loss(lm):
    settings = TrainSettings(epochs=1, held_out=0)
    assert train(lm, examples(4), cv.DiReFT(rank=1), settings).provenance["held_out_loss"] == []


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("response", ["", "  \n"])
def test_example_without_a_response_is_named(response, lm):
    rows = PromptSet((*examples(3).prompts, Prompt("And this?", response)), "mine.jsonl")
    with pytest.raises(InputError, match=r"mine\.jsonl: example 4 has no response"):
        train(lm, rows, cv.DiReFT(rank=2))


def test_impossible_requests(lm):
    with pytest.raises(InputError, match="rank=33 is above the model's width 32"):
        train(lm, examples(12), cv.DiReFT(rank=33))
    with pytest.raises(InputError, match="leave none to train on"):
        train(lm, examples(1), cv.DiReFT(rank=1), TrainSettings(held_out=0.9))
    with pytest.raises(InputError, match="rank=0"):
        cv.DiReFT(rank=0)
    with pytest.raises(InputError, match="layers"):
        train(lm, examples(12), cv.DiReFT(rank=1, layers=[4]))
    with pytest.raises(InputError, match="activation 'swish'"):
        train(lm, examples(12), cv.DiReFT(rank=1, activation="swish"))
    with pytest.raises(InputError, match="longer than the context"):
        train(lm, PromptSet((Prompt("word " * 600, "yes"),) * 4), cv.DiReFT(rank=1))


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"batch_size": 0}, {"held_out": 1.0}, {"learning_rate": 0.0}, {"warmup": -0.1}, {"seed": 2**64}],
)
def test_impossible_settings(wrong):
    with pytest.raises(InputError, match="expected"):
        TrainSettings(**wrong)
