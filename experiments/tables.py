"""The README's tables: every row a command with several seeds, greedy evaluation (20 episodes a seed).

    python experiments/tables.py a2c                        minutes
    python experiments/tables.py a2c --row CartPole-v1
    python experiments/tables.py a3c --at-a-time 1          its runs have worker processes of their own
    python experiments/tables.py lag --at-a-time 1          return against lag
    python experiments/tables.py bias --at-a-time 1         gradients of old and of new parameters, of old actions
    python experiments/tables.py sac                        hours; needs pip install -e ".[bench,mujoco]"

Prints mean ± std over seeds; "worst" is the lowest mean of 20 training episodes in a row in a run's second half.
The folders of the runs are what experiments/plot.py wants.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from runs import ROOT, mean_std, run_all, worst_return

LUNAR = (
    "--env-id LunarLander-v3 --optimizer adam --num-envs 8 --num-steps 5 "
    "--actor-lr 5e-4 --critic-lr 3e-3 --ent-coef 0.05 --total-timesteps 2000000"
)
SAME = "--total-timesteps 100000 --learning-starts 10000"  # for both of the scripts compared
OURS = f"{SAME} --critic-lr 3e-4"  # the other's only learning rate
LAGGARDS = [f"--num-workers {num}" for num in (1, 2, 4, 8, 16)]  # without, then with a slow one among four
LAGGARDS += [f"--slow-worker {flags}" for flags in ("0.01", "0.1", "0.1 --max-lag 8")]
TABLES = {  # row: script, flags, seeds
    "a2c": {
        "CartPole-v1": ("a2c_sync.py", "", 5),
        "Acrobot-v1": ("a2c_sync.py", "--env-id Acrobot-v1 --total-timesteps 200000", 5),
        "LunarLander-v3": ("a2c_sync.py", LUNAR, 5),
        "InvertedPendulum-v5": ("a2c_sync.py", "--env-id InvertedPendulum-v5 --ent-coef 0 --total-timesteps 200000", 5),
    },
    "a3c": {
        f"{env_id} {update}": ("a3c_async.py", f"--env-id {env_id} --update {update} {flags}", 5)
        for env_id, flags in {"CartPole-v1": "", "Acrobot-v1": "--total-timesteps 200000"}.items()
        for update in ("pooled", "hogwild")
    },
    "lag": {
        f"{update} {flags}": ("a3c_async.py", f"--update {update} {flags} --total-timesteps 100000", 3)
        for update in ("pooled", "hogwild")
        for flags in LAGGARDS
    },
    "bias": {  # small batches and high rates, with which a bias shows
        f"{script} {flags}": (script, f"{flags} --actor-lr 5e-3 --total-timesteps 300000", 5)
        for script, flags in (
            ("a2c_sync.py", "--num-envs 4"),
            ("a3c_async.py", "--update hogwild"),
            ("a3c_async.py", "--update pooled --batch-size 32"),
            ("a3c_async.py", "--update pooled --batch-size 32 --max-lag 0"),
        )
    },
    "sac": {
        "Pendulum-v1": ("sac.py", "--total-timesteps 10000", 5),
        "HalfCheetah-v5 sac.py": ("sac.py", f"--env-id HalfCheetah-v5 {OURS}", 3),
        "HalfCheetah-v5 Stable-Baselines3": ("experiments/sb3_sac.py", f"--env-id HalfCheetah-v5 {SAME}", 3),
        "Hopper-v5 sac.py": ("sac.py", f"--env-id Hopper-v5 {OURS}", 3),
        "Hopper-v5 Stable-Baselines3": ("experiments/sb3_sac.py", f"--env-id Hopper-v5 {SAME}", 3),
    },
}


@dataclass
class Options:
    table: tyro.conf.Positional[Literal["a2c", "a3c", "lag", "bias", "sac"]]
    """which table"""
    row: str | None = None
    """rows whose name begins so; by default all"""
    at_a_time: int = 2
    """runs in parallel"""
    out: str = "runs/tables"
    """folder of the runs; those that are there are not run again"""


def main(options: Options):
    print("| | flags | steps | minutes | greedy return | each seed | steps/s | worst | lag |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row, (script, flags, seeds) in TABLES[options.table].items():
        if not row.startswith(options.row or ""):
            continue
        out = Path(options.out).absolute() / options.table
        jobs = [(ROOT / script, flags, seed, out / f"{row}__{seed}") for seed in range(1, seeds + 1)]
        runs = run_all(jobs, options.at_a_time)
        returns = [run["eval_return_mean"] for run in runs]
        minutes, speed = mean_std([r["seconds"] / 60 for r in runs]), mean_std([r["sps"] for r in runs], 0)
        each = ", ".join(f"{r:.0f}" for r in returns)
        lag = ""
        if "lag_mean" in runs[0]:
            lag = f"{mean_std([r['lag_mean'] for r in runs])}, at most {max(r['lag_max'] for r in runs)}"
        worst = ", ".join(f"{worst_return(folder):.0f}" for *_, folder in jobs)
        cells = row, f"`{flags}`", f"{runs[0]['env_steps']:,}", minutes, mean_std(returns), each, speed, worst, lag
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
