"""Sentiment and formality: the word lists on known and on labelled texts, the contrasts, the prompts, the tasks."""

from __future__ import annotations

import json
import statistics
from collections import Counter

import pytest

from commandv.errors import InputError
from commandv.evaluation import load_task
from commandv.evaluation.tone import LEXICONS, Lexicon, formal, load_lexicon, positive_sentiment
from commandv.prompts.sets import builtin_names, load_prompts
from commandv.steering import load_contrast
from places import SHARED_DATA
from texts import similar, words

REVIEWS = SHARED_DATA / "sentiment_rt.jsonl"


def judged(lexicon, texts, sign):
    """(share of the texts with evidence, share of those whose balance has the sign)"""
    found = [balance for text in texts if (balance := lexicon.balance(text))]
    return len(found) / len(texts), sum(balance * sign > 0 for balance in found) / len(found)


# -- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("A delightful film with a dull ending.", (1, 1)),
        ("I LOVED it, and the cast was superb", (2, 0)),
        ("It was not good.", (0, 1)),
        ("It isn't a good film, it isn’t bad either", (1, 1)),
        ("never once dull", (1, 0)),
        ("This is not the very best of them", (1, 0)),  # three words away
        ("Not only good but great", (2, 0)),
        ("No, good idea. Not here! Lovely", (2, 0)),  # other clauses
        ("nothing pleasant, hardly a joy", (0, 2)),
        ("The badger sat in a goodly saddle, bored by the border", (0, 1)),  # whole words
        ("The train leaves at ten.", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_sentiment_on_known_texts(text, counts):
    lexicon = load_lexicon("sentiment")
    assert lexicon.counts(text) == counts
    assert positive_sentiment(text) is (counts[0] > counts[1])


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("I am writing to inform you that the meeting will not take place.", (3, 0)),
        ("Hey, it's on! Don't be late :)", (0, 5)),
        ("It’s fine, they’ll wait", (0, 2)),
        ("We would be grateful for your\nassistance.", (2, 0)),
        ("I do not reckon so", (1, 1)),  # negations turn nothing round here
        ("Peter's hat is on Peter's head", (0, 0)),  # possessives are no contractions
        ("The heyday of shells", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_formality_on_known_texts(text, counts):
    lexicon = load_lexicon("formality")
    assert lexicon.counts(text) == counts
    assert formal(text) is (counts[0] > counts[1])


def test_balance():
    lexicon = Lexicon("tea", ("hot", "strong*", "two sugars"), ("cold",))
    assert lexicon.balance("hot, strongest, with two  sugars, then cold") == 0.5
    assert lexicon.balance("hot and cold") == lexicon.balance("tea") == 0
    assert lexicon.balance("cold") == -1
    assert lexicon.balance("hot hot hot hot hot") == 0  # collapsed


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        ((), ("cold",), "0 entries for and 1 against it"),
        (("hot", ""), ("cold",), "none empty"),
        (("hot", "mild"), ("mild",), r"on both sides \['mild'\]"),
    ],
)
def test_lexicons_that_cannot_be(positive, negative, message):
    with pytest.raises(InputError, match=f"lexicon tea: .*{message}"):
        Lexicon("tea", positive, negative)


def test_an_unknown_lexicon():
    with pytest.raises(InputError, match="lexicon 'rhyme': expected one of sentiment, formality"):
        load_lexicon("rhyme")


@pytest.mark.parametrize("name", LEXICONS)
def test_no_entry_is_shadowed_by_another(name):
    """An entry that a shorter one with a star covers would be dead weight, one on the other side a contradiction."""
    lexicon = load_lexicon(name)
    entries = [*lexicon.positive, *lexicon.negative]
    stems = {entry[:-1] for entry in entries if entry.endswith("*")}
    covered = [one for one in entries if any(one.rstrip("*").startswith(stem) for stem in stems - {one.rstrip("*")})]
    assert covered == []
    assert min(len(lexicon.positive), len(lexicon.negative)) >= 150


# -- against labelled texts -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REVIEWS.is_file(), reason=f"the labelled reviews are not here: {REVIEWS.name}")
def test_sentiment_agrees_with_labelled_reviews():
    """Chance is .50; reviews that concede before they damn are the limit."""
    rows = [json.loads(line) for line in REVIEWS.read_text("utf-8").splitlines()]
    for label, sign in (("positive", 1), ("negative", -1)):
        coverage, accuracy = judged(load_lexicon("sentiment"), [r["text"] for r in rows if r["label"] == label], sign)
        assert coverage > 0.45
        assert accuracy > 0.6


