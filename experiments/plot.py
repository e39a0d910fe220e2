"""Training return of runs over environment steps, mean and standard deviation over runs of the same folder name:

    python experiments/plot.py runs/tables/a2c/CartPole-v1__1 runs/tables/a2c/CartPole-v1__2 --out curve.png

Needs the extra: pip install -e ".[plot]"
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from runs import training_episodes


@dataclass
class Options:
    run_dirs: tyro.conf.Positional[list[str]]
    """run folders; names that differ only behind the last __ are seeds of one curve"""
    out: str = "curve.png"
    """picture to write"""
    points: int = 50
    """points of a curve, each the mean over the episodes that ended in its share of the steps"""


def main(options: Options):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {}
    for run_dir in map(Path, options.run_dirs):
        groups.setdefault(run_dir.name.rpartition("__")[0] or run_dir.name, []).append(training_episodes(run_dir))
    figure, axes = plt.subplots(figsize=(6, 3.2 + 0.25 * len(groups)))
    for name, runs in groups.items():
        edges = np.linspace(0, max(run[-1][0] for run in runs), options.points + 1)
        curves = np.full((len(runs), options.points), np.nan)
        for i, run in enumerate(runs):
            steps, _, values = np.array(run).T
            share = np.digitize(steps, edges[1:-1])
            for k in np.unique(share):
                curves[i, k] = values[share == k].mean()
        filled = ~np.isnan(curves).all(0)
        centres, curves = ((edges[1:] + edges[:-1]) / 2)[filled], curves[:, filled]
        mean, spread = np.nanmean(curves, 0), np.nanstd(curves, 0)
        label = name.replace("__", ", ")
        axes.plot(centres, mean, label=f"{label} ({len(runs)} run{'s' * (len(runs) > 1)})")
        if len(runs) > 1:
            axes.fill_between(centres, mean - spread, mean + spread, alpha=0.2)
    axes.set(xlabel="environment steps", ylabel="training return")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)  # above the curves
    figure.tight_layout()
    figure.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
