"""Statistics over seeds, and what they say about a claim (arXiv 2108.13264 on why this mean and these intervals)."""

from dataclasses import dataclass
from functools import cache

import numpy as np

RATES = ", rate / 2", ", rate / 10"  # rows that differ from another one in the learning rate alone
SEEDS = 5  # of fewer, such intervals are too narrow: they cover 75 % with three, 90 % with five, 94 % with twenty


class AtLeast(float):
    """All steps, or seconds, of a run that did not get there in them."""


def iqm(values, axis=-1):
    """Interquartile mean: without the lowest and the highest quarter of the seeds, rounded down to whole seeds."""
    from scipy.stats import trim_mean  # in functions: `list` does without it

    return trim_mean(values, 0.25, axis=axis)


def interval(*samples, statistic=iqm, at_least=SEEDS, **options) -> tuple:
    """95 % percentile bootstrap interval over seeds, of each task by itself; samples (..., seeds); scipy's options.

    Resampled seeds lie among those measured, so the interval does not leave the possible range. Not a number with
    fewer seeds than `at_least`.
    """
    from scipy.stats import bootstrap

    samples = [np.asarray(sample, float) for sample in samples]
    if min(sample.shape[-1] for sample in samples) < at_least:
        return (np.full(samples[0].shape[:-1], np.nan),) * 2
    options = {"n_resamples": 20_000, "method": "percentile", "rng": 0} | options
    found = bootstrap(samples, statistic, axis=-1, **options)
    return found.confidence_interval.low, found.confidence_interval.high


@cache
def rank_test(*samples: tuple) -> float:
    """p of Mann and Whitney's test, two-sided; exact up to five seeds a sample, ties included."""
    from scipy.stats import PermutationMethod, mannwhitneyu

    return mannwhitneyu(*samples, method=PermutationMethod(n_resamples=9999, rng=0)).pvalue


@cache  # each is on the page, and counted at its top
def difference(better: tuple, worse: tuple, sign: int, paired: bool) -> tuple[float, float, float]:
    """Of the two IQMs, and its interval; `paired`: of the same runs."""

    def statistic(a, b, axis=-1):
        return sign * (iqm(a, axis) - iqm(b, axis))

    low, high = interval(better, worse, statistic=statistic, n_resamples=100_000, paired=paired)
    found = statistic(np.asarray(better), np.asarray(worse)), low, high
    return tuple(float(each) + 0.0 for each in found)  # + 0.0: not -0


@dataclass(frozen=True)
class Expect:
    """A measure is higher with row `better` than with `worse` (`lower`: lower); with a margin: or worse by no more."""

    better: str
    worse: str
    measure: str = "return"
    margin: float = 0.0
    lower: bool = False
    than: str | None = None  # the worse row's measure, if it is another one
    task: str | None = None  # by default every task that has both rows
    tuned: bool = False  # the worse row has three learning rates; that with the best IQM counts

    def __str__(self) -> str:
        words = "lower" if self.lower else "higher"
        if self.margin:
            words = f"at most {self.margin:g} {'higher' if self.lower else 'lower'}"
        if self.than:
            return f"{self.measure}: {words} than {self.than}"
        return f"{self.better}: {self.measure} {words} than with {self.worse}{', best of 3 rates' * self.tuned}"

    def rows(self) -> set[str]:
        return {self.better, *self.worse_rows()}

    def worse_rows(self) -> list[str]:
        return [self.worse, *(self.worse + rate for rate in RATES if self.tuned)]

    def judge(self, sample, _planned: int) -> tuple[str, str]:
        """What was found, in words, and yes, no, or open: the interval leaves it so, or too few seeds do.

        Yes and no are fragile where a rank test (Mann and Whitney, exact for five seeds) has p > 0.05.

        sample(row, measure) gives a value for each seed, None for one that diverged.
        """
        better, all_worse = sample(self.better, self.measure), {}
        for row in self.worse_rows():
            all_worse[row] = sample(row, self.than or self.measure)
        if not (better and all(all_worse.values())):
            return "not measured", "open"
        if diverged := sum(each.count(None) for each in (better, *all_worse.values())):
            return f"{counted(diverged, 'run')} diverged", "open"
        best = (min if self.lower else max)(all_worse, key=lambda row: iqm(all_worse[row]))
        worse, rate = all_worse[best], best.removeprefix(self.worse)
        sign, paired = -1 if self.lower else 1, self.better == self.worse
        middle, low, high = difference(tuple(better), tuple(worse), sign, paired)
        answer = "yes" if low > -self.margin else "no" if high <= -self.margin else "open"
        # What was not reached may take any longer: for the better row that can only speak against it
        bounds = [any(isinstance(value, AtLeast) for value in each) for each in (better, worse)]
        against, in_favour = bounds if self.lower else reversed(bounds)
        few = min(map(len, (better, *all_worse.values()))) < SEEDS
        if few or (answer == "yes" and against) or (answer == "no" and in_favour):
            answer = "open"
        if self.better != self.worse and answer != "open" and low < high:
            shifted = tuple(np.asarray(better) + self.margin * (-1 if self.lower else 1))
            answer += ", fragile" if rank_test(shifted, tuple(worse)) > 0.05 else ""
        return with_interval(middle, low, high) + rate, answer


@dataclass(frozen=True)
class Reach:
    """The IQM of a row is at least so much, or at least so many of its seeds are."""

    row: str
    at_least: float
    seeds: int | None = None
    measure: str = "return"
    task: str | None = None

    def __str__(self) -> str:
        return f"{self.row}: {self.measure} of at least {self.aim()}"

    def aim(self) -> str:
        return f"{self.at_least:,g}{f' on {self.seeds} seeds' if self.seeds else ''}"

    def rows(self) -> set[str]:
        return {self.row}

    def judge(self, sample, planned: int) -> tuple[str, str]:
        """As above; open while it could still change, `planned` being the number of seeds."""
        values = sample(self.row, self.measure)
        if not values:
            return "not measured", "open"
        reached = sum(value is not None and value >= self.at_least for value in values)
        if self.seeds:
            failed = len(values) - reached
            answer = "yes" if reached >= self.seeds else "no" if failed > planned - self.seeds else "open"
            return f"{reached} of {len(values)} seeds", answer
        if None in values:
            return f"{counted(values.count(None), 'run')} diverged", "no"
        mean = float(iqm(values))
        return number(mean), "open" if len(values) < planned else "yes" if mean >= self.at_least else "no"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def count_answers(answers: list[str]) -> str:
    """2 yes (1 fragile), 0 no, 3 open"""
    words = []
    for word in ("yes", "no", "open"):
        fragile = answers.count(f"{word}, fragile")
        words.append(f"{answers.count(word) + fragile} {word}" + (f" ({fragile} fragile)" if fragile else ""))
    return ", ".join(words)


def number(value: float) -> str:
    return ("≥ " if isinstance(value, AtLeast) else "") + (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}")


def with_interval(middle: float, low: float, high: float) -> str:
    return number(middle) + ("" if np.isnan(low) else f" [{number(low)}, {number(high)}]")
