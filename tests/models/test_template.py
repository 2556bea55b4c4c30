"""Prompts as templates make them: system prompts, options, dates, ends of turns, and templates that refuse."""

from __future__ import annotations

import datetime

import pytest
import torch

import commandv as cv
import tiny
from commandv.errors import InputError, ModelError
from commandv.models.encoding import encode, encode_conversation, format_prompt, opening
from commandv.models.generation import greedy
from commandv.models.lm import ChatFormat
from commandv.models.template import default_system, end_of_turn, stop_tokens
from commandv.training.examples import Example
from profiled import PROMPTS

SWITCH = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}<|assistant|>\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>\n{% endif %}"
)
DEFAULT = "{% if messages[0].role != 'system' %}<|system|>Be kind.<eos>\n{% endif %}" + SWITCH
SILENT = "{% for m in messages if m.role != 'system' %}{{ m.content }}\n{% endfor %}>"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + SWITCH


def chat(template, **options) -> cv.LM:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = template
    return cv.wrap_model(tiny.tiny_model(), tokenizer, "tiny", **options)


# -- system prompt and options ----------------------------------------------------------------------------------------


def test_system_prompt_and_options_are_in_every_prompt():
    lm = chat(SWITCH, system="Be brief.", template_options={"enable_thinking": False})
    assert format_prompt(lm, "Hi") == "<|system|>Be brief.<eos>\n<|user|>Hi<eos>\n<|assistant|>\n<think></think>\n"
    text = lm.tokenizer.decode(encode(lm, "Hi", "Yes").ids)
    assert text == "<bos>" + format_prompt(lm, "Hi") + "Yes"
    other = cv.wrap_like(lm, tiny.tiny_model(seed=1), "other")
    assert format_prompt(other, "Hi") == format_prompt(lm, "Hi")


def test_a_conversation_with_a_system_message_of_its_own_keeps_it():
    lm = chat(SWITCH, system="Be brief.")
    turns = [{"role": "system", "content": "Be wise."}, {"role": "user", "content": "Hi"}]
    assert "wise" in lm.tokenizer.decode(encode_conversation(lm, turns))
    assert "brief" not in lm.tokenizer.decode(encode_conversation(lm, turns))
    assert "brief" in lm.tokenizer.decode(encode_conversation(lm, turns[1:]))


def test_they_are_kept_with_what_was_made():
    plain = chat(SWITCH)
    lm = chat(SWITCH, system="Be brief.", template_options={"enable_thinking": False})
    assert lm.ref.format == '{"options": {"enable_thinking": false}, "system": "Be brief."}'
    assert plain.ref.format == ""
    one, other = cv.profile(plain, PROMPTS, text=None), cv.profile(lm, PROMPTS, text=None)
    assert one.path != other.path
    assert cv.load_profile(other.path).model.format == lm.ref.format
    pasted = cv.paste(tiny.random_adapter(plain), other, one, layers="all_layers")
    assert pasted.provenance["donor"]["format"] == lm.ref.format
    cv.attach(lm, pasted).detach()


@pytest.mark.parametrize(
    ("template", "given", "message"),
    [
        (SWITCH, {"template_options": {"enable_thinkin": 1}}, r"\['enable_thinkin'\].*knows enable_thinking"),
        (SWITCH, {"template_options": {"messages": 1}}, "'messages': expected the name of one of"),
        (SWITCH, {"template_options": {"enable_thinking": object()}}, "expected plain values"),
        (SILENT, {"system": "Be brief."}, "leaves the system prompt out"),
        (STRICT, {"system": "Be brief."}, "System role not supported"),
        (None, {"system": "Be brief."}, "plain format, which has no system prompt"),
    ],
)
def test_what_a_template_does_not_take_is_refused_at_once(template, given, message):
    with pytest.raises(InputError, match=message):
        chat(template, **given)


@pytest.mark.parametrize(("template", "found"), [(DEFAULT, "Be kind."), (SWITCH, None), (SILENT, None)])
def test_the_default_system_prompt(template, found):
    assert default_system(chat(template)) == found


# -- templates that refuse or change ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('needs a system message') }}", "refuses messages of roles user: needs a system message"),
        ("{% for m in messages %}{{ m.content }", "unexpected '}'"),
        ({"rag": "{{ messages }}", "tool_use": "x"}, "multiple chat templates with no default"),
        ("{{ 1 // 0 }}", "by zero"),
    ],
)
def test_a_template_that_raises_is_an_error_of_ours(template, message):
    lm = chat(template)
    with pytest.raises(InputError, match=message):
        cv.generate(lm, PROMPTS[:1], max_new_tokens=1)


def test_a_loaded_model_has_one_date_and_another_day_is_another_profile(caplog):
    dated = "{% if strftime_now is defined %}Today is {{ strftime_now('%d %b %Y, %H:%M') }}.\n{% endif %}" + SWITCH
    lm = chat(dated)
    assert "the chat template of tiny writes the date" in caplog.text
    one = cv.profile(lm, PROMPTS, text=None)
    assert format_prompt(lm, "Hi").startswith(lm.format.date.strftime("Today is %d %b %Y, %H:%M.\n<|user|>"))
    assert cv.profile(lm, PROMPTS, text=None).path == one.path
    later = cv.LM(**{**vars(lm), "format": ChatFormat(date=datetime.datetime(2030, 2, 3, 4, 5))})
    assert format_prompt(later, "Hi").startswith("Today is 03 Feb 2030, 04:05.\n<|user|>Hi")
    assert cv.profile(later, PROMPTS, text=None).path != one.path


# -- tokens on which all parts agree ----------------------------------------------------------------------------------


