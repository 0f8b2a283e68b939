"""Intervals and tests against SciPy's, an implementation of its own."""

import pytest
import scipy.stats

from dat_deploy.validate.statistics import mcnemar_p, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials"), [(0, 1), (1, 1), (0, 500), (500, 500), (3, 7), (9_153, 10_000), (41_000, 50_000)]
)
def test_wilson_interval_is_that_of_scipy(successes: int, trials: int) -> None:
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 3), (4, 3), (0, 0)])
def test_what_is_no_share_is_refused(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"^{successes} of {trials} is no share$"):
        wilson_interval(successes, trials)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (5, 0), (3, 3), (2, 9), (40, 61), (700, 801), (6_000, 6_300)])
def test_mcnemar_is_the_exact_two_sided_binomial_test(first: int, second: int) -> None:
    expected = scipy.stats.binomtest(first, first + second).pvalue
    assert mcnemar_p(first, second) == pytest.approx(expected, rel=1e-8)
    assert mcnemar_p(second, first) == mcnemar_p(first, second)


def test_mcnemar_of_two_sides_that_never_part_is_one() -> None:
    assert mcnemar_p(0, 0) == 1.0
