"""off_policy_ac.py, its lecture's mistakes (D9), alternatives (D12, D13) and what the default needs beyond the lecture:

    python experiments/off_policy_variants.py                         every variant, both tasks, 5 seeds: hours
    python experiments/off_policy_variants.py --only default          the README's rows
    python experiments/off_policy_variants.py --task Pendulum-v1 --seeds 1

Prints a row per variant: greedy evaluation (20 episodes a seed), mean ± std over seeds, and the steps after which 20
training episodes in a row had a mean return of 475 (Pendulum: -200), over the seeds that got there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from runs import ROOT, mean_std, run_all, variant

TASKS = {  # flags, and the training return that counts as solved
    "CartPole-v1": ("", 475),
    "Pendulum-v1": ("--env-id Pendulum-v1 --total-timesteps 15000", -200),
}
A2C = "a2c_sync.py, its defaults"
VARIANTS = {
    A2C: "",  # for comparison; on CartPole-v1, for which they are made
    "default": "",
    "naive: V, buffer's actions (D9a, D9b)": "--critic v --actor-actions buffer",
    "naive actor only (D9b)": "--actor-actions buffer",
    "naive critic, importance weights (D9a, D12)": "--critic v --actor-actions importance",
    "importance weights (D12)": "--actor-actions importance",
    "no baseline, K = 1 (D13)": "--baseline none --num-action-samples 1",
    "no baseline, K = 8": "--baseline none",
    "no baseline, K = 64": "--baseline none --num-action-samples 64",
    "K = 2": "--num-action-samples 2",
    "no entropy bonus": "--ent-coef 0",
    "no target network": "--tau 1",
    "constant learning rates": "--no-lr-decay",
    "64 units": "",
}
NARROW = {
    "num_features = 256": "num_features = 64",
    "nn.Linear(num_inputs, 256)": "nn.Linear(num_inputs, 64)",
    "nn.Linear(256, 256)": "nn.Linear(64, 64)",
}


@dataclass
class Options:
    task: Literal["CartPole-v1", "Pendulum-v1"] | None = None
    """one of the tasks; by default both"""
    only: str | None = None
    """variants whose name contains this; by default all"""
    seeds: int = 5
    """seeds 1 to this"""
    at_a_time: int = 2
    """runs in parallel, one thread each"""
    out: str = "runs/off_policy_variants"
    """folder of the runs; those that are there are not run again"""


def folder(name: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in name).split())


def main(options: Options):
    print(
        "| task | variant | greedy return | each seed | solved | after steps | steps/s |\n|---|---|---|---|---|---|---|"
    )
    for task in [options.task] if options.task else TASKS:
        flags, threshold = TASKS[task]
        for name, extra in VARIANTS.items():
            if (options.only or "") not in name or (name == A2C and task != "CartPole-v1"):
                continue
            out = Path(options.out).absolute() / f"{task}__{folder(name)}"
            script = ROOT / ("a2c_sync.py" if name == A2C else "off_policy_ac.py")
            if name == "64 units":
                script = variant(out.parent, "off_policy_ac", "narrow", NARROW)
            jobs = [
                (script, f"{flags} {extra}", seed, Path(f"{out}__{seed}"), threshold, 20)
                for seed in range(1, options.seeds + 1)
            ]
            runs = run_all(jobs, options.at_a_time)
            solved = [r["solved_steps"] for r in runs if r["solved_steps"]]
            returns = [r["eval_return_mean"] for r in runs]
            print(
                f"| {task} | {name} | {mean_std(returns)} | {', '.join(f'{r:.0f}' for r in returns)} "
                f"| {len(solved)} of {len(runs)} | {mean_std(solved, 0) if solved else ''} "
                f"| {mean_std([r['sps'] for r in runs], 0)} |",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
