"""Cards: what a repository on the hub says of the artefact in it, for people and, in its head, for the hub.

Everything that is not ours to word (names, provenance, a certificate's text) comes from files that strangers wrote. It
goes into the card as code spans only, in which neither Markdown nor HTML means anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jinja2
import pydantic
from markupsafe import Markup

from commandv.adapters.adapter import Adapter
from commandv.models.identity import ModelRef
from commandv.models.names import PACKAGED
from commandv.profiles.profile import Profile
from commandv.storage.hub import is_repo_id
from commandv.transfer.distil.demonstrations import Demonstrations

LIBRARY = "commandv"
_LONGEST = 400  # characters of one value
_MOST = 60  # rows of a table of facts


class _Set(NamedTuple):
    """A set of prompts that a profile is of."""

    name: str
    n: int
    hash: str


_SET = set(_Set._fields)


def hub_id(model: ModelRef) -> str | None:
    """Return a model's name on the hub; None where its own name is a directory's or unknown."""
    known = _known_as(model.id)
    return known if is_repo_id(known) else None


def card_of(
    artefact: Adapter | Profile | Demonstrations,
    repo_id: str,
    *,
    license: str | None = None,
    licenses: Mapping[str, str] | None = None,
    record: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a repository's README.md.

    `license` is that of the artefact, by the hub's name, `licenses` what the cards of models state of theirs, `record`
    what the artefact's files say of it beside the artefact itself.
    """
    makers: dict[type, Any] = {Adapter: _adapter, Profile: _profile, Demonstrations: _demonstrations}
    template, head, facts = makers[type(artefact)](artefact, record or {})
    context = {**facts, "repo": repo_id, "licenses": dict(licenses or {}), "license": license}
    body = _ENVIRONMENT.get_template(template).render(context)
    return f"---\n{_head({**head, 'license': license}, template)}\n---\n\n{body}"


def _head(said: Mapping[str, Any], template: str) -> str:
    from huggingface_hub import DatasetCardData, ModelCardData

    kind: Any = ModelCardData if template.startswith("adapter") else DatasetCardData
    return str(kind(**{name: value for name, value in said.items() if value is not None}).to_yaml())


