from __future__ import annotations

import pytest

import commandv as cv
import tiny
from commandv.errors import InputError
from commandv.models.sampling import Sampling
from commandv.serving.engine import Engine
from commandv.serving.talk import COMMANDS, Talk


@pytest.fixture(scope="module")
def engine():
    lm = tiny.tiny_lm(chat=True)
    with Engine(lm, {"pirate": tiny.random_adapter(lm, (1, 2)), "list": tiny.random_adapter(lm, (2,))}) as one:
        yield one


@pytest.fixture
def talk(engine):
    return Talk(engine, max_tokens=5)


def ask(talk, question):
    before, after = (one.text() for one in talk.ask(question))
    talk.heard(question, (before, after))
    return before, after


def test_both_sides_answer_as_the_library_does_each_with_its_own_conversation():
    lm = tiny.tiny_lm(chat=True)
    adapter = tiny.random_adapter(lm, (1, 2))
    expected = []
    for n in (0, 1):
        turns: list[tuple[str, str]] = []
        with cv.attach(lm, adapter, scale=0.5 * n):
            for question in ("Hi", "And then?"):
                turns.append((question, cv.generate(lm, [question], turns=turns, max_new_tokens=5)[0]))
        expected.append([answer for _, answer in turns])
    with Engine(lm, {"pirate": adapter}) as engine:
        talk = Talk(engine, max_tokens=5)
        talk.command("/scale pirate 0.5")
        found = [ask(talk, question) for question in ("Hi", "And then?")]
    assert [list(side) for side in zip(*found, strict=True)] == expected
    assert expected[0] != expected[1]


def test_commands_change_what_the_next_answers_are(talk):
    assert talk.names == ("base", "base+pirate+list")
    talk.command("/off pirate")
    talk.command("/scale list -0.5")
    assert talk.names == ("base", "base+list@-0.5")
    talk.command("/on pirate")
    assert talk.names == ("base", "base+list@-0.5+pirate")
    for line in ("/temperature 0.8", "/top_p 0.9", "/seed 4", "/max 7"):
        talk.command(line)
    assert (talk.sampling, talk.max_tokens) == (Sampling(0.8, 0.9, 4), 7)
    assert all(one.usage in talk.command("/help") for one in COMMANDS.values())
    ask(talk, "Hi")
    talk.command("/reset")
    assert talk.turns == ([], [])


def test_another_system_prompt_changes_the_answers(talk):
    plain = ask(talk, "Hi")
    talk.command("/reset")
    talk.command("/system Be brief")
    assert talk.state().endswith("system: Be brief")
    assert ask(talk, "Hi") != plain


@pytest.mark.parametrize(
    "line",
    ["/", "/sclae pirate 1", "/scale", "/scale pirate", "/scale pirate much", "/scale pirate inf", "/scale 'pirate 1",
     "/scale nobody 1", "/on nobody", "/off", "/temperature hot", "/temperature 9", "/top_p 0", "/seed 1.5", "/max 0"],
)  # fmt: skip
def test_what_a_command_cannot_do_is_said_and_changes_nothing(talk, line):
    before = talk.state()
    with pytest.raises(InputError):
        talk.command(line)
    assert talk.state() == before


def test_a_model_without_system_prompts_keeps_its_own():
    with Engine(tiny.tiny_lm(), {}) as engine:
        talk = Talk(engine)
        with pytest.raises(InputError, match="plain format"):
            talk.command("/system Be brief")
        assert talk.system is None
