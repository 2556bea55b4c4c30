"""Cards say what an artefact is, from what and how it was made; what strangers wrote means nothing in them."""

from __future__ import annotations

import re
from dataclasses import replace

import yaml

import command_line
import commandv as cv
import foreign
import local_hub
import sharing
import tiny
from commandv.interop.cards import card_of
from sharing import head

adapter = sharing.adapter


hub, run, seed = local_hub.hub, command_line.run, foreign.seed


def test_the_card_says_what_it_is_from_what_and_how_it_was_made(hub, adapter):
    hub.repo("maker/base").commit({"README.md": b"---\nlicense: gemma\n---\n"})
    donor = {"id": "maker/donor", "d_model": 3}
    pasted = replace(
        adapter,
        model=replace(adapter.model, id="maker/base"),
        provenance={"made_by": "paste", "donor": donor, "link": {"fit": {"kind": "ridge"}}},
    )
    cv.push(pasted, "anna/pasted", license="apache-2.0")
    repo = hub.repos["model", "anna/pasted"]
    assert head(repo) == {
        "base_model": "maker/base",
        "base_model_relation": "adapter",
        "library_name": "commandv",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["commandv", "activation-steering", "representation-engineering", "pasted"],
    }
    text = repo.files()["README.md"].decode()
    for part in ("# `lists`", "`maker/donor`", "(licence `gemma`)", "| `link.fit.kind` | `ridge` |", "`apache-2.0`"):
        assert part in text
    assert 'cv.load_adapter("anna/pasted")' in text


def test_packaged_models_have_their_names_on_the_hub(lm):
    one = tiny.random_adapter(replace(lm, id="smollm2-135m-instruct"))
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card_of(one, "anna/x")


def test_a_directory_is_no_base_model(lm):
    text = card_of(tiny.random_adapter(replace(lm, id="/home/anna/models/x")), "anna/x")
    assert "base_model" not in text.split("---\n")[1]


def certificate(**changes) -> dict:
    def arm(value: float) -> dict:
        figure = {"name": "x", "value": value, "low": value - 0.1, "high": value + 0.1, "n": 64, "unit": "rate"}
        price = {"kl_first": {**figure, "value": 3.25}, "kl_after": {**figure, "value": 0.5}}
        return {"score": figure, "loops": {**figure, "value": 0.0}, "price": price, "tokens_per_request": 0}

    return {
        "verdict": "crosses",
        "sentence": "lists cross: 0.36 [0.26, 0.46] of 64 answers, 0.00 unmodified.",
        "by": "paste",
        "arm": "pasted",
        "arms": {"unmodified": arm(0.0), "pasted": arm(0.36), "random": arm(0.02)},
        "task": {"name": "numbered-list", "unit": "rate", "success": "more", "n_test": 64, "judge": "lists"},
        "command": "commandv transfer a b c -o d",
        **changes,
    }


def test_a_certificate_is_told_with_its_controls_and_the_command(adapter):
    text = card_of(replace(adapter, provenance={"made_by": "paste", "certificate": certificate()}), "anna/x")
    front = yaml.safe_load(text.split("---\n")[1])
    (index,) = front["model-index"]
    assert index["results"][0]["metrics"][0]["value"] == 0.36
    assert index["results"][0]["dataset"]["name"] == "numbered-list"
    assert r"lists cross\: 0\.36 \[0\.26\, 0\.46\] of 64 answers\, 0\.00 unmodified\." in text
    assert "| `pasted` (this adapter, by `paste`) | 0.36 [0.26, 0.46] | 0.00 " in text
    assert "| `random` | 0.02 " in text
    assert "`commandv transfer a b c -o d`" in text
    assert "`certificate." not in text


def test_a_certificate_of_another_form_is_told_as_it_stands(adapter):
    text = card_of(replace(adapter, provenance={"certificate": {"verdict": "crosses", "rate": 0.5}}), "anna/x")
    assert "| `verdict` | `crosses` |" in text
    assert "model-index" not in text
    assert "Nothing that this card knows of" in card_of(adapter, "anna/x")


HOSTILE = (
    '"""\n```\n---\nlicense: mit\n---\n# <script>alert(1)</script> ![x](http://evil/x.png) | `a` ``b`` {{ 7 * 7 }}'
)


def test_what_strangers_wrote_means_nothing_in_a_card(adapter):
    one = replace(
        adapter,
        name=HOSTILE,
        provenance={
            HOSTILE: HOSTILE,
            "donor": {"id": HOSTILE},
            "certificate": certificate(
                verdict=HOSTILE,
                sentence=HOSTILE,
                by=HOSTILE,
                command=HOSTILE,
                arms={HOSTILE: certificate()["arms"]["pasted"], "pasted": certificate()["arms"]["pasted"]},
                task={"name": HOSTILE, "unit": HOSTILE, "success": HOSTILE, "n_test": 64},
            ),
        },
        model=replace(adapter.model, id=HOSTILE, revision=HOSTILE),
    )
    text = card_of(one, "anna/x", license="mit", licenses={HOSTILE: HOSTILE})
    _, front, body = text.split("---\n", 2)
    assert set(yaml.safe_load(front)) == {"library_name", "license", "model-index", "pipeline_tag", "tags"}
    outside = re.sub(r"^```python\n.*?^```$", "", body, flags=re.S | re.M)
    assert '"""' not in body.split("```python")[1].split("\n```")[0]
    outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)  # code spans
    for word in ("<", "evil", "![", "49", "alert", "`"):
        assert word not in outside, outside
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} <= {3, 7}, "a bar in a value does not end its cell"
