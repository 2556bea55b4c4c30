"""Would the tests notice a fault? Seeded faults in the code that every figure passes through, one at a time.

    python -m benchmarks.mutation                      # all modules; writes results/mutation.json and the page
    python -m benchmarks.mutation transfer/fold.py     # this module anew
    python -m benchmarks.mutation --missed             # what was missed, after new tests; the modules must be unchanged
    python -m benchmarks.mutation --seed 2             # another draw: what was found with another seed is dropped

A fault is one change of a module's syntax tree: a comparison, an operator, a constant, a condition or a transposition
that is another. Of all that a module allows a fixed sample is drawn, and for each the module's own tests run in a fork
of a process that has loaded the libraries. A fault is noticed where a test fails, the module cannot be imported, or the
tests take ten times as long as without it. Tests that were written for what one draw missed are judged by another.

Faults that change nothing that can be observed are listed by hand, with the reason, in results/equivalent-faults.json;
the page has the score with and without them.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "commandv"
RESULTS = ROOT / "benchmarks" / "results" / "mutation.json"
EQUIVALENT = ROOT / "benchmarks" / "results" / "equivalent-faults.json"
PAGE = ROOT / "docs" / "benchmarks" / "mutation.md"
LEAST_SECONDS = 60.0
_FITS = ("transfer/test_least_squares", "transfer/test_convert", "transfer/test_ridge")
# module -> how many faults, and the tests that must notice
MODULES: dict[str, tuple[int, tuple[str, ...]]] = {
    "transfer/convert/factor.py": (10, ("transfer/test_factor", *_FITS)),
    "transfer/convert/strength.py": (
        8,
        ("transfer/test_ridge", "transfer/test_convert", "transfer/test_least_squares"),
    ),
    "transfer/convert/fitters.py": (8, _FITS),
    "transfer/convert/linear.py": (6, _FITS),
    "transfer/convert/rows.py": (6, ("transfer/test_rows", *_FITS)),
    "transfer/fold.py": (6, ("transfer/test_fold", "transfer/test_pasting", "transfer/test_nonlinear")),
    "transfer/paste.py": (8, ("transfer/test_pasting",)),
    "adapters/attach.py": (6, ("adapters/test_attach",)),
    "evaluation/scores.py": (14, ("evaluation/test_scores", "evaluation/test_statistics")),
    "evaluation/statistics.py": (10, ("evaluation/test_statistics",)),
    "evaluation/price.py": (8, ("evaluation/test_price",)),
    "evaluation/tasks.py": (3, ("evaluation/test_tasks",)),
    "evaluation/outcomes.py": (5, ("evaluation/test_tasks",)),
    "evaluation/meter.py": (8, ("evaluation/test_meter",)),
}

COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
}  # fmt: skip; | joins types
_NOT_RUN = (ast.Import, ast.ImportFrom, ast.Raise)
NAMED = {"max": "min", "min": "max", "argmax": "argmin", "argmin": "argmax", "maximum": "minimum",
         "minimum": "maximum", "any": "all", "all": "any"}  # fmt: skip


def faults(tree: ast.Module) -> Iterator[tuple[ast.AST, Callable[[Any], ast.AST]]]:
    """Yield (node, what makes it wrong); nothing in annotations, imports, messages of errors and docstrings."""
    for node in _code(tree):
        match node:
            case ast.Compare(ops=[one]) if type(one) in COMPARED:
                yield node, lambda n: ast.Compare(n.left, [COMPARED[type(n.ops[0])]()], n.comparators)
            case ast.BinOp(op=op) if type(op) in COMPUTED:
                yield node, lambda n: ast.BinOp(n.left, COMPUTED[type(n.op)](), n.right)
            case ast.BinOp(op=ast.MatMult()):
                yield node, lambda n: n.left
            case ast.BoolOp():
                yield node, lambda n: ast.BoolOp(ast.Or() if isinstance(n.op, ast.And) else ast.And(), n.values)
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                yield node, lambda n: n.operand
            case ast.Constant(value=bool()):
                yield node, lambda n: ast.Constant(not n.value)
            case ast.Constant(value=int() | float()):
                yield node, lambda n: ast.Constant(n.value + 1 if isinstance(n.value, int) else n.value * 2 or 1.0)
            case ast.Attribute(attr="T" | "mT"):
                yield node, lambda n: n.value
            case ast.Attribute(attr=name) if name in NAMED:
                yield node, lambda n: ast.Attribute(n.value, NAMED[n.attr], n.ctx)
            case ast.Name(id=name) if name in NAMED:
                yield node, lambda n: ast.Name(NAMED[n.id], n.ctx)
            case ast.IfExp():
                yield node, lambda n: ast.IfExp(n.test, n.orelse, n.body)
            case ast.If():
                yield node, lambda n: ast.If(ast.UnaryOp(ast.Not(), n.test), n.body, n.orelse)
            case ast.AugAssign(op=op) if type(op) in COMPUTED:
                yield node, lambda n: ast.AugAssign(n.target, COMPUTED[type(n.op)](), n.value)


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Walk what is run and is no message."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases", "keywords") and not (
            name == "keywords" and isinstance(node, ast.Call)
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            strict = isinstance(child, ast.keyword) and child.arg == "strict"  # of zip: an assertion
            if isinstance(child, ast.AST) and not strict and not isinstance(child, _NOT_RUN):
                yield from _code(child)


def sampled(module: str, count: int, seed: int) -> list[tuple[int, str, str]]:
    """Return (line, what was changed into what, the module's source with the fault) of the module's sample."""
    tree = ast.parse((SOURCE / module).read_text("utf-8"))
    number = len(list(faults(tree)))
    out = []
    for place in sorted(random.Random(f"{seed} {module}").sample(range(number), min(count, number))):
        wrong = copy.deepcopy(tree)
        node, change = list(faults(wrong))[place]
        was, new = ast.unparse(node), ast.copy_location(change(node), node)
        told = ast.unparse(new)
        _Put(node, new).visit(wrong)
        if isinstance(node, ast.If):
            was, told = f"if {ast.unparse(node.test)}", f"if not ({ast.unparse(node.test)})"
        out.append((node.lineno, f"{was} → {told}", ast.unparse(ast.fix_missing_locations(wrong))))
    return out


class _Put(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)


class _Faulty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a source that is given."""

    def __init__(self, module: str, source: str) -> None:
        self.path, self.source = SOURCE / module, source
        self.name = "commandv." + module.removesuffix(".py").replace("/", ".")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def exec_module(self, module: Any) -> None:
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


def run(module: str, source: str | None, most: float) -> tuple[int, float]:
    """Run a module's tests in a fork; return their exit status, 1 where the time is up, and the seconds."""
    import pytest

    began, child = time.monotonic(), os.fork()
    if not child:
        os.setsid()
        quiet = os.open(os.devnull, os.O_RDWR)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        if source is not None:
            sys.meta_path.insert(0, _Faulty(module, source))
        files = [str(ROOT / "tests" / f"{name}.py") for name in MODULES[module][1]]
        os._exit(int(pytest.main(["-x", "-p", "no:cacheprovider", "-m", "not real", *files])))
    while time.monotonic() - began < most:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 1, most


def tried(module: str, before: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return the module's faults, each with whether it was noticed; those noticed before are not tried again."""
    lines = (SOURCE / module).read_text("utf-8").splitlines()
    known = {(row["line"], row["fault"]) for row in before if row["noticed"]}
    status, seconds = run(module, None, 1800)
    if status:
        raise SystemExit(f"{module}: its tests fail, or there are none, without any fault (pytest: {status})")
    rows = []
    for line, change, source in sampled(module, MODULES[module][0], seed):
        if (line, change) not in known:
            status, took = run(module, source, max(10 * seconds, LEAST_SECONDS))
            print(f"{module}:{line} {'noticed' if status else 'SURVIVES'} ({took:.0f} s) {change}", flush=True)
        noticed = (line, change) in known or bool(status)
        rows.append({"line": line, "code": lines[line - 1].strip(), "fault": change, "noticed": noticed})
    return rows


def page() -> str:
    """Return the page, from the results and the list of faults that change nothing."""
    kept = json.loads(RESULTS.read_text("utf-8"))
    found: dict[str, list[dict[str, Any]]] = kept["modules"]
    reasons = {tuple(one[key] for key in ("module", "code", "fault")): one["reason"] for one in equivalent()}
    missed = [(name, row) for name, rows in found.items() for row in rows if not row["noticed"]]
    why = [reasons.get((name, row["code"], row["fault"])) for name, row in missed]
    lines = [
        "# Would the tests notice a fault?\n",
        "Written by `python -m benchmarks.mutation`: single faults (a comparison, an operator, a constant, a condition "
        f"or a transposition that is another), drawn at random with seed {kept['seed']} from all that a module allows, "
        "each against the module's own tests as they were before the draw. When these were written, what seeds 0 and "
        "1 had drawn and the list of all faults that a module allows were in view, not this draw. Faults that change "
        'nothing that can be observed (a tie, a size of blocks) count as missed in "share"; in the last column they '
        "are left out.\n",
        "| module | faults | noticed | share | that change nothing | share of the others |",
        "|---|---|---|---|---|---|",
    ]
    every = [row for rows in found.values() for row in rows]
    for module, rows in [*found.items(), ("all", every)]:
        hits = sum(row["noticed"] for row in rows)
        nothing = sum(bool(reason) for (name, _), reason in zip(missed, why, strict=True) if module in (name, "all"))
        rest = hits / max(len(rows) - nothing, 1)
        lines.append(f"| {module} | {len(rows)} | {hits} | {hits / len(rows):.2f} | {nothing} | {rest:.2f} |")
    if waiting := [name for name in MODULES if name not in found]:
        lines.append(f"\nNot run with this seed yet: {', '.join(waiting)}.")
    told = [
        f"- {name}, line {row['line']}: `{row['fault']}`" + (f" ({reason})" if reason else "")
        for (name, row), reason in zip(missed, why, strict=True)
    ]
    return "\n".join([*lines, "\n## Missed\n", *(told or ["None."])]) + "\n"


def equivalent() -> list[dict[str, str]]:
    """Return the faults that change nothing, by module, line of code and change, each with the reason."""
    found: list[dict[str, str]] = json.loads(EQUIVALENT.read_text("utf-8"))
    return found


def main() -> None:
    import hypothesis
    import numpy  # noqa: F401
    import torch
    import transformers  # noqa: F401

    parser = argparse.ArgumentParser()
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="default: all")
    parser.add_argument("--missed", action="store_true", help="try only what was missed before")
    parser.add_argument("--seed", type=int, help="of the draw; default: that of the results")
    asked = parser.parse_args()
    # A slow machine is no fault, and the same fault is noticed each time.
    hypothesis.settings.register_profile("mutation", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("mutation")
    torch.set_num_threads(1)
    os.chdir(ROOT)
    for module in asked.modules or MODULES:
        kept = json.loads(RESULTS.read_text("utf-8"))
        seed = kept["seed"] if asked.seed is None else asked.seed
        found = kept["modules"] if seed == kept["seed"] else {}
        found[module] = tried(module, found.get(module, []) if asked.missed else [], seed)
        ordered = {name: found[name] for name in MODULES if name in found}
        RESULTS.write_text(json.dumps({"seed": seed, "modules": ordered}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
