"""Studies: donors x recipients x behaviours x methods x seeds x scales from one file."""

from commandv.evaluation.study.planning import Plan, plan
from commandv.evaluation.study.rehearsal import Rehearsal, rehearse
from commandv.evaluation.study.running import run_study, unfinished
from commandv.evaluation.study.schema import Study, load_study

__all__ = ["Plan", "Rehearsal", "Study", "load_study", "plan", "rehearse", "run_study", "unfinished"]
