"""The README's table of sac.py, next to Stable-Baselines3's SAC with the same settings, and the figure of both:

    pip install -e ".[bench,mujoco,plot]"
    python experiments/sac_table.py                       hours on two cores
    python experiments/sac_table.py --task Pendulum-v1    five seeds in minutes; no comparison

Prints a row for every task and script: greedy evaluation (20 episodes a seed), mean ± std over seeds.
"""

from dataclasses import dataclass
from pathlib import Path

import plot
import tyro
from runs import ROOT, mean_std, run_all

MUJOCO = "--total-timesteps 100000 --learning-starts 10000 --num-threads 1"
TASKS = {  # flags of both scripts, seeds
    "Pendulum-v1": ("--total-timesteps 10000 --num-threads 1", 5),
    "HalfCheetah-v5": (MUJOCO, 3),
    "Hopper-v5": (MUJOCO, 3),
}
SCRIPTS = {"sac.py": ROOT / "sac.py", "Stable-Baselines3": ROOT / "experiments" / "sb3_sac.py"}


@dataclass
class Options:
    task: str | None = None
    """one of the tasks; by default all of them"""
    at_a_time: int = 2
    """runs in parallel, one thread each"""
    out: str = "runs/sac_table"
    """folder of the runs; those that are there are not run again"""
    figures: str = "docs/figures"
    """folder of the figures"""


def main(options: Options):
    print(
        "| Environment | script | steps | minutes | greedy return | each seed | steps/s |\n|---|---|---|---|---|---|---|"
    )
    for task in [options.task] if options.task else TASKS:
        flags, seeds = TASKS[task]
        scripts = SCRIPTS if task != "Pendulum-v1" else {"sac.py": SCRIPTS["sac.py"]}
        jobs = [
            (script, f"--env-id {task} {flags}", seed, Path(options.out).absolute() / task / f"{name}__{seed}")
            for seed in range(1, seeds + 1)
            for name, script in scripts.items()
        ]
        results = run_all(jobs, options.at_a_time)
        for i, name in enumerate(scripts):
            runs = results[i :: len(scripts)]
            returns = [run["eval_return_mean"] for run in runs]
            print(
                f"| {task} | {name} | {runs[0]['env_steps']:,} | {mean_std([r['seconds'] / 60 for r in runs])} "
                f"| {mean_std(returns)} | {', '.join(f'{r:.0f}' for r in returns)} | {mean_std([r['sps'] for r in runs], 0)} |",
                flush=True,
            )
        picture = Path(options.figures) / f"sac_{task.partition('-')[0].lower()}.png"
        plot.main(plot.Options([str(job[3]) for job in jobs], str(picture)))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
