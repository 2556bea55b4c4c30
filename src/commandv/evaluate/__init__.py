"""Does a behaviour arrive, and what does it cost? Tasks, judges, controls, statistics."""

from commandv.evaluate.graders import GRADERS, Grader, collapsed
from commandv.evaluate.price import drift, reply_log_probs
from commandv.evaluate.scores import Score, mean, rate
from commandv.evaluate.tasks import ByText, Judge, Outcome, Split, Task, measure

__all__ = [
    "GRADERS",
    "ByText",
    "Grader",
    "Judge",
    "Outcome",
    "Score",
    "Split",
    "Task",
    "collapsed",
    "drift",
    "mean",
    "measure",
    "rate",
    "reply_log_probs",
]
