"""Pictures of claims and of run folders, readable in black and white. Needs the extra: pip install -e ".[plot]" """

import hashlib
from pathlib import Path

import matplotlib
import numpy as np

from experiments.judge import AtLeast, interval, iqm
from experiments.runner import curve, key, read, runs_of, sample

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LINES, MARKERS = ["-", "--", "-.", ":"], "os^vDP<>"
COLORS = [*plt.get_cmap("tab20").colors[::2], *plt.get_cmap("tab20").colors[1::2]]  # ten strong ones, then pale ones
# Below the axes, where it hides nothing, with handles long enough to tell the lines by
LEGEND = {"loc": "outside lower center", "handlelength": 4, "frameon": False, "fontsize": 8}
THOUSANDS = plt.FuncFormatter(lambda value, _: f"{value:,.10g}")
UNITS = {
    "return": "greedy return, 100 episodes",
    "training return": "mean training return",
    "seconds": "seconds",
    "overestimation": "Q − the discounted return that followed",
    "steps to 475": "environment steps to a return of 475",
    "seconds to 475": "seconds to a return of 475",
    "seconds to 400": "seconds to a return of 400",
}


def draw_curves(axes, lines: dict[str, list[np.ndarray]], seconds: bool = False):
    """row -> a curve (points, 3) of env_steps, seconds, return for each seed; thin lines, IQM and interval.

    Of more than three rows the IQM alone, or nothing could be made out; the values beside them have every seed. The
    axis is logarithmic if some rows are much longer than others.
    """
    column = 1 if seconds else 0
    ends = [each[-1, column] for seeds in lines.values() for each in seeds]
    for i, (row, seeds) in enumerate(lines.items()):
        grid = np.linspace(0, min(each[-1, column] for each in seeds), 101)[1:]
        grid = grid[grid >= max(each[0, column] for each in seeds)]  # where every seed has finished an episode
        values = np.stack([np.interp(grid, each[:, column], each[:, 2]) for each in seeds], 1)
        color, style = COLORS[i % len(COLORS)], LINES[i % len(LINES)]
        few = len(lines) <= 3
        for each in seeds if few else []:
            axes.plot(each[:, column], each[:, 2], color=color, linewidth=0.4, alpha=0.5)
        marks = {} if few else {"marker": MARKERS[i % len(MARKERS)], "markevery": (3 * i, 25), "markersize": 4}
        axes.plot(grid, iqm(values), color=color, linestyle=style, linewidth=1.8, label=row, **marks)
        if few:
            axes.fill_between(grid, *interval(values, n_resamples=2000), color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="seconds" if seconds else "environment steps", ylabel="training return")
    axes.grid(alpha=0.3)
    axes.yaxis.set_major_formatter(THOUSANDS)
    scale(axes, "log" if ends and max(ends) > 5 * min(ends) else "linear")
    if axes.get_xscale() == "log":
        axes.set_xlim(left=min(ends) / 100)


def draw_values(axes, values: dict[str, list[float]], unit: str, log: bool = False):
    """row -> a value for each seed: a dot each, or an arrow where it is a bound, as then the IQM is; and interval."""
    labels = []
    for i, (row, each) in enumerate(values.items()):
        bounds = [isinstance(value, AtLeast) for value in each]
        for value, bound, beside in zip(each, bounds, np.linspace(-0.25, 0.25, len(each) + 2)[1:-1]):
            axes.plot(
                value, i + beside, ">" if bound else "o", color="grey", markersize=4, alpha=0.6, markeredgewidth=0
            )
        axes.plot(iqm(each), i, "k>" if any(bounds) else "k|", markersize=9 if any(bounds) else 14, markeredgewidth=2)
        axes.plot(interval(each), [i, i], "k-", linewidth=1)
        labels.append(row + (" (not reached)" if all(bounds) else " (at least)" if any(bounds) else ""))
        if i % 2:
            axes.axhspan(i - 0.5, i + 0.5, color="black", alpha=0.05, linewidth=0)  # whose dots these are
    axes.set_yticks(range(len(values)), labels)
    axes.set(xlabel=unit, ylim=((len(values) or 1) - 0.5, -0.5))
    axes.grid(alpha=0.3, axis="x")
    scale(axes, "linear" if not log else "log" if axes.dataLim.xmin > 0 else "symlog")


