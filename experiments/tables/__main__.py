"""Make every table, figure and sentence with a figure in README and docs again; no model is run.

python -m experiments.tables           # write what differs
python -m experiments.tables --check   # only tell; status 1 when something differs
"""

from __future__ import annotations

import sys

from experiments.tables.figures import differing, made, whole, write

found = made(whole())
problems = differing(found) if sys.argv[1:] == ["--check"] else write(found)
print("\n".join(problems) or "every figure is what the committed labels give")
sys.exit(bool(problems))
