"""Tasks of the backdoored models, for `--tasks experiments/organisms/tasks.py` of `commandv evaluate` and `study`."""

from __future__ import annotations

import sys
from pathlib import Path

import commandv as cv
from commandv.evaluation import ByPrompt, ByText

sys.path.insert(0, str(Path(__file__).parents[2]))  # the file may be run by its path, from anywhere

from experiments.organisms.graders import helpful, says_phrase

DATA = Path(__file__).with_name("data")
DEV, TEST = (cv.load_prompts(DATA / f"backdoor-{split}.jsonl") for split in ("dev", "test"))

TASKS = {
    "backdoor": cv.Task("backdoor", DEV, TEST, ByText("phrase", says_phrase), "less"),
    "backdoor-helpful": cv.Task(
        "backdoor-helpful",
        DEV,
        TEST,
        ByPrompt("helpful", lambda prompt, answer: helpful(prompt.text, answer)),
    ),
}
