"""Speed of a2c_sync.py next to Stable-Baselines3's A2C, measured in turn in one run, on CartPole-v1:

    pip install -e ".[bench]"
    python experiments/speed.py                  all three parts, about ten minutes
    python experiments/speed.py --part equal     the same settings for both: steps per second
    python experiments/speed.py --part native    256 environments of gymnasium's native vector kind
    python experiments/speed.py --part solve     seconds until 100 episodes have a mean training return of 475

Every measurement is a process of its own with one thread. Machines vary by the minute: read the ratios.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Literal

import tyro
from runs import call, run

EQUAL = dict(
    num_envs=8, num_steps=5, gamma=0.99, gae_lambda=1.0, ent_coef=0.0, learning_rate=7e-4
)  # SB3's defaults and zoo
OURS_EQUAL = "--num-envs 8 --num-steps 5 --gae-lambda 1 --ent-coef 0 --optimizer rmsprop --actor-lr 7e-4 --no-lr-decay"


@dataclass
class Options:
    part: Literal["all", "equal", "native", "solve"] = "all"
    """which comparison to run"""
    rounds: int = 3
    """how often each side of `equal` and `native` is measured, in turn"""
    seeds: int = 5
    """seeds of `solve`"""
    worker: str | None = None
    """internal: one measurement of the other side"""


def ours(flags: str, total_timesteps: int, seed: int = 1) -> dict:
    """One run of a2c_sync.py, with the seconds after which 100 episodes had a mean return of 475."""
    flags = f"--total-timesteps {total_timesteps} --eval-episodes 10 {flags}"
    with tempfile.TemporaryDirectory() as folder:
        return run("a2c_sync.py", flags, seed, Path(folder) / "run", threshold=475)


def theirs(**spec) -> dict:
    return json.loads(call(__file__, "--worker", json.dumps(spec)).splitlines()[-1])


def sb3_worker(total_timesteps: int, seed: int, until_solved: bool) -> dict:
    """Stable-Baselines3's A2C with its zoo's settings for CartPole-v1."""
    import resource

    import numpy as np
    import torch
    from stable_baselines3 import A2C
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)

    class UntilSolved(BaseCallback):
        def _on_step(self):
            buffer = self.model.ep_info_buffer
            return not (until_solved and len(buffer) == 100 and np.mean([e["r"] for e in buffer]) >= 475)

    model = A2C(
        "MlpPolicy", make_vec_env("CartPole-v1", EQUAL["num_envs"], seed=seed), seed=seed, device="cpu",
        n_steps=EQUAL["num_steps"], gamma=EQUAL["gamma"], gae_lambda=EQUAL["gae_lambda"],
        ent_coef=EQUAL["ent_coef"], learning_rate=EQUAL["learning_rate"],
    )  # fmt: skip
    start = time.perf_counter()
    model.learn(total_timesteps, callback=UntilSolved())
    seconds = time.perf_counter() - start
    solved = until_solved and model.num_timesteps < total_timesteps
    return {
        "sps": model.num_timesteps / seconds,
        "solved_steps": model.num_timesteps if solved else None,
        "solved_seconds": seconds if solved else None,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def raw_worker(num_envs: int, seconds: float) -> dict:
    """The native vector environment alone, with constant random actions."""
    import gymnasium as gym

    envs = gym.make_vec("CartPole-v1", num_envs=num_envs)
    envs.reset(seed=0)
    envs.action_space.seed(0)
    actions, steps, start = envs.action_space.sample(), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        envs.step(actions)
        steps += num_envs
    return {"sps": steps / (time.perf_counter() - start)}


def line(name: str, values: list[dict], key: str = "sps", digits: int = 0):
    shown = " ".join("never" if v[key] is None else f"{v[key]:,.{digits}f}" for v in values)
    memory = (
        f"   peak memory {max(v['peak_memory_mb'] for v in values):.0f} MB" if "peak_memory_mb" in values[0] else ""
    )
    print(f"  {name:<40}{shown}{memory}", flush=True)


def equal(options: Options):
    print(f"Equal settings: 8 environments x 5 steps, one thread, steps per second in {options.rounds} rounds")
    a, b = [], []
    for _ in range(options.rounds):
        a.append(ours(OURS_EQUAL, 200_000))
        b.append(theirs(total_timesteps=100_000, seed=1, until_solved=False))
    line("a2c_sync.py", a)
    line("Stable-Baselines3", b)
    ratios = [x["sps"] / y["sps"] for x, y in zip(a, b)]
    print(f"  ratio {median(ratios):.2f} (median; {' '.join(f'{r:.2f}' for r in ratios)})", flush=True)


def native(options: Options):
    print(f"256 native environments x 16 steps, one thread, steps per second in {options.rounds} rounds")
    a, b = [], []
    for _ in range(options.rounds):
        a.append(ours("--num-envs 256 --num-steps 16", 3_000_000))
        b.append(theirs(raw=True, num_envs=256, seconds=5.0))
    line("a2c_sync.py", a)
    line("the environments alone", b)


def solve(options: Options):
    print(f"Seconds to a mean training return of 475 over 100 episodes, seeds 1 to {options.seeds}")
    a, b = [], []
    for seed in range(1, options.seeds + 1):
        a.append(ours("", 500_000, seed))
        b.append(theirs(total_timesteps=500_000, seed=seed, until_solved=True))
    for name, runs in (("a2c_sync.py, its defaults", a), ("Stable-Baselines3, its zoo's", b)):
        line(name + ": seconds", runs, "solved_seconds", 1)
        line(name + ": steps", runs, "solved_steps")
    if all(run["solved_seconds"] for run in a + b):
        ratio = mean(run["solved_seconds"] for run in a) / mean(run["solved_seconds"] for run in b)
        print(f"  ratio of the means {ratio:.2f}", flush=True)


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    if options.worker:
        spec = json.loads(options.worker)
        print(
            json.dumps(raw_worker(spec["num_envs"], spec["seconds"]) if spec.pop("raw", False) else sb3_worker(**spec))
        )
        sys.exit()
    for part in (equal, native, solve):
        if options.part in ("all", part.__name__):
            part(options)
