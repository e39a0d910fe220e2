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

    def judge(self, sample) -> tuple[str, str] | None:
        """What was found, in words, and yes, no, or open: the interval leaves it so, or fewer than three seeds do.

        sample(row, measure) gives a value for each seed.
        """
        better, worse = sample(self.better, self.measure), sample(self.worse, self.than or self.measure)
        if not (better and worse):
            return None
        middle, low, high = self.difference(better, worse)
        answer = "yes" if low > -self.margin else "no" if high < -self.margin else "open"
        answer = answer if min(len(better), len(worse)) >= 3 else "open"
        return f"{number(middle)} [{number(low)}, {number(high)}]", answer


@dataclass(frozen=True)
class Reach:
    """The IQM of a row is at least so much, or at least so many of its seeds are."""

    row: str
    at_least: float
    seeds: int | None = None
    measure: str = "return"
    task: str | None = None

    def __str__(self) -> str:
        words = f" on {self.seeds} seeds" if self.seeds else ""
        return f"{self.row}: {self.measure} of at least {self.at_least:g}{words}"

    def judge(self, sample) -> tuple[str, str] | None:
        values = sample(self.row, self.measure)
        if not values:
            return None
        if self.seeds:
            reached = sum(value >= self.at_least for value in values)
            return f"{reached} of {len(values)} seeds", "yes" if reached >= self.seeds else "no"
        return number(float(iqm(values))), "yes" if iqm(values) >= self.at_least else "no"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def verdict(answers: list[str]) -> str:
    if not answers:
        return "not measured yet"
    if all(answer == "yes" for answer in answers):
        return "holds"
    return "holds in part" if "yes" in answers else "does not hold here"
