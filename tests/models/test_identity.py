"""What a model is: which edits make another one of it, and what leaves it the same."""

from __future__ import annotations

import logging

import peft
import pytest
import torch

import commandv as cv
import tiny
from commandv.errors import InputError, MismatchError
from commandv.models.identity import ModelRef, weights_hash
from commandv.models.state import identity
from profiled import PROMPTS, same

EDITS = {
    "one value": lambda model: model.model.layers[2].mlp.down_proj.weight[5, 7].add_(1.0),
    "through .data": lambda model: model.model.layers[0].self_attn.q_proj.weight.data.mul_(1.5),
    "through numpy": lambda model: model.lm_head.weight.detach().numpy().__setitem__((3, 3), 2.0),
    "smaller than bfloat16 tells": lambda model: model.model.norm.weight[0].add_(1e-6),
    "replaced": lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight * 2)),
    "configuration": lambda model: setattr(model.config, "rms_norm_eps", 0.5),
}


@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_makes_another_model(edit):
    lm = tiny.tiny_lm()
    before = identity(lm)
    assert identity(lm) == before == identity(tiny.tiny_lm())
    with torch.no_grad():
        EDITS[edit](lm.model)
    assert identity(lm).key != before.key


def test_dtype_template_and_tokenizer_are_part_of_it():
    made = [
        tiny.tiny_lm(),
        tiny.tiny_lm(dtype=torch.bfloat16),
        tiny.tiny_lm(chat=True),
        tiny.tiny_lm(chat=True, system="Be brief."),
        tiny.tiny_lm(bos=False),
        tiny.tiny_lm(vocab=300),
    ]
    assert len({identity(lm).key for lm in made}) == len(made)
    lm = tiny.tiny_lm()
    lm.tokenizer.bos_token = "<eos>"
    assert identity(lm).key != identity(tiny.tiny_lm()).key


def test_an_edited_model_is_not_given_the_profile_of_the_other():
    lm = tiny.tiny_lm()
    old = cv.profile(lm, PROMPTS, text=None)
    lm.model.model.layers[0].mlp.down_proj.weight.data.zero_()
    new = cv.profile(lm, PROMPTS, text=None)
    assert new.path != old.path
    same(new, cv.profile(lm, PROMPTS, cache=False, text=None))


def test_a_template_changed_in_memory_makes_another_profile():
    lm = tiny.tiny_lm(chat=True)
    old = cv.profile(lm, PROMPTS, text=None)
    lm.tokenizer.chat_template = lm.tokenizer.chat_template.replace("<|", "[")
    new = cv.profile(lm, PROMPTS, text=None)
    assert new.path != old.path
    same(new, cv.profile(lm, PROMPTS, cache=False, text=None))


def test_a_changed_tokenizer_file_makes_another_profile(tmp_path):
    lm = tiny.tiny_lm()
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    old = cv.profile(cv.load_model(tmp_path, dtype="float32"), PROMPTS, text=None)
    lm.tokenizer.bos_token = "<eos>"
    lm.tokenizer.save_pretrained(tmp_path)
    changed = cv.load_model(tmp_path, dtype="float32")
    assert changed.tokenizer.bos_token == "<eos>"
    assert cv.profile(changed, PROMPTS, text=None).path != old.path


# -- the same model, in other clothes ---------------------------------------------------------------------------------


