"""What a count of right answers says of the next images."""

import math

import numpy as np

__all__ = ["mcnemar_p", "wilson_interval"]

Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927): unlike the normal one, it stays in 0..1 and holds near them.

    Raises:
        ValueError: unless 0 <= successes <= trials and there is a trial.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} of {trials} is no share")
    share = successes / trials
    scale = 1 + Z95**2 / trials
    centre = (share + Z95**2 / (2 * trials)) / scale
    half = Z95 / scale * math.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    # at the ends the formula is exact but for rounding
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == trials else min(1.0, centre + half)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test: how likely chance alone parts the images that one side gets right so unevenly.

    Args:
        only_first, only_second: images that the one side gets right and the other wrong.
    """
    trials, fewer = only_first + only_second, min(only_first, only_second)
    if trials == 0:
        return 1.0
    k = np.arange(1, fewer + 1)
    log_terms = np.concatenate([[0.0], np.cumsum(np.log(trials - k + 1) - np.log(k))]) - trials * math.log(2)
    return min(1.0, 2 * float(np.exp(log_terms).sum()))
