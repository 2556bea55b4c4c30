"""Whether a behaviour crosses: the rules, applied to labels arm by arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from commandv.errors import InputError
from commandv.evaluation.arms import DIRECT, PASTED, RANDOM, UNMODIFIED
from commandv.evaluation.scores import Score
from commandv.evaluation.statistics import Comparison, difference, holm, paired_p

DONOR = "donor"
ALPHA = 0.05
WHOLE = 0.8  # a recovered fraction whose whole interval lies below this is a part only

CROSSES, PARTLY, DOES_NOT = "crosses", "crosses partly", "does not cross"
NOT_EXAMINABLE, NOT_ESTABLISHED, NOT_MEASURED = "is not examinable", "is not established", "is not measured"

PLURAL = {
    CROSSES: "cross", PARTLY: "cross partly", DOES_NOT: "do not cross", NOT_EXAMINABLE: "are not examinable",
    NOT_ESTABLISHED: "are not established", NOT_MEASURED: "are not measured",
}  # fmt: skip

Success = Literal["more", "less"]
Labels = list[list[float | None]]


class Verdict(NamedTuple):
    """What is said of a behaviour and a pair, and the rule that led to it."""

    word: str
    why: str


def verdict(
    judged: dict[str, Labels],
    found: Mapping[str, Comparison],
    unit: str,
    success: Success,
    *,
    arm: str = PASTED,
    controls: Sequence[str] = (RANDOM,),
) -> Verdict:
    """Apply the rules that the report states, in their order.

    Args:
        judged: arm -> labels.
        found: arm -> its comparison with the unmodified recipient.
        unit: of the labels.
        success: whether more or less is the aim.
        arm: what was carried.
        controls: that it must beat beside the unmodified recipient; those that were not measured are left aside.
    """
    pasted, direct = found.get(arm), found.get(DIRECT)
    if pasted is None or pasted.difference is None:
        return Verdict(NOT_MEASURED, "no figures of the pasted and the unmodified recipient to compare")
    if direct and not _moves(direct.difference, direct.adjusted, success):
        return Verdict(NOT_EXAMINABLE, "the recipient's own adapter or vector does not show the behaviour")
    measured = [name for name in controls if name in judged]
    if not measured:
        return Verdict(NOT_ESTABLISHED, f"no {' or '.join(controls)} control to compare with")
    beaten = {UNMODIFIED: _moves(pasted.difference, pasted.adjusted, success)}
    # All tests must reject, each at the full level: their conjunction rejects no more often than any of them.
    for control in measured:
        tested = [name for name in judged if name not in (control, DONOR)]
        try:
            p = holm([paired_p(judged[one], judged[control], unit) for one in tested])
            gap = difference(control, judged[arm], judged[control], unit)
        except InputError:
            return Verdict(NOT_ESTABLISHED, f"no prompt was judged with both the paste and the {control} control")
        beaten[control] = _moves(gap, dict(zip(tested, p, strict=True))[arm], success)
    if not all(beaten.values()):
        others = " and ".join(name for name, beats in beaten.items() if not beats)
        return Verdict(DOES_NOT, f"not {success} than {others}, after Holm's correction")
    if direct is None:
        return Verdict(CROSSES, "how much of it cannot be said without the direct arm")
    if pasted.recovered and pasted.recovered.high < WHOLE:
        return Verdict(PARTLY, f"{success} than unmodified and random, but less than {WHOLE} of what training gives")
    return Verdict(CROSSES, f"{success} than {' and '.join(beaten)}")


def _moves(gap: Score | None, adjusted: float | None, success: Success) -> bool:
    """Tell whether a difference is significant and in the wanted direction."""
    if gap is None or adjusted is None:
        return False
    return adjusted < ALPHA and (gap.value > 0 if success == "more" else gap.value < 0)
