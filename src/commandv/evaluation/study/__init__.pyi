from .planning import Plan as Plan, plan as plan
from .rehearsal import Rehearsal as Rehearsal, rehearse as rehearse
from .running import run_study as run_study, unfinished as unfinished
from .schema import Study as Study, load_study as load_study
