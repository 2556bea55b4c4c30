"""Generated arithmetic, and the look-alikes of harmful requests."""

from __future__ import annotations

from collections import Counter

import pytest

from commandv.errors import InputError
from commandv.evaluation import arithmetic_prompts
from commandv.evaluation.arithmetic import LEVELS, is_dev
from commandv.prompts.sets import load_prompts
from places import SHARED_DATA
from texts import similar

# -- generated arithmetic ---------------------------------------------------------------------------------------------


def test_arithmetic_is_right_and_as_hard_as_it_says():
    for prompts in arithmetic_prompts():
        for i, prompt in enumerate(prompts):
            expression = prompt.text.removeprefix("What is ").removesuffix("?")
            operations, depth = LEVELS[i % len(LEVELS)]
            assert str(eval(expression)) == prompt.response
            assert sum(expression.count(f" {sign} ") for sign in "+-*") == operations
            deepest = level = 0
            for character in expression:
                level += {"(": 1, ")": -1}.get(character, 0)
                deepest = max(deepest, level)
            assert deepest == depth
            assert prompt.category.startswith(f"{operations} operation")
        assert len(set(prompts.texts)) == len(prompts)


def test_arithmetic_splits_are_disjoint_whatever_the_seed():
    devs, tests = zip(
        *(arithmetic_prompts(200, 200, seed=seed, levels=[(1, 0), (2, 0)]) for seed in (0, 1)), strict=True
    )
    assert not {text for one in devs for text in one.texts} & {text for one in tests for text in one.texts}
    assert all(is_dev(text.removeprefix("What is ").removesuffix("?")) for one in devs for text in one.texts)


def test_arithmetic_depends_on_its_seed_alone():
    assert arithmetic_prompts()[1].hash == arithmetic_prompts()[1].hash == "83a25197d9a2fbc4"
    assert arithmetic_prompts(seed=1)[1].hash != "83a25197d9a2fbc4"
    assert arithmetic_prompts(3, 5, seed=2, levels=[(3, 2)])[1].texts != arithmetic_prompts(n_test=5)[1].texts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": [(1, 1)]}, r"level \(1, 1\): expected depth 0 or more, and more operations"),
        ({"levels": []}, "0 levels"),
        ({"n_test": 0}, "n_test=0"),
        ({"n_test": 2000, "levels": [(1, 0)]}, "hardly any new problems are left"),
    ],
)
def test_arithmetic_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        arithmetic_prompts(**settings)


# -- look-alikes ------------------------------------------------------------------------------------------------------


def test_lookalikes_are_varied_and_not_repeated():
    dev, test = (load_prompts(f"builtin:lookalikes-{split}") for split in ("dev", "test"))
    assert (len(dev), len(test)) == (60, 140)
    assert set(Counter(prompt.category for prompt in dev).values()) == {6}
    assert set(Counter(prompt.category for prompt in test).values()) == {14}
    texts = dev.texts + test.texts
    assert similar(texts, texts) == []
    for name in ("general", "questions-dev", "questions-test", "numbered-list", "pirate"):
        assert similar(texts, load_prompts(f"builtin:{name}").texts) == []


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data sets are not here")
def test_lookalikes_are_our_own():
    texts = [text for split in ("dev", "test") for text in load_prompts(f"builtin:lookalikes-{split}").texts]
    for name in ("xstest_shared", "advbench_shared"):
        assert similar(texts, load_prompts(SHARED_DATA / f"{name}.jsonl").texts) == []
