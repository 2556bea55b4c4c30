"""Arguments of other types than a public function takes are refused at once, in the same words everywhere."""

from __future__ import annotations

import inspect
import itertools
import json

import numpy as np
import pytest

import commandv as cv
import tiny
from commandv import evaluation, mapping, steering
from commandv.errors import CommandVError, InputError

FACES = (cv, evaluation, mapping, steering)
PUBLIC = {
    f"{face.__name__}.{name}": getattr(face, name) for face in FACES for name in dir(face) if not name.startswith("_")
}
FUNCTIONS = {name: one for name, one in PUBLIC.items() if inspect.isfunction(one)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_looks_at_what_it_is_given(name):
    function = FUNCTIONS[name]
    taken = inspect.signature(function).parameters.values()
    one = [one.name for one in taken if one.default is one.empty or one.name == next(iter(taken)).name][-1]
    with pytest.raises(InputError, match=rf"^{function.__name__}: {one} is a .*, expected "):
        function(**{one: json})  # a module, which none takes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda lm, a: cv.attach("gemma-3-270m", a),
            "attach: lm is a str 'gemma-3-270m', expected LM; load_model opens",
        ),
        (
            lambda lm, a: cv.attach(lm, "pirate/"),
            "adapter is a str 'pirate/', expected Adapter; load_adapter opens one",
        ),
        (lambda lm, a: cv.attach(lm, a, scale="x"), "scale is a str 'x', expected float"),
        (lambda lm, a: cv.attach(lm, a, scale=True), "scale is a bool, expected float"),
        (lambda lm, a: cv.generate(None, ["hi"]), "lm is None, expected LM"),
        (lambda lm, a: cv.generate(lm, "hi"), "prompts is a str 'hi', expected PromptSet or .*; write .text. for one"),
        (lambda lm, a: cv.generate(lm, ["hi", 3]), "prompts is a list, expected PromptSet or Sequence of str"),
        (lambda lm, a: cv.generate(lm, {"hi": 1}), "prompts is a dict"),
        (lambda lm, a: cv.generate(lm, ["hi"], max_new_tokens=2.5), "max_new_tokens is a float 2.5, expected int"),
        (lambda lm, a: cv.generate(lm, ["hi"], max_new_tokens="2"), "max_new_tokens is a str '2', expected int"),
        (lambda lm, a: cv.load_model(3), "id is a int 3, expected str or Path"),
        (lambda lm, a: cv.paste(a, None, None), "donor is None, expected Profile; profile makes one"),
        (lambda lm, a: cv.save(None, "x"), "adapter is None, expected Adapter"),
        (lambda lm, a: cv.save(a, None), "path is None, expected str or Path"),
        (lambda lm, a: cv.Ridge(strength="1"), "Ridge: strength is a str '1', expected float or None"),
        (lambda lm, a: cv.TrainSettings(epochs=None), "TrainSettings: epochs is None, expected int"),
        (lambda lm, a: cv.DiReFT(rank="8"), "rank is a str '8', expected int"),
        (lambda lm, a: cv.PromptSet(("a", "b")), "PromptSet: prompts is a tuple, expected tuple of Prompt"),
        (lambda lm, a: cv.Positions(last=True), "last is a bool, expected int"),
        (
            lambda lm, a: cv.Adapter({"3": ()}, lm.ref),
            "interventions is a dict, expected Mapping of int, tuple of Edit",
        ),
    ],
)
def test_what_it_is_and_what_was_expected_and_where_to_get_one(call, message, lm):
    with pytest.raises(InputError, match=message):
        call(lm, tiny.random_adapter(lm, (1,)))


def test_numbers_of_numpy_and_lists_of_any_make_are_as_good(lm):
    adapter = tiny.random_adapter(lm, (1,))
    with cv.attach(lm, adapter, scale=np.float32(0.5)):
        one = cv.generate(lm, (text for text in ("hi", "tea")), max_new_tokens=np.int64(2))
    with cv.attach(lm, adapter, scale=0.5):
        assert one == cv.generate(lm, ("hi", "tea"), max_new_tokens=2)
    assert list(cv.PromptSet([cv.Prompt("hi")])) == [cv.Prompt("hi")]


def test_what_python_refuses_stays_a_type_error(lm):
    with pytest.raises(TypeError, match="max_tokens"):
        cv.generate(lm, ["hi"], max_tokens=3)
    with pytest.raises(TypeError):
        cv.attach(lm)


def test_what_may_be_read_once_only_is_not_read_by_looking(lm):
    endless = itertools.repeat(1)
    with pytest.raises(InputError, match="last is a repeat"):
        cv.Positions(last=endless)
    assert next(endless) == 1


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 3000, "a\0b", "\udcff"], ids=["long", "deep", "NUL", "no UTF-8"])
@pytest.mark.parametrize(
    "load",
    [
        cv.load_model, cv.load_adapter, cv.load_profile, cv.load_demonstrations, cv.load_prompts, cv.load_contrast,
        evaluation.load_splits, evaluation.load_questions, evaluation.tasks_of,
        evaluation.load_task, evaluation.load_judge,
        lambda name: evaluation.load_task(f"exact:{name}"), lambda name: evaluation.expecting(file=name),
        lambda name: cv.load_model(f"{name}.gguf"), lambda name: cv.load_adapter(f"{name}.safetensors"),
        lambda name: cv.load_prompts(f"{name}.jsonl"),
    ],
)  # fmt: skip
def test_names_that_the_system_takes_for_no_path(load, name):
    with pytest.raises(CommandVError):
        load(name)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"], ids=["long", "NUL"])
def test_places_that_the_system_takes_for_no_path(name, lm, tmp_path):
    profile = cv.profile(lm, ["a", "b"], text=None, cache=False)
    for write in (
        lambda place: cv.save(tiny.random_adapter(lm, (1,)), place),
        lambda place: cv.save_profile(profile, place),
        lambda place: cv.profile(lm, ["a", "b"], text=None, cache=place),
    ):
        with pytest.raises(CommandVError):
            write(tmp_path / name)


@pytest.mark.parametrize("limit", [0, -1])
def test_the_first_so_many_prompts_are_one_or_more(limit, lm):
    task = cv.Task("t", cv.PromptSet((cv.Prompt("a"),)), cv.PromptSet((cv.Prompt("b"),)), evaluation.ByText("x", bool))
    with pytest.raises(InputError, match=f"limit={limit}: expected 1 or more"):
        cv.measure(lm, task, limit=limit)