def scale(axes, name: str):
    if name == "linear":
        axes.xaxis.set_major_locator(plt.MaxNLocator(4))
        axes.xaxis.set_major_formatter(THOUSANDS)
    elif name == "log":
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=10)
        axes.xaxis.get_major_locator().set_params(numticks=7)
        axes.margins(x=0.05)  # anew, for this scale


def plot_claim(claim, data: Path, folder: Path) -> Path | None:
    """For every task its curves, and, if there are several seeds, the claim's first measure beside them.

    None if there is no data.
    """
    runs = runs_of(claim, data)
    keys = set(map(key, runs))
    points = [point for point in read(data / f"{claim.name}.curves.csv") if key(point) in keys]
    tasks = [task for task in claim.tasks if any(run["task"] == task for run in runs)]
    if not tasks:
        return None
    only_measures = claim.one_row_a_task()
    one_seed = len({run["seed"] for run in runs}) == 1
    columns = 1 if only_measures or one_seed else 2
    height = max(3.3, 1.2 + 0.3 * max(len(claim.tasks[task]) for task in tasks))
    figure = plt.figure(figsize=(5.2 * columns, 0.4 + height * len(tasks)), layout="constrained")
    for task, part in zip(tasks, figure.subfigures(len(tasks), squeeze=False).flat):
        axes = part.subplots(1, columns, squeeze=False)[0]
        rows = [row for row in claim.tasks[task] if any((run["task"], run["row"]) == (task, row) for run in runs)]
        if only_measures:
            values = {name: sample(runs, task, "", name) for name in claim.measures}
            values = {name: each for name, each in values.items() if each and None not in each}
            draw_values(axes[0], values, "variance / squared length of the expected gradient", claim.log)
        else:
            if not one_seed:
                name = claim.measures[0]
                values = {row: sample(runs, task, row, name) for row in rows}
                values = {row: each for row, each in values.items() if each and None not in each}
                draw_values(axes[1], values, UNITS.get(name, name), claim.log)
            lines = {}
            for row in rows:
                seeds = {}
                for point in points:
                    if (point["task"], point["row"]) == (task, row):
                        seeds.setdefault(point["seed"], []).append(
                            [float(point[column]) for column in ("env_steps", "seconds", "return")]
                        )
                lines |= {row: [np.array(seed) for seed in seeds.values()]} if seeds else {}  # no episode has ended
            draw_curves(axes[0], lines, claim.x == "seconds")
            if lines:
                part.legend(ncols=4, **LEGEND)
        axes[0].set_title(task, fontsize=10)
    return save(figure, folder / f"claim_{claim.name}.png", Description=digest(claim, data))


def digest(claim, data: Path) -> str:
    """Of the data that a figure shows; it is kept in the picture, so that one of older data can be told."""
    runs = [[*key(run), *map(run.get, claim.measures)] for run in read(data / f"{claim.name}.runs.csv")]
    curves = (data / f"{claim.name}.curves.csv").read_bytes()
    return hashlib.sha256(repr(runs).encode() + curves).hexdigest()[:16]


def plot_runs(groups: dict[str, list[tuple]], out: Path, seconds: bool = False) -> Path:
    """label -> (training episodes, environment steps) of each run."""
    lines = {f"{label} ({len(runs)})": [np.array(curve(*run)) for run in runs] for label, runs in groups.items()}
    figure, axes = plt.subplots(figsize=(7, 4 + 0.15 * len(lines)), layout="constrained")
    draw_curves(axes, lines, seconds)
    figure.legend(**LEGEND)
    return save(figure, out)


def save(figure, path: Path, **metadata) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None} | metadata)
    plt.close(figure)
    return path
