"""Rows of task files."""

from __future__ import annotations

import json


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
