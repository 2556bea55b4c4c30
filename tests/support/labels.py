"""Labels of arms, as seeds x prompts, and what is asked of every score."""

from __future__ import annotations

from hypothesis import settings, strategies as st

from commandv.evaluation import Score

NAN = float("nan")
REPEATS = 200
quick = settings(max_examples=50, deadline=None)
BITS = st.sampled_from([0.0, 1.0])


def inside(score: Score) -> bool:
    slack = 1e-9 * max(1.0, abs(score.value))
    return score.low - slack <= score.value <= score.high + slack


def grids(elements: st.SearchStrategy[float], arms: int) -> st.SearchStrategy[list[list[list[float]]]]:
    """Labels as arms x seeds x prompts."""

    def of(shape: tuple[int, int]) -> st.SearchStrategy[list[list[list[float]]]]:
        row = st.lists(elements, min_size=shape[1], max_size=shape[1])
        one = st.lists(row, min_size=shape[0], max_size=shape[0])
        return st.lists(one, min_size=arms, max_size=arms)

    return st.tuples(st.integers(1, 3), st.integers(2, 9)).flatmap(of)
