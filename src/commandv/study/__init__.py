"""Studies: donors x recipients x behaviours x methods x seeds x scales from one file."""

from commandv.study.planning import Plan, plan
from commandv.study.running import run_study
from commandv.study.schema import Study, load_study

__all__ = ["Plan", "Study", "load_study", "plan", "run_study"]
