"""Pictures of claims and of run folders, readable in black and white. Needs the extra: pip install -e ".[plot]" """

import hashlib
import textwrap
from pathlib import Path

import matplotlib
import numpy as np

from experiments.judge import RATES, AtLeast, Reach, interval, iqm
from experiments.runner import curve, key, points_of, read, runs_of, sample

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LINES, COLORS = ["-", "--", "-."], ["C0", "C1", "C2"]
# Below the axes, where it hides nothing, with handles long enough to tell the lines by
LEGEND = {"loc": "outside lower center", "handlelength": 4, "frameon": False, "fontsize": 8}
THOUSANDS = plt.FuncFormatter(lambda value, _: f"{value:,.10g}")
README = ("naive", "CartPole-v1"), ("peer-sac-million", "HalfCheetah-v5")  # what its picture shows
UNITS = {
    "return": "greedy return, 100 episodes",
    "training return": "mean training return",
    "seconds": "seconds",
    "overestimation": "Q − the discounted return that followed",
    "steps to 475": "environment steps to a return of 475",
    "seconds to 475": "seconds to a return of 475",
    "seconds to 400": "seconds to a return of 400",
}


def draw_line(axes, seeds: list[np.ndarray], column: int, color, style: str, label: str | None = None, every=True):
    """IQM of the seeds' curves (points, 3) of env_steps, seconds, return; with `every` thin lines and an interval."""
    grid = np.linspace(0, min(each[-1, column] for each in seeds), 101)[1:]
    grid = grid[grid >= max(each[0, column] for each in seeds)]  # where every seed has finished an episode
    values = np.stack([np.interp(grid, each[:, column], each[:, 2]) for each in seeds], 1)
    axes.plot(grid, iqm(values), color=color, linestyle=style, linewidth=1.8 if every else 1.2, label=label)
    if every:
        for each in seeds:
            axes.plot(each[:, column], each[:, 2], color=color, linewidth=0.4, alpha=0.5)
        axes.fill_between(grid, *interval(values, n_resamples=2000), color=color, alpha=0.15, linewidth=0)


