"""Statistics over seeds, and what they say about a claim (arXiv 2108.13264 on why this mean and these intervals)."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap, trim_mean


def iqm(values, axis=-1):
    """Interquartile mean: without the lowest and the highest quarter of the seeds."""
    return trim_mean(values, 0.25, axis=axis)


def interval(*samples, statistic=iqm) -> tuple:
    """95 % percentile bootstrap interval over seeds, of each task by itself; samples (..., seeds).

    Resampled seeds lie among those measured, so the interval does not leave the possible range. Not a number with
    fewer than two seeds.
    """
    samples = [np.asarray(sample, float) for sample in samples]
    if min(sample.shape[-1] for sample in samples) < 2:
        return (np.full(samples[0].shape[:-1], np.nan),) * 2
    found = bootstrap(samples, statistic, axis=-1, n_resamples=2000, method="percentile", rng=0)
    return found.confidence_interval.low, found.confidence_interval.high


@dataclass(frozen=True)
class Expect:
    """Row `better` has more of a measure than row `worse` (less, if `lower`); with a margin: at most so much less."""

    better: str
    worse: str
    measure: str = "return"
    margin: float = 0.0
    lower: bool = False
    than: str | None = None  # the worse row's measure, if it is another one
    task: str | None = None  # by default every task that has both rows

    def __str__(self) -> str:
        words = "less" if self.lower else "more"
        words = f"not {self.margin:g} {'more' if self.lower else 'less'}" if self.margin else words
        if self.than:
            return f"{self.measure}: {words} than {self.than}"
        return f"{self.better}: {words} {self.measure} than {self.worse}"

    def difference(self, better, worse) -> tuple[float, float, float]:
        """How far this is true: the difference of the two IQMs, and its interval."""
        sign = -1 if self.lower else 1

        def statistic(a, b, axis=-1):
            return sign * (iqm(a, axis) - iqm(b, axis))

        low, high = interval(better, worse, statistic=statistic)
        return float(statistic(np.asarray(better), np.asarray(worse))), float(low), float(high)

    def answer(self, better, worse) -> str:
        """yes, no, or open: the interval leaves it so."""
        _, low, high = self.difference(better, worse)
        if low > -self.margin:
            return "yes"
        return "no" if high < -self.margin else "open"


def verdict(answers: list[str]) -> str:
    if not answers:
        return "not measured yet"
    if all(answer == "yes" for answer in answers):
        return "holds"
    return "holds in part" if "yes" in answers else "does not hold here"