def test_a_reply_ends_where_generation_stops():
    lm = chat(SWITCH.replace("<eos>", "<pad>"))  # a turn ends with another token than a text
    pad, eos = lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id
    lm.model.generation_config.eos_token_id = [7, eos]
    assert end_of_turn(lm) == pad
    assert stop_tokens(lm) == [pad, eos, 7]
    for none in (2**63, 2**31, "7", 7.5, [[7]]):
        lm.model.generation_config.eos_token_id = none
        with pytest.raises(ModelError, match="expected numbers of tokens"):
            stop_tokens(lm)
    lm.model.generation_config.eos_token_id = [7, eos]
    assert Example.of(lm, "Hi", "Yes", 9).response[-1] == pad
    assert greedy(lm, 4).eos_token_id == [pad, eos, 7]
    plain = tiny.tiny_lm()
    plain.model.generation_config.eos_token_id = 7
    assert (end_of_turn(plain), stop_tokens(plain)) == (eos, [eos, 7])


def test_the_end_of_a_turn_is_not_in_the_answer():
    lm = tiny.tiny_lm()
    first = encode(lm, PROMPTS[0]).ids
    said = lm.model.generate(torch.tensor([first]), do_sample=False, max_new_tokens=4, pad_token_id=0)[0, len(first) :]
    lm.model.generation_config.eos_token_id = int(said[-1])  # a token that is no special one
    kept = said[: said.tolist().index(said[-1])]
    assert cv.generate(lm, PROMPTS[:1], max_new_tokens=6) == [lm.tokenizer.decode(kept).strip()]


def test_a_date_that_an_option_fixes_is_no_date(caplog):
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    lm = chat(dated + "Today is {{ date_string }}.\n" + SWITCH)
    assert "template_options={'date_string': ...} fixes it" in caplog.text
    caplog.clear()
    fixed = cv.wrap_model(lm.model, lm.tokenizer, lm.id, template_options={"date_string": "1 May 2024"})
    assert format_prompt(fixed, "Hi").startswith("Today is 1 May 2024.\n<|user|>Hi")
    assert not caplog.text


@pytest.mark.parametrize("reply", ["Boil", " Boil", "\nBoil", "\n\nBoil", "\tBoil", "  Boil"])
@pytest.mark.parametrize("is_chat", [True, False])
def test_a_reply_leaves_its_prompt_the_tokens_of_generation(reply, is_chat):
    lm = tiny.tiny_lm(chat=is_chat, vocab=600)
    _merge_line_breaks(lm)
    asked, both = encode(lm, "How?"), encode(lm, "How?", reply)
    assert both.ids[: both.n_prompt] == asked.ids
    assert lm.tokenizer.decode(both.ids[both.n_prompt :]) == reply
    assert both.text_ends[-1] == len(reply)
    assert set(both.text_ends[: both.n_prompt]) == {-1}


def _merge_line_breaks(lm):
    """Give the tokenizer a token for two line breaks."""
    lm.tokenizer.add_tokens(["\n\n"])
    lm.model.resize_token_embeddings(max(600, len(lm.tokenizer)))
    assert len(lm.tokenizer("\n\n", add_special_tokens=False).input_ids) == 1


def test_padding_needs_no_embedding_of_its_own():
    tokenizer = tiny.tiny_tokenizer()
    small = len(tokenizer)
    expected = cv.generate(
        cv.wrap_model(tiny.tiny_model(vocab_size=small), tiny.tiny_tokenizer(), "a"), PROMPTS, max_new_tokens=4
    )
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    lm = cv.wrap_model(tiny.tiny_model(vocab_size=small), tokenizer, "a")
    assert tokenizer.pad_token_id == small
    assert cv.generate(lm, PROMPTS, max_new_tokens=4) == expected
    for padding in ("left", "right"):
        made = cv.profile(lm, PROMPTS, cache=False, padding=padding, text=None)
        assert torch.isfinite(made.layer(3)).all()
    with pytest.raises(InputError, match=rf"makes token {small} \('\[PAD\]'\).*embeddings for {small} tokens"):
        cv.generate(lm, ["Say [PAD]."], max_new_tokens=1)


def test_a_beginning_of_several_tokens_is_kept_and_not_doubled():
    from tokenizers import processors

    lm = tiny.tiny_lm()
    two = processors.TemplateProcessing(
        single="<bos> <pad> $A <eos>", special_tokens=[("<bos>", 1), ("<pad>", 0), ("<eos>", 2)]
    )
    lm.tokenizer.backend_tokenizer.post_processor = two
    assert opening(lm) == [1, 0]
    assert encode(lm, "Hi").ids[:3] != [1, 0, 1]
    assert encode(lm, "Hi").ids[:2] == [1, 0]
    assert encode(lm, "Hi").ids[-1] != 2


@pytest.mark.parametrize("ends", ["</s>", [2, "</s>"], 2.0, [[2]]])
def test_ends_that_are_no_tokens_are_told(ends):
    lm = tiny.tiny_lm()
    lm.model.generation_config.eos_token_id = ends
    with pytest.raises(ModelError, match="expected numbers of tokens"):
        cv.generate(lm, ["tea?"], max_new_tokens=2)


def test_what_makes_no_token_or_is_no_text_is_refused():
    empty = chat("{# nothing #}")
    empty.tokenizer.backend_tokenizer.post_processor = None  # no beginning of its own either
    with pytest.raises(InputError, match="makes no token"):
        encode(empty, "Hello")
    with pytest.raises(InputError, match="half of a surrogate pair"):
        encode_conversation(chat(SWITCH), [{"role": "user", "content": "\ud83d"}])