def _lora(*, learned: bool):
    config = peft.LoraConfig(task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        model = peft.get_peft_model(tiny.tiny_model(), config)
        if learned:
            for name, one in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(one)
    return cv.wrap_model(model, tiny.tiny_tokenizer(), "wrapped")


def test_the_same_weights_are_accepted_under_any_name(tmp_path):
    lm = tiny.tiny_lm()
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    adapter = tiny.random_adapter(lm)
    others = [
        cv.load_model(tmp_path, dtype="float32"),
        cv.load_model(tmp_path, dtype="bfloat16"),
        cv.wrap_model(tiny.tiny_model().to(torch.bfloat16), tiny.tiny_tokenizer(), "other"),
        _lora(learned=False),
    ]
    for other in others:
        cv.attach(other, adapter).detach()


def test_other_weights_are_refused_and_the_remedy_is_named():
    adapter = tiny.random_adapter(tiny.tiny_lm(id="org/model"))
    for other in (tiny.tiny_lm(id="org/model", seed=1), _lora(learned=True)):
        with pytest.raises(MismatchError, match=r"weights.*same_as='org/model'\), or --same-as"):
            cv.attach(other, adapter)


def test_one_can_say_that_it_is_the_same_model():
    lm = tiny.tiny_lm(id="org/model")
    adapter, donor = tiny.random_adapter(lm), cv.profile(lm, PROMPTS, text=None)
    other = tiny.tiny_model(seed=1)
    said = cv.wrap_model(other, tiny.tiny_tokenizer(), "/models/copy", same_as="org/model")
    cv.attach(said, adapter).detach()
    recipient = cv.profile(said, PROMPTS, text=None)
    assert recipient.path != donor.path
    same(recipient, cv.profile(said, PROMPTS, cache=False, text=None))
    cv.paste(adapter, recipient, donor, layers="all_layers")
    wrong = cv.wrap_model(tiny.tiny_model(num_hidden_layers=3), tiny.tiny_tokenizer(), "copy", same_as="org/model")
    with pytest.raises(MismatchError, match="another depth"):
        cv.attach(wrong, adapter)


def test_an_adapter_that_only_names_its_model_fits_a_local_copy_of_that_name():
    named = cv.Adapter({0: cv.steering_vector(torch.ones(tiny.D))}, ModelRef(id="meta/Tiny-1", d_model=tiny.D))
    cv.attach(tiny.tiny_lm(id="/models/tiny-1/"), named).detach()
    with pytest.raises(MismatchError, match=r"made for meta/Tiny-1, got /models/x; .*same_as='meta/Tiny-1'"):
        cv.attach(tiny.tiny_lm(id="/models/x"), named)


def test_float16_is_told_apart_from_other_float16_and_goes_by_name_else():
    half, other = (tiny.tiny_lm(seed=seed, dtype=torch.float16) for seed in (0, 1))
    assert weights_hash(half.model) != weights_hash(other.model)
    cv.attach(half, tiny.random_adapter(tiny.tiny_lm())).detach()
    with pytest.raises(MismatchError, match="weights"):
        cv.attach(other, tiny.random_adapter(half))


# -- what nobody can vouch for ----------------------------------------------------------------------------------------


def _push(_module, _inputs, output):
    return (output[0] + 5, *output[1:]) if isinstance(output, tuple) else output + 5


def test_hooks_of_others_keep_a_profile_out_of_the_cache(tmp_path, caplog):
    lm = tiny.tiny_lm()
    handle = lm.blocks[0].register_forward_hook(_push)
    changed = cv.profile(lm, PROMPTS, text=None)
    assert changed.path is None
    assert "not cached: hooks that others" in caplog.text
    with pytest.raises(InputError, match="cannot be kept as the model's own: hooks"):
        cv.profile(lm, PROMPTS, cache=tmp_path / "mine", text=None)
    handle.remove()
    own = cv.profile(lm, PROMPTS, text=None)
    same(own, cv.profile(tiny.tiny_lm(), PROMPTS, cache=False, text=None))
    assert not torch.equal(own.layer(1), changed.layer(1))


def test_a_replaced_forward_is_a_doubt():
    lm = tiny.tiny_lm()
    assert identity(lm).doubts == ()
    lm.blocks[1].forward = lm.blocks[1].forward
    assert "model.layers.1 has been replaced" in identity(lm).doubts[0]


def test_dropout_is_off_whatever_mode_the_model_is_in():
    lm = tiny.tiny_lm("gpt2")
    own, said = cv.profile(lm, PROMPTS, cache=False, text=None), cv.generate(lm, PROMPTS[:2], max_new_tokens=5)
    lm.model.train()
    same(cv.profile(lm, PROMPTS, text=None), own)
    assert [cv.generate(lm, PROMPTS[:2], max_new_tokens=5) for _ in range(3)] == [said] * 3
    assert all(module.training for module in lm.model.modules())


@pytest.mark.parametrize("verb", ["train", "steer", "measure"])
def test_verbs_refuse_a_model_with_an_adapter_and_say_that_hooks_take_part(verb, caplog):
    lm = tiny.tiny_lm()
    settings = cv.TrainSettings(epochs=1, max_response=2, held_out=0)
    examples = cv.load_prompts("builtin:numbered-list")[:2]
    run = {
        "train": lambda: cv.train(lm, examples, cv.DiReFT(rank=1), settings),
        "steer": lambda: cv.steer(lm, cv.load_contrast("builtin:sentiment")),
        "measure": lambda: cv.measure(lm, cv.evaluation.load_task("numbered-list"), limit=1),
    }[verb]
    with cv.attach(lm, tiny.random_adapter(lm)), pytest.raises(InputError, match="is attached to tiny-llama; detach"):
        run()
    lm.blocks[0].register_forward_hook(_push)
    with caplog.at_level(logging.WARNING):
        run()
    assert "hooks that others have put on it" in caplog.text
