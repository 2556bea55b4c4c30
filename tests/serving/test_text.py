from __future__ import annotations

import pytest
from hypothesis import example, given, settings, strategies as st

import tiny
from commandv.serving.logprobs import Told
from commandv.serving.text import Transcript

TOKENIZER = tiny.tiny_tokenizer()


def said(text, stops=(), strip=False):
    """The pieces of a text that comes token by token, and the transcript."""
    transcript = Transcript(TOKENIZER, stops, strip)
    pieces = []
    for place, token in enumerate(TOKENIZER(text, add_special_tokens=False).input_ids):
        transcript.add(token, Told(place, -1.0, ()))
        if transcript.stopped:
            break
        pieces.append(transcript.take())
    return [*pieces, transcript.end()], transcript


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_pieces_add_up_to_what_the_tokens_decode_to(text):
    pieces, _ = said(text)
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert "".join(one for one, _ in pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert [told.token for _, many in pieces for told in many] == list(range(len(ids)))


@example("aca", ["c", "aca"])
@given(st.text("abc \n", max_size=30), st.lists(st.text("abc \n", min_size=1, max_size=4), max_size=3))
@settings(max_examples=100, deadline=None)
def test_nothing_of_a_stop_string_is_ever_sent(text, stops):
    pieces, transcript = said(text, stops)
    complete = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert "".join(one for one, _ in pieces) == text[: min(complete)[1] if complete else len(text)]
    assert transcript.stopped == bool(complete)


@given(st.text("ab \n", max_size=20))
@settings(max_examples=60, deadline=None)
def test_a_plain_answer_has_no_white_space_around_it(text):
    pieces, _ = said(text, ("\nb",), strip=True)
    assert "".join(one for one, _ in pieces) == text.split("\nb")[0].strip()


@pytest.mark.parametrize("text", ["café — naïve", "日本語のテキスト", "🧉🏴‍☠️ ahoy"])
def test_characters_of_several_tokens_are_sent_whole(text):
    pieces, _ = said(text)
    assert "".join(one for one, _ in pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in one for one, _ in pieces)


def test_half_a_character_at_the_end_is_sent_as_it_decodes():
    ids = TOKENIZER("tea 🧉", add_special_tokens=False).input_ids[:-1]
    transcript = Transcript(TOKENIZER, (), strip=False)
    for token in ids:
        transcript.add(token)
    assert transcript.take()[0] + transcript.end()[0] == TOKENIZER.decode(ids)


def test_a_first_sent_text_waits_while_a_stop_string_may_have_begun():
    transcript = Transcript(TOKENIZER, ("STOP",), strip=False)
    for token in TOKENIZER("go ST", add_special_tokens=False).input_ids:
        transcript.add(token)
    assert transcript.take()[0] == "go "
    for token in TOKENIZER("ART", add_special_tokens=False).input_ids:
        transcript.add(token)
    assert transcript.take()[0] == "START"