def draw_curves(part, lines: dict[str, list[np.ndarray]], seconds: bool = False, title: str = ""):
    """row -> a curve of each seed; up to three rows in one picture, more in one each, beside the first row in grey.

    The axis is logarithmic if some rows are much longer than others.
    """
    column = 1 if seconds else 0
    ends = [each[-1, column] for seeds in lines.values() for each in seeds]
    if few := len(lines) <= 3:
        grid = part.subplots(1, 1, squeeze=False)
    else:
        across = 3 if len(lines) <= 9 else 4
        grid = part.subplots(-(-len(lines) // across), across, sharex=True, sharey=True, squeeze=False)
        part.supxlabel("seconds" if seconds else "environment steps", fontsize=8)
        part.supylabel("training return", fontsize=8)
    part.suptitle(title, fontsize=10)
    first = next(iter(lines.values()), None)
    for i, (row, seeds) in enumerate(lines.items()):
        axes = grid.flat[0 if few else i]
        if not few and seeds is not first:
            draw_line(axes, first, column, "grey", "--", every=False)
        draw_line(axes, seeds, column, COLORS[i if few else 0], LINES[i] if few else "-", row)
        if not few:
            axes.set_title("\n".join(textwrap.wrap(row, 24)), fontsize=7)
            axes.tick_params(labelsize=7)
    for axes in grid.flat[len(lines) :] if not few else ():
        axes.set_visible(False)
    for axes in grid.flat:
        if few:
            axes.set(xlabel="seconds" if seconds else "environment steps", ylabel="training return")
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter(THOUSANDS)
        scale(axes, "log" if ends and max(ends) > 5 * min(ends) else "linear", 4 if few else 2)
        if axes.get_xscale() == "log":
            axes.set_xlim(left=min(ends) / 100)
    return grid.flat[0]


def draw_values(axes, values: dict[str, list[float]], unit: str, log: bool = False, marks: dict[str, float] = {}):
    """row -> a value for each seed: a dot each, or an arrow where it is a bound, as then the IQM is; and interval.

    `marks`: values to compare with, such as an aim; a line each.
    """
    labels = []
    for i, (row, each) in enumerate(values.items()):
        bounds = [isinstance(value, AtLeast) for value in each]
        for value, bound, beside in zip(each, bounds, np.linspace(-0.25, 0.25, len(each) + 2)[1:-1]):
            axes.plot(
                value, i + beside, ">" if bound else "o", color="grey", markersize=4, alpha=0.6, markeredgewidth=0
            )
        axes.plot(iqm(each), i, "k>" if any(bounds) else "k|", markersize=9 if any(bounds) else 14, markeredgewidth=2)
        axes.plot(interval(each), [i, i], "k-", linewidth=1)
        name = next((rate.strip(", ") for rate in RATES if row.endswith(rate)), row)
        labels.append(name + (" (not reached)" if all(bounds) else " (at least)" if any(bounds) else ""))
        if i % 2:
            axes.axhspan(i - 0.5, i + 0.5, color="black", alpha=0.05, linewidth=0)  # whose dots these are
    draw_marks(axes.axvline, marks)
    axes.set_yticks(range(len(values)), labels, fontsize=8)
    axes.set(xlabel=unit, ylim=((len(values) or 1) - 0.5, -0.5))
    axes.grid(alpha=0.3, axis="x")
    scale(axes, "linear" if not log else "log" if axes.dataLim.xmin > 0 else "symlog")


def draw_marks(line, marks: dict[str, float]):
    """Thin lines that a legend can name, told apart by their dots and dashes."""
    for i, (name, value) in enumerate(marks.items()):
        line(value, color="black", linewidth=0.9, linestyle=(0, (1 + 3 * i, 2)), label=f"{name}: {value:,.10g}")


def scale(axes, name: str, ticks: int = 4):
    if name == "linear":
        axes.xaxis.set_major_locator(plt.MaxNLocator(ticks))
        axes.xaxis.set_major_formatter(THOUSANDS)
    elif name == "log":
        axes.set_xscale("log")
        axes.tick_params(axis="x", which="minor", labelsize=7)
    else:
        axes.set_xscale("symlog", linthresh=10)
        axes.xaxis.get_major_locator().set_params(numticks=7)
        axes.margins(x=0.05)  # anew, for this scale


def plot_claim(claim, data: Path, folder: Path) -> Path | None:
    """For every task its curves, and, if there are several seeds, the claim's first measure beside them.

    None if there is no data.
    """
    runs = runs_of(claim, data)
    points = points_of(claim, runs, data)
    tasks = [task for task in claim.tasks if any(run["task"] == task for run in runs)]
    if not tasks:
        return None
    only_measures, one_seed = claim.one_row_a_task(), len({run["seed"] for run in runs}) == 1
    heights = []
    for task in tasks:
        plain = sum(not row.endswith(RATES) for row in claim.tasks[task])
        grid = 0 if plain <= 3 else 1.25 * -(-plain // (3 if plain <= 9 else 4))
        heights.append(max(3.3, 1.0 + grid, 1.2 + 0.24 * len(only_measures and claim.measures or claim.tasks[task])))
    columns = 1 if only_measures or one_seed else 2
    figure = plt.figure(figsize=(5.4 * columns, 0.4 + sum(heights)), layout="constrained")
    parts = figure.subfigures(len(tasks), squeeze=False, height_ratios=heights).flat
    for task, part in zip(tasks, parts):
        rows = [row for row in claim.tasks[task] if any((run["task"], run["row"]) == (task, row) for run in runs)]
        marks = {
            "aim": each.at_least
            for each in claim.expected
            if isinstance(each, Reach) and (each.task or task, each.measure) == (task, "return")
        } | claim.published.get(task, {})
        if only_measures:
            values = {name: sample(runs, task, "", name) for name in claim.measures}
            values = {name: each for name, each in values.items() if each and None not in each}
            axes = part.subplots()
            axes.set_title(task, fontsize=10)
            draw_values(axes, values, "variance / squared length of the expected gradient", claim.log)
            continue
        left, *right = part.subfigures(1, columns, squeeze=False).flat
        lines = curves_of(points, task, rows)
        axes = draw_curves(left, lines, claim.x == "seconds", task)
        if one_seed:
            draw_marks(axes.axhline, {f"{name} (greedy)": value for name, value in marks.items()})
        if lines and (one_seed or 1 < len(lines) <= 3):
            left.legend(ncols=1 if one_seed else 2, **LEGEND)
        for each in right:
            name = claim.measures[0]
            values = {row: sample(runs, task, row, name) for row in rows}
            values = {row: each for row, each in values.items() if each and None not in each}
            axes = each.subplots()
            draw_values(axes, values, UNITS.get(name, name), claim.log, marks if name == "return" else {})
            if name == "return" and marks:
                each.legend(ncols=2, **LEGEND)
    return save(figure, folder / f"claim_{claim.name}.png", Description=digest(claim, data))


def curves_of(points: list[dict], task: str, rows: list[str]) -> dict[str, list[np.ndarray]]:
    """row -> curves of its seeds; rows in which no episode has ended, and those of other rates, are left out."""
    lines = {}
    for row in (row for row in rows if not row.endswith(RATES)):
        seeds = {}
        for point in points:
            if (point["task"], point["row"]) == (task, row):
                values = [float(point[column]) for column in ("env_steps", "seconds", "return")]
                seeds.setdefault(point["seed"], []).append(values)
        lines |= {row: [np.array(seed) for seed in seeds.values()]} if seeds else {}
    return lines


def plot_readme(claims, data: Path, folder: Path) -> Path:
    """README's picture: one claim, and one comparison with a peer."""
    claims = {claim.name: claim for claim in claims}
    figure = plt.figure(figsize=(10.4, 3.8), layout="constrained")
    for part, (name, task) in zip(figure.subfigures(1, 2), README):
        points = points_of(claims[name], runs_of(claims[name], data), data)
        lines = curves_of(points, task, list(claims[name].tasks[task]))
        draw_curves(part, lines, title=f"{task}, claim {name}")
        part.legend(ncols=1 if len(lines) > 2 else 2, **LEGEND)
    return save(figure, folder / "readme.png", Description=" ".join(digest(claims[name], data) for name, _ in README))


def digest(claim, data: Path) -> str:
    """Of the data that a figure shows; it is kept in the picture, so that one of older data can be told."""
    runs = [[*key(run), *map(run.get, claim.measures)] for run in read(data / f"{claim.name}.runs.csv")]
    curves = (data / f"{claim.name}.curves.csv").read_bytes()
    return hashlib.sha256(repr(runs).encode() + curves).hexdigest()[:16]


def plot_runs(groups: dict[str, list[tuple]], out: Path, seconds: bool = False) -> Path:
    """label -> (training episodes, environment steps) of each run."""
    lines = {f"{label} ({len(runs)})": [np.array(curve(*run)) for run in runs] for label, runs in groups.items()}
    few = len(lines) <= 3
    figure = plt.figure(figsize=(7, 4) if few else (9, 1 + 1.6 * -(-len(lines) // 3)), layout="constrained")
    draw_curves(figure, lines, seconds)
    if few:
        figure.legend(**LEGEND)
    return save(figure, out)


def save(figure, path: Path, **metadata) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None} | metadata)
    plt.close(figure)
    return path