def test_formality_agrees_with_texts_of_either_register():
    """The built-in texts of these categories were written for profiles, apart from the list."""
    for category, sign in (("formal", 1), ("informal", -1)):
        texts = [p.response or p.text for p in load_prompts("builtin:text") if p.category == category]
        coverage, accuracy = judged(load_lexicon("formality"), texts, sign)
        assert (len(texts) >= 18, coverage > 0.9, accuracy > 0.8) == (True, True, True)


@pytest.mark.parametrize(("name", "coverage", "accuracy"), [("sentiment", 0.3, 0.75), ("formality", 0.6, 0.95)])
def test_the_lists_tell_the_contrasts_apart_without_being_made_of_them(name, coverage, accuracy):
    contrast = load_contrast(f"builtin:{name}")
    for side, sign in ((contrast.positive, 1), (contrast.negative, -1)):
        found = judged(load_lexicon(name), side.texts, sign)
        assert found[0] > coverage
        assert found[1] > accuracy
        assert found[0] < 0.95  # a list that knew every text would have been made of them


# -- contrasts and prompts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size", "fewest", "most"), [("sentiment", 256, 10, 25), ("formality", 192, 5, 24)])
def test_contrasts_are_varied_and_the_sides_alike_in_length(name, size, fewest, most):
    contrast = load_contrast(f"builtin:{name}")
    sides = (contrast.positive.texts, contrast.negative.texts)
    assert contrast.paired
    assert [len(side) for side in sides] == [size, size]
    lengths = [[len(text.split()) for text in side] for side in sides]
    assert fewest <= min(map(min, lengths))
    assert max(map(max, lengths)) <= most
    assert abs(statistics.mean(lengths[0]) - statistics.mean(lengths[1])) < 0.5
    texts = sides[0] + sides[1]
    assert [pair for pair in similar(texts, texts) if pair not in set(zip(*sides, strict=True))] == []
    overlaps = [len(words(a) & words(b)) / len(words(a) | words(b)) for a, b in zip(*sides, strict=True)]
    assert statistics.median(overlaps) < 0.25  # phrased anew, not words swapped


@pytest.mark.skipif(not REVIEWS.is_file(), reason=f"the labelled reviews are not here: {REVIEWS.name}")
def test_the_sentiment_contrast_is_our_own():
    contrast = load_contrast("builtin:sentiment")
    reviews = [json.loads(line)["text"] for line in REVIEWS.read_text("utf-8").splitlines()]
    assert similar(contrast.positive.texts + contrast.negative.texts, reviews) == []


def test_openings_are_neutral_and_found_nowhere_else():
    dev, test = (load_prompts(f"builtin:openings-{split}") for split in ("dev", "test"))
    assert Counter(prompt.category for prompt in dev) == {"opinion": 16, "message": 16}
    assert Counter(prompt.category for prompt in test) == {"opinion": 48, "message": 48}
    texts = dev.texts + test.texts
    assert similar(texts, texts) == []
    others = [name for name in builtin_names("prompts", "behaviours") if not name.startswith("openings")]
    contrasts = [load_contrast(f"builtin:{name}") for name in LEXICONS]
    for more in (*(load_prompts(f"builtin:{name}") for name in others), *(c.positive for c in contrasts)):
        assert similar(texts, more.texts) == []
    assert [text for name in LEXICONS for text in texts if load_lexicon(name).counts(text) != (0, 0)] == []


# -- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [
        ("sentiment", "What a lovely, peaceful hotel.", "The hotel was dirty and rude."),
        ("formality", "I am writing to inform you of it.", "Hey, just so you know, it's on!"),
    ],
)
def test_damage_and_silence_count_against_the_adapter(name, yes, no):
    task = load_task(name)
    assert (len(task.dev), len(task.test), task.max_new_tokens) == (32, 96, 48)
    assert (task.success, task.judge.unit, task.judge.name) == ("more", "rate", name)
    answers = [yes, no, "", "The hotel stands on the lake.", f"{yes.split()[-1]} " * 6]
    assert task.judge(task.test.prompts[:5], answers) == [1.0, 0.0, 0.0, 0.0, 0.0]
