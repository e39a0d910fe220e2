"""The README's table of a2c_sync.py:  python experiments/a2c_table.py  [--task CartPole-v1]

Runs every task with several seeds and prints a row each: greedy evaluation (20 episodes a seed), mean ± std over seeds.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from runs import ROOT, mean_std, run_all

TASKS = {
    "CartPole-v1": "",
    "Acrobot-v1": "--env-id Acrobot-v1 --actor-lr 1e-3 --total-timesteps 500000",
    "LunarLander-v3": "--env-id LunarLander-v3 --num-steps 16 --actor-lr 1e-3 --critic-lr 5e-3 --ent-coef 0.1 --total-timesteps 3000000",
    "InvertedPendulum-v5": "--env-id InvertedPendulum-v5 --actor-lr 3e-3 --ent-coef 0 --total-timesteps 200000",
}


@dataclass
class Options:
    task: str | None = None
    """one of the tasks; by default all of them"""
    seeds: int = 5
    """seeds 1 to this"""
    at_a_time: int = 2
    """runs in parallel, one thread each"""
    out: str = "runs/a2c_table"
    """folder of the runs; those that are there are not run again"""


def main(options: Options):
    print(
        "| Environment | flags | steps | minutes | greedy return | each seed | steps/s |\n|---|---|---|---|---|---|---|"
    )
    for task in [options.task] if options.task else TASKS:
        out = Path(options.out).absolute()
        jobs = [
            (ROOT / "a2c_sync.py", TASKS[task], seed, out / f"{task}__{seed}") for seed in range(1, options.seeds + 1)
        ]
        runs = run_all(jobs, options.at_a_time)
        returns = [run["eval_return_mean"] for run in runs]
        print(
            f"| {task} | `{TASKS[task]}` | {runs[0]['env_steps']:,} | {mean_std([r['seconds'] / 60 for r in runs])} "
            f"| {mean_std(returns)} | {', '.join(f'{r:.0f}' for r in returns)} | {mean_std([r['sps'] for r in runs], 0)} |",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
