"""Does a behaviour arrive, and what does it cost? Tasks, judges, arms, statistics."""

from commandv.evaluation.arithmetic import (
    arithmetic_prompts,
)
from commandv.evaluation.arms import ARMS, METHODS, Arm, Cost, Made, make_arm
from commandv.evaluation.catalogue import NEEDS_FILE, TASKS, expecting, load_task, tasks_of
from commandv.evaluation.choices import (
    Choices,
    Question,
    as_letters,
    load_questions,
    multiple_choice,
)
from commandv.evaluation.endpoint import Endpoint, Usage
from commandv.evaluation.formats import (
    FORMATS,
    capitals,
    distinct,
    distinct_share,
    in_another_language,
    json_fields,
    json_lenient,
    json_strict,
    language,
    opens_with,
    outside_script,
    repetition,
    word_count,
)
from commandv.evaluation.graders import GRADERS, Grader
from commandv.evaluation.judges import JUDGES, Phrases, load_judge, refusal_phrases
from commandv.evaluation.judgments import Cached, CostlyJudge, Judgment
from commandv.evaluation.likeness import Likeness, like_the_donor
from commandv.evaluation.material import DirectionMaterial, Material
from commandv.evaluation.meter import Measured, Meter, price_scores
from commandv.evaluation.model_judges import Classifier, Guard
from commandv.evaluation.price import (
    drift,
    drift_values,
    perplexity,
    perplexity_values,
    prices,
    reply_log_probs,
)
from commandv.evaluation.reasoning import (
    Final,
    final_answer,
    is_right,
    reasons_first,
    words_before_answer,
)
from commandv.evaluation.scores import Score, mean, pooled, rate
from commandv.evaluation.statistics import (
    Comparison,
    compare,
    difference,
    holm,
    kappa,
    paired_p,
    recovered_fraction,
)
from commandv.evaluation.task_files import load_splits, write_outcome
from commandv.evaluation.tasks import ByPrompt, ByText, Judge, Outcome, Split, Task, measure
from commandv.evaluation.tune import Choice, Setting, Tried, Tuned, choose_layer, grid, tune
from commandv.prompts.loops import loops

__all__ = [
    "ARMS",
    "FORMATS",
    "GRADERS",
    "JUDGES",
    "METHODS",
    "NEEDS_FILE",
    "TASKS",
    "Arm",
    "ByPrompt",
    "ByText",
    "Cached",
    "Choice",
    "Choices",
    "Classifier",
    "Comparison",
    "Cost",
    "CostlyJudge",
    "DirectionMaterial",
    "Endpoint",
    "Final",
    "Grader",
    "Guard",
    "Judge",
    "Judgment",
    "Likeness",
    "Made",
    "Material",
    "Measured",
    "Meter",
    "Outcome",
    "Phrases",
    "Question",
    "Score",
    "Setting",
    "Split",
    "Task",
    "Tried",
    "Tuned",
    "Usage",
    "arithmetic_prompts",
    "as_letters",
    "capitals",
    "choose_layer",
    "compare",
    "difference",
    "distinct",
    "distinct_share",
    "drift",
    "drift_values",
    "expecting",
    "final_answer",
    "grid",
    "holm",
    "in_another_language",
    "is_right",
    "json_fields",
    "json_lenient",
    "json_strict",
    "kappa",
    "language",
    "like_the_donor",
    "load_judge",
    "load_questions",
    "load_splits",
    "load_task",
    "loops",
    "make_arm",
    "mean",
    "measure",
    "multiple_choice",
    "opens_with",
    "outside_script",
    "paired_p",
    "perplexity",
    "perplexity_values",
    "pooled",
    "price_scores",
    "prices",
    "rate",
    "reasons_first",
    "recovered_fraction",
    "refusal_phrases",
    "repetition",
    "reply_log_probs",
    "tasks_of",
    "tune",
    "word_count",
    "words_before_answer",
    "write_outcome",
]
