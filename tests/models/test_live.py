"""What acts on a live model: compiled models, copies, interrupts, hidden states, nothing left behind."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.testing import assert_close

import commandv as cv
import tiny
from commandv.errors import InputError, ModelError
from commandv.models.live import attached, foreign_hooks, reading

IDS = torch.tensor([[1, 20, 21, 22, 23]])
PROMPTS = ["How do I make tea?", "Why does Venus spin backwards, and what about the river?", "x"]


@pytest.fixture
def lm():
    return tiny.tiny_lm()


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids).logits


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -- nothing of the user's is changed -------------------------------------------------------------------------------


def test_wrapping_changes_neither_model_nor_tokenizer():
    model, tokenizer = tiny.tiny_model().train(), tiny.tiny_tokenizer()
    tokenizer.pad_token = None
    threads = torch.get_num_threads()
    lm = cv.wrap_model(model, tokenizer, "mine")
    cv.generate(lm, PROMPTS, max_new_tokens=3)
    cv.profile(lm, PROMPTS, cache=False, text=None)
    assert all(module.training for module in model.modules())
    assert tokenizer.pad_token is None
    assert n_hooks(model) == 0
    assert torch.get_num_threads() == threads
    assert "generate" not in vars(model)


def test_passes_of_our_own_have_no_dropout():
    model = tiny.tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    expected = cv.generate(cv.wrap_model(model, tiny.tiny_tokenizer(), "still"), PROMPTS, max_new_tokens=6)
    model.train()
    lm = cv.wrap_model(model, tiny.tiny_tokenizer(), "still")
    for _ in range(2):
        assert cv.generate(lm, PROMPTS, max_new_tokens=6) == expected
    one, other = (cv.profile(lm, PROMPTS, cache=False, text=None).layer(3) for _ in range(2))
    assert torch.equal(one, other)


def test_the_models_own_generation_settings_neither_act_nor_change(lm):
    plain = cv.generate(lm, PROMPTS, max_new_tokens=8)
    own = lm.model.generation_config
    own.update(repetition_penalty=5.0, do_sample=True, temperature=4.0, min_new_tokens=8, num_beams=3)
    own.update(bad_words_ids=[[id] for id in range(3, 40)], suppress_tokens=list(range(40, 100)))
    own.update(no_repeat_ngram_size=1, guidance_scale=2.0, forced_bos_token_id=5)
    before = own.to_dict()
    assert cv.generate(lm, PROMPTS, max_new_tokens=8) == plain
    assert lm.model.generation_config is own
    assert own.to_dict() == before


def test_padding_with_a_token_that_has_no_embedding():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= tiny.VOCAB
    lm = cv.wrap_model(tiny.tiny_model(), tokenizer, "padded")
    usual = tiny.tiny_lm()
    assert cv.generate(lm, PROMPTS, max_new_tokens=4) == cv.generate(usual, PROMPTS, max_new_tokens=4)
    for side in ("left", "right"):
        one, other = (
            cv.profile(m, PROMPTS, cache=False, padding=side, text=None).layer(2).float() for m in (lm, usual)
        )
        assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_a_generate_of_the_users_own_stays(lm):
    calls = []

    def own(*args, **kwargs):
        calls.append(kwargs)
        return type(lm.model).generate(lm.model, *args, **kwargs)

    lm.model.generate = own
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with cv.attach(lm, tiny.random_adapter(lm, (1,), "l1+g2")):
        through_own = lm.model.generate(input_ids=IDS, **settings)
        through_class = type(lm.model).generate(lm.model, input_ids=IDS, **settings)
    assert lm.model.generate is own
    assert len(calls) == 1
    assert torch.equal(through_own, through_class)


def test_the_head_is_fed_contiguously_in_our_own_passes_only(lm):
    seen = []
    head = lm.model.get_output_embeddings()
    head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].is_contiguous()))
    cv.generate(lm, PROMPTS, max_new_tokens=2)
    assert all(seen)
    assert not head._forward_pre_hooks


# -- what is attached is visible, and comes off ---------------------------------------------------------------------


def test_the_model_says_what_is_attached(lm):
    plain = repr(lm)
    first = cv.attach(lm, tiny.random_adapter(lm, (1, 3), "l1+g2"), scale=0.5)
    second = cv.attach(lm, tiny.random_adapter(lm, (2,), "all"))
    assert "random on layers 1, 3 at l1+g2, scale 0.5" in repr(lm)
    assert [one.layers for one in cv.attached(lm)] == [[1, 3], [2]]
    again = cv.wrap_model(lm.model, lm.tokenizer, "again")
    assert cv.attached(again) == cv.attached(lm)
    del first, second  # a forgotten handle
    cv.detach_all(again)
    cv.detach_all(lm)
    assert attached(lm) == ()
    assert repr(lm) == plain
    assert n_hooks(lm.model) == 0


def test_hooks_of_others_are_told_from_our_own(lm):
    lm.model(input_ids=IDS, output_hidden_states=True)  # transformers leaves hooks of its own
    with cv.attach(lm, tiny.random_adapter(lm)):
        assert foreign_hooks(lm) == []
        handle = lm.blocks[1].mlp.register_forward_hook(lambda *_: None)
        assert foreign_hooks(lm) == ["model.layers.1.mlp"]
        handle.remove()


@pytest.mark.parametrize("arch", ["llama", "bloom", "gpt2", "falcon"])
def test_hidden_states_shown_while_attached_are_the_edited_ones(arch):
    lm = tiny.tiny_lm(arch)
    states = {}

    def entering(layer):
        return lambda _m, args, kwargs: states.update({layer: args[0] if args else kwargs["hidden_states"]})

    for layer in (1, 2, 3):  # what a block gets is what the one before it put out
        lm.blocks[layer].register_forward_pre_hook(entering(layer - 1), with_kwargs=True)
    with torch.inference_mode():
        lm.model(input_ids=IDS, output_hidden_states=True)
        with cv.attach(lm, tiny.random_adapter(lm, (0, 1, 2), "all")):
            shown = lm.model(input_ids=IDS, output_hidden_states=True).hidden_states
    for layer in range(3):
        assert torch.equal(shown[layer + 1], states[layer]), layer


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("keep", [lambda h: h, lambda h: h[:, -1:], lambda h: [h]], ids=["it", "a view", "a list"])
def test_who_keeps_what_a_block_puts_out_keeps_it_as_it_was(arch, keep):
    lm = tiny.tiny_lm(arch)
    adapter = tiny.random_adapter(lm, layers=(1, 3), positions="all")
    with cv.attach(lm, adapter):
        expected = logits(lm.model)
    forward, kept, copies = lm.blocks[1].forward, [], []

    def keeping(*args, **kwargs):
        output = forward(*args, **kwargs)
        h = output[0] if isinstance(output, tuple) else output
        kept.append(keep(h))
        copies.append(h.clone())
        return output

    lm.blocks[1].forward = keeping
    with cv.attach(lm, adapter):
        assert torch.equal(logits(lm.model), expected)
    (found,), (before,) = kept, copies
    found = found[0] if isinstance(found, list) else found
    assert torch.equal(found, before[:, -1:] if found.shape[1] == 1 else before)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom"])
def test_the_stream_is_not_copied_for_an_edit(arch, monkeypatch):
    lm = tiny.tiny_lm(arch)
    before, copied, clone = logits(lm.model), [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda h, **how: copied.append(h.shape) or clone(h, **how))
    with cv.attach(lm, tiny.random_adapter(lm, layers=(1, 2, 3))):
        assert not torch.equal(logits(lm.model), before)
    assert (1, IDS.shape[1], lm.d_model) not in copied


def test_gradients_go_through_an_edit_as_through_the_same_written_out(lm):
    adapter = tiny.random_adapter(lm, layers=(1,), positions="all")
    (one,) = adapter.interventions[1]
    embedded = lm.model.get_input_embeddings()(IDS).detach().requires_grad_()

    def slope():
        (found,) = torch.autograd.grad(lm.model(inputs_embeds=embedded).logits.square().sum(), embedded)
        return found

    with cv.attach(lm, adapter):
        attached_slope = slope()
    handle = lm.blocks[1].register_forward_hook(lambda _block, _inputs, h: h + one.delta(h))
    try:
        assert_close(attached_slope, slope())
    finally:
        handle.remove()


def test_readers_see_what_the_next_block_gets(lm):
    read, handles = {}, []
    handles.append(lm.blocks[1].register_forward_hook(lambda _m, _i, h: h + 1))
    handles.append(
        lm.blocks[2].register_forward_pre_hook(
            lambda _m, a, k: read.update(into=(*a, *k.values())[0]), with_kwargs=True
        )
    )
    with cv.attach(lm, tiny.random_adapter(lm)), reading(lm, {1: lambda h: read.update(out=h)}):
        logits(lm.model)
    assert torch.equal(read["into"], read["out"])
    for handle in handles:
        handle.remove()
    assert n_hooks(lm.model) == 0


# -- compiled models ------------------------------------------------------------------------------------------------


def _compile(model, how):
    if how == "module":
        model.compile(backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        for block in model.model.layers:
            block.compile(backend="eager")


@pytest.mark.parametrize("how", ["module", "forward", "blocks"])
def test_a_compiled_model_is_refused(lm, how):
    _compile(lm.model, how)
    with pytest.raises(ModelError, match="compiled"):
        cv.attach(lm, tiny.random_adapter(lm))
    with pytest.raises(ModelError, match="compiled"):
        cv.profile(lm, PROMPTS, cache=False, text=None)
    assert n_hooks(lm.model) == 0


def test_compiling_while_attached_is_noticed(lm):
    with cv.attach(lm, tiny.random_adapter(lm)):
        lm.model.forward = torch.compile(lm.model.forward, backend="eager")
        with pytest.raises(ModelError, match="compiled"):
            logits(lm.model)


def test_a_wrapper_compiled_before_attaching_runs_what_is_attached(lm):
    wrapper = torch.compile(lm.model, backend="eager")
    plain = logits(wrapper)
    for size in (2.0, 4.0):
        with cv.attach(lm, tiny.random_adapter(lm, size=size)):
            torch.testing.assert_close(logits(wrapper), logits(lm.model))
            assert not torch.allclose(logits(wrapper), plain)
        torch.testing.assert_close(logits(wrapper), plain)


def test_a_compiled_wrapper_is_refused_when_wrapped():
    with pytest.raises(ModelError, match="before torch"):
        cv.wrap_model(torch.compile(tiny.tiny_model(), backend="eager"), tiny.tiny_tokenizer(), "compiled")


# -- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_an_attached_model_is_a_model_of_its_own(lm, how):
    plain = logits(lm.model)
    with cv.attach(lm, tiny.random_adapter(lm, (1,), "all")):
        if how == "deepcopy":
            copied = copy.deepcopy(lm.model)
        else:
            file = io.BytesIO()
            torch.save(lm.model, file)
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        changed = logits(lm.model)
        assert torch.equal(logits(copied), plain)
        with torch.no_grad():
            copied.get_output_embeddings().weight.mul_(2.0)
        assert_close(logits(copied), 2 * plain)
        assert torch.equal(logits(lm.model), changed)
        other = cv.wrap_model(copied, lm.tokenizer, lm.id)
        assert cv.attached(other) == ()
        assert foreign_hooks(other) == []
        out = copied.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(out, copied.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0))


# -- interrupts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["pass", "generate", "profile"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_nothing(lm, where, error):
    def fail(*_):
        raise error

    run = {
        "pass": lambda: logits(lm.model),
        "generate": lambda: cv.generate(lm, PROMPTS, max_new_tokens=4),
        "profile": lambda: cv.profile(lm, PROMPTS, cache=False, text=None),
    }[where]
    plain = logits(lm.model)
    with cv.attach(lm, tiny.random_adapter(lm, (0, 1, 2), "all")):
        expected = logits(lm.model)
        handle = lm.blocks[2].register_forward_pre_hook(fail)
        with pytest.raises(error):
            run()
        handle.remove()
        assert torch.equal(logits(lm.model), expected)
        assert not any(block._forward_hooks for block in lm.blocks)
        handle = lm.blocks[2].register_forward_pre_hook(fail)
        with pytest.raises(error):
            run()
        handle.remove()
    assert n_hooks(lm.model) == 0
    assert torch.equal(logits(lm.model), plain)


# -- where the prompt ends ------------------------------------------------------------------------------------------


def test_a_cache_filled_before_attaching_is_refused_unless_told(lm):
    with torch.inference_mode():
        past = lm.model(input_ids=IDS, use_cache=True).past_key_values
        following = {"input_ids": torch.tensor([[30]]), "use_cache": True}
        with cv.attach(lm, tiny.random_adapter(lm, (1,), "g1")), pytest.raises(InputError, match="n_prompt"):
            lm.model(past_key_values=copy.deepcopy(past), **following)
        with cv.attach(lm, tiny.random_adapter(lm, (1,), "g1"), n_prompt=5):
            told = lm.model(past_key_values=copy.deepcopy(past), **following).logits
        with cv.attach(lm, tiny.random_adapter(lm, (1,), "g1")):
            begun = lm.model(input_ids=IDS, use_cache=True).past_key_values
            known = lm.model(past_key_values=copy.deepcopy(begun), **following).logits
    assert_close(told, known)


def test_a_prompt_fed_in_chunks_by_hand_is_refused_unless_told(lm):
    with torch.inference_mode(), cv.attach(lm, tiny.random_adapter(lm)):
        whole = lm.model(input_ids=IDS).logits[:, -1]
        past = lm.model(input_ids=IDS[:, :2], use_cache=True).past_key_values
        with pytest.raises(InputError, match="n_prompt"):
            lm.model(input_ids=IDS[:, 2:], past_key_values=past)
    with torch.inference_mode(), cv.attach(lm, tiny.random_adapter(lm), n_prompt=5):
        past = lm.model(input_ids=IDS[:, :2], use_cache=True).past_key_values
        chunked = lm.model(input_ids=IDS[:, 2:], past_key_values=past).logits[:, -1]
    assert_close(chunked, whole)


def test_going_on_in_a_conversation_all_that_generate_is_given_is_prompt(lm):
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    with cv.attach(lm, tiny.random_adapter(lm, (1,), "l1")):
        first = lm.model.generate(input_ids=IDS, **settings)
    turn = torch.cat([first.sequences, torch.tensor([[40, 41, 42]])], 1)
    with cv.attach(lm, tiny.random_adapter(lm, (2,), "l1+g1")):
        again = lm.model.generate(input_ids=turn, past_key_values=first.past_key_values, **settings).sequences
    with cv.attach(lm, tiny.random_adapter(lm, (1,), "l1")):
        past = lm.model.generate(input_ids=IDS, **settings).past_key_values
    past.crop(-(past.get_seq_length() - turn.shape[1] + 4))
    with cv.attach(lm, tiny.random_adapter(lm, (2,), "l1+g1"), n_prompt=turn.shape[1]), torch.inference_mode():
        out = lm.model(input_ids=turn[:, -4:], past_key_values=past)
    assert int(out.logits[0, -1].argmax()) == int(again[0, turn.shape[1]])