def _adapter(one: Adapter, _record: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    provenance = dict(one.provenance)
    stated = provenance.pop("certificate", None)
    certificate = _certificate(stated)
    base, donor = hub_id(one.model), donor_of(one)
    head = {
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "library_name": LIBRARY,
        "pipeline_tag": "text-generation",
        "tags": [LIBRARY, "activation-steering", "representation-engineering", *(["pasted"] if donor else [])],
        **_results(one.name, certificate),
    }
    edits = [
        {"layer": layer, **edit.facts(), "kind": edit.kind} for layer in one.layers for edit in one.interventions[layer]
    ]
    facts = {
        "name": one.name,
        "model": base or one.model.id,
        "revision": one.model.revision,
        "donor": donor,
        "edits": edits,
        "parameters": one.n_parameters,
        "prefill_only": one.prefill_only,
        "made": _rows(provenance),
        "certificate": certificate,
        "stated": _rows(stated),
    }
    return "adapter.md.j2", head, facts


class _Figure(pydantic.BaseModel):
    value: float | None
    low: float | None
    high: float | None
    n: int


class _Arm(pydantic.BaseModel):
    score: _Figure
    loops: _Figure
    price: dict[str, _Figure]
    tokens_per_request: float


class _Task(pydantic.BaseModel):
    name: str
    unit: str
    success: str
    n_test: int


class _Certificate(pydantic.BaseModel):
    """What a card tells of a certificate, as `commandv transfer` writes it into an adapter's provenance."""

    verdict: str
    sentence: str
    by: str
    arm: str
    arms: dict[str, _Arm]
    task: _Task
    command: str | None = None


def _certificate(stated: Any) -> _Certificate | None:
    """Return a certificate; None for one of another form, which is told as it stands."""
    try:
        found = _Certificate.model_validate(stated)
    except pydantic.ValidationError:
        return None
    return found if found.arm in found.arms else None


def _results(name: str, found: _Certificate | None) -> dict[str, Any]:
    """Return what the hub lists as results: the adapter's own figure."""
    value = None if found is None else found.arms[found.arm].score.value
    if found is None or value is None:
        return {}
    from huggingface_hub import EvalResult

    result = EvalResult(
        task_type="text-generation", dataset_type=LIBRARY, dataset_name=_line(found.task.name),
        metric_type=_line(found.task.unit),
        metric_value=round(value, 4),
    )  # fmt: skip
    return {"eval_results": [result], "model_name": _line(name)}


def donor_of(one: Adapter) -> str | None:
    """Return the name of the model that an adapter was carried from."""
    shown = one.provenance.get("demonstrations")
    stated = one.provenance.get("donor") or (shown.get("donor") if isinstance(shown, Mapping) else None)
    if isinstance(stated, Mapping):
        stated = stated.get("id")
    return _known_as(stated) if isinstance(stated, str) and stated else None


def _known_as(name: str) -> str:
    """Return what the hub calls a packaged model, other names as they are."""
    return PACKAGED[name].hub_id if name in PACKAGED else name


def _profile(one: Profile, record: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    facts = {
        "model": hub_id(one.model) or one.model.id,
        "revision": one.model.revision,
        "layers": len(one.activations),
        "d_model": one.d_model,
        "n_end": one.n_end,
        "n_text": len(one) - one.n_end,
        "prompts": one.prompts,
        "sets": [_Set(**one) for one in record.get("sets") or [] if isinstance(one, dict) and set(one) == _SET],
        "made": _rows({name: record.get(name) for name in ("dtype", "max_length", "places", "rows_per_text")}),
    }
    return "profile.md.j2", {"tags": [LIBRARY, "activations", f"{LIBRARY}-profile"]}, facts


def _demonstrations(one: Demonstrations, _record: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    facts = {
        "name": one.name,
        "model": hub_id(one.donor) or one.donor.id,
        "answers": len(one),
        "places": 0 if one.changes is None else len(one.changes.places),
        "divergence": one.mean_divergence,
        "loop_rate": one.loop_rate,
        "hash": one.hash,
        "left_out": _rows(one.dropped),
    }
    return "demonstrations.md.j2", {"tags": [LIBRARY, "text-generation", f"{LIBRARY}-demonstrations"]}, facts


# -- text -------------------------------------------------------------------------------------------------------------


def _line(value: Any) -> str:
    """Return a value as one line of bounded length, without characters that steer a terminal or turn text around."""
    text = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", " ", str(value)).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def code(value: Any) -> Markup:
    """Return a value as a code span of one line: what is in it is shown, and means nothing."""
    text = _line(value)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    inside = text.replace("|", "\\|") or " "  # a table's cells end at a bar, code or not
    pad = " " if inside.startswith("`") or inside.endswith("`") else ""
    return Markup(f"{fence}{pad}{inside}{pad}{fence}")


def said(value: str) -> Markup:
    """Return a sentence whose every mark stands for itself; as code where it holds something like an address."""
    text = " ".join(value.split())[:2000]
    if re.search(r"://|www\.|@|[^ -~\u00a0-\u02ff\u0370-\u04ff\u2010-\u2026]", text):
        return code(text)
    return Markup(re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text))


def _figure(one: _Figure | None) -> str:
    if one is None or one.value is None:
        return ""
    between = "" if one.low is None or one.high is None else f" [{one.low:.2f}, {one.high:.2f}]"
    return Markup(f"{one.value:.2f}{between}")


def _shown(value: Any) -> Any:
    """Return what an expression of a template puts out: numbers as they are, every other text as code."""
    if isinstance(value, Markup) or value is None or isinstance(value, bool | int):
        return "" if value is None else value
    if isinstance(value, float):
        return Markup(f"{value:.4g}")
    return code(value)


def _rows(facts: Any, name: str = "", depth: int = 0) -> list[tuple[str, str]]:
    """Return nested facts as rows of a table, "a.b" -> value."""
    return list(_walk(facts, name, depth))[:_MOST]


def _walk(facts: Any, name: str, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(facts, Mapping) and depth < 4:
        for key, value in facts.items():
            yield from _walk(value, f"{name}.{key}" if name else str(key), depth + 1)
    elif facts not in (None, "", [], {}):
        yield name, str(facts)


def _plain(value: Any) -> Markup:
    """Return a name for a block of code; three dots for one that could be more than a name."""
    return Markup(value if isinstance(value, str) and re.fullmatch(r"[\w./:@+-]{1,200}", value, re.A) else "...")


def _licensed(license: str | None) -> Markup:
    return Markup(f" (licence {code(license)})") if license else Markup("")


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("commandv.interop"),
    undefined=jinja2.StrictUndefined,
    finalize=_shown,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.globals.update(plain=_plain, licensed=_licensed, code=code, said=said, figure=_figure)
