"""The tables of docs/speed.md: the scripts beside Stable-Baselines3 and SBX, in turn, each in a process of its own.

    pip install -e ".[mujoco,atari,bench]"
    python experiments/speed.py                  all parts, on a machine that does nothing else
    python experiments/speed.py --part sac       HalfCheetah-v5: sac.py, Stable-Baselines3, SBX
    python experiments/speed.py --part a2c       CartPole-v1: a2c_sync.py and Stable-Baselines3 with equal settings
    python experiments/speed.py --part replay    off_policy_ac.py with K = 10, eager and compiled
    python experiments/speed.py --part pixels    a2c_sync.py on Pong
    python experiments/speed.py --part a3c       a3c_async.py with one and two workers
    python experiments/speed.py --part step      where the time of a step of sac.py goes
    python experiments/speed.py --part busy      a step of sac.py beside other processes that compute
    python experiments/speed.py --part gpu       sac.py and a2c_sync.py on a GPU, where there is one

Machines vary by the minute, so read the ratios: they are those of the medians to the first row, or to SBX.
"""

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
CORES = os.cpu_count()


@dataclass
class Options:
    part: Literal["all", "sac", "a2c", "replay", "pixels", "a3c", "step", "busy", "gpu"] = "all"
    """which table to make"""
    rounds: int = 3
    """how often each row is measured, in turn with the others"""
    worker: str | None = None
    """internal: one measurement in a process of its own"""


def call(*words, **environment) -> str:
    """Standard output of a Python command in the repository's root; ends the comparison if it fails."""
    environment = os.environ | environment | {"PYTHONPATH": str(ROOT)}
    if "cuda" not in words:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def ours(script: str, flags: str, total_timesteps: int, after: int, log_every: int | None = None) -> float:
    """Steps per second of a run from `after` steps on, when it is warm.

    log_every: environment steps between logs; a short run has more of them than a long one.
    """
    code = f"import runpy, common.run; common.run.LOG_EVERY = {log_every}; runpy.run_path('{script}', None, '__main__')"
    with tempfile.TemporaryDirectory() as folder:
        run_dir, flags = Path(folder) / "run", f"--total-timesteps {total_timesteps} --eval-episodes 1 {flags}"
        call(*([script] if log_every is None else ["-c", code]), "--run-dir", run_dir, *flags.split())
        with open(run_dir / "metrics.csv") as file:
            rows = [(int(r["env_steps"]), float(r["seconds"])) for r in csv.DictReader(file)]
    steps, seconds = next(row for row in rows if row[0] >= after)
    return (rows[-1][0] - steps) / (rows[-1][1] - seconds)


def worker(name: str, environment: dict | None = None, **arguments):
    """One of the functions of WORKERS, in a process of its own."""
    words = json.dumps([name, arguments])
    return json.loads(call(__file__, "--worker", words, **(environment or {})).splitlines()[-1])


def compare(title: str, rows: dict, rounds: int):
    """A table: each row's median and range of steps per second, and its ratio to the first row's and to SBX's."""
    found = {name: [] for name in rows}
    for _ in range(rounds):
        for name, measure in rows.items():
            found[name].append(measure())
    middle = {name: median(values) for name, values in found.items()}
    others = [next(iter(rows)), *(name for name in rows if name == "SBX")]
    print(f"\n{title}; {rounds} rounds\n\n| | steps/s | {' | '.join(f'to {name}' for name in others)} |")
    print("|---|---|" + "---|" * len(others))
    for name, values in found.items():
        ratios = " | ".join(f"{middle[name] / middle[other]:.2f}" for other in others)
        print(f"| {name} | {middle[name]:,.0f} ({min(values):,.0f} to {max(values):,.0f}) | {ratios} |", flush=True)


# --- The parts --------------------------------------------------------------------------------------------------------

SAC_STEPS = 1_000, 1_500, 4_000  # the first update, from where on it is timed, the end


def sac(rounds: int):
    starts, after, total = SAC_STEPS
    rows = {"Stable-Baselines3, as it comes": lambda: worker("sb3_sac", library="stable_baselines3")}
    rows["Stable-Baselines3, one thread"] = lambda: worker("sb3_sac", library="stable_baselines3", num_threads=1)
    rows["SBX"] = lambda: worker("sb3_sac", library="sbx")
    for more in ("", " --num-threads 2", " --compile", " --compile --num-threads 2"):
        flags = f"--env-id HalfCheetah-v5 --learning-starts {starts}{more}"
        rows[f"`sac.py{more}`"] = lambda flags=flags: ours("sac.py", flags, total, after)
    compare("SAC, HalfCheetah-v5, one update a step", rows, rounds)


def a2c(rounds: int):
    flags = "--num-envs 8 --num-steps 5 --gae-lambda 1 --ent-coef 0 --actor-lr 7e-4 --no-lr-decay --max-grad-norm 0.5"
    rows = {"Stable-Baselines3": lambda: worker("sb3_a2c")}
    for more in ("", " --compile"):
        rows[f"`a2c_sync.py{more}`"] = lambda more=more: ours("a2c_sync.py", flags + more, 200_000, 50_000)
    compare("A2C, CartPole-v1, 8 environments x 5 steps, Stable-Baselines3's defaults for both", rows, rounds)


def replay(rounds: int):
    """Steps of four updates, so that the environment does not count."""
    for task in ("CartPole-v1", "HalfCheetah-v5"):
        flags = f"--env-id {task} --num-action-samples 10 --updates-per-step 4 --learning-starts 150"
        rows = {}
        for more in ("", " --compile"):
            words = flags + more
            rows[f"`off_policy_ac.py{more}`"] = lambda words=words: ours("off_policy_ac.py", words, 1_200, 600)
        compare(f"off_policy_ac.py, {task}, K = 10, four updates a step, one thread", rows, rounds)


PONG = "--env-id ALE/Pong-v5 --network shared"


def pixels(rounds: int, devices=("", " --num-threads 2"), total=12_000):
    rows = {}
    for more in (each + compiled for each in devices for compiled in ("", " --compile")):
        flags = f"{PONG} --optimizer adam --num-envs 8 --num-steps 16 --max-grad-norm 0.5{more}"
        rows[f"`a2c_sync.py{more}`"] = lambda flags=flags: ours("a2c_sync.py", flags, total, total // 3, total // 3)
    compare("A2C, Pong from pixels, 8 environments x 16 steps", rows, rounds)


def a3c(rounds: int):
    for title, flags, num_envs, total in (
        ("CartPole-v1, hogwild, 8 environments a worker", "", 8, 400_000),
        ("Pong from pixels, hogwild, 4 environments a worker", f"{PONG} --num-steps 16", 4, 9_000),
        ("Pong from pixels, pooled, 4 environments a worker", f"{PONG} --num-steps 16 --update pooled", 4, 9_000),
    ):
        rows = {}
        for num in (1, 2):
            words = f"{flags} --num-workers {num} --num-envs {num * num_envs}"
            rows[f"`--num-workers {num}`"] = lambda words=words, total=total: ours(
                "a3c_async.py", words, total, total // 3
            )
        compare(f"a3c_async.py, {title}", rows, rounds)


def step(rounds: int):
    found = []
    for compiled in (False, True):
        for num_threads in (1, CORES):
            spec = {"compiled": compiled, "num_threads": num_threads}
            each = [worker("sac_step", **spec) | worker("sac_step", **spec, profiled=True) for _ in range(rounds)]
            found.append({part: median(times[part] for times in each) for part in each[0]})
    columns = [f"{name}, {n} thread{'s' * (n > 1)}" for name in ("eager", "`--compile`") for n in (1, CORES)]
    print(f"\nA step of sac.py, HalfCheetah-v5, milliseconds; {rounds} rounds\n\n| | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    for part in found[0]:
        print(f"| {part} | {' | '.join(f'{times[part]:.2f}' for times in found)} |", flush=True)


def busy(_rounds: int):
    """Each row once, since differences are large."""
    loop, settings = [sys.executable, "-c", "while True: pass"], ((1, {}), (2, {}), (2, {"GOMP_SPINCOUNT": "1000"}))
    print(f"\nsac.py, HalfCheetah-v5, {CORES} cores, steps/s; one round\n")
    print("| busy processes beside it | 0 | 1 | 2 |")
    print("|---|---|---|---|")
    for compiled in (False, True):
        for num_threads, environment in settings:
            name = f"{'`--compile` ' * compiled}`--num-threads {num_threads}`"
            cells = [f"{name}{' with `GOMP_SPINCOUNT=1000`' if environment else ''}"]
            for others in range(3):
                processes = [subprocess.Popen(loop) for _ in range(others)]
                spec = {"compiled": compiled, "num_threads": num_threads, "steps": 200}
                try:
                    cells.append(f"{1e3 / worker('sac_step', environment, **spec)['a step']:,.0f}")
                finally:
                    for process in processes:
                        process.kill()
            print(f"| {' | '.join(cells)} |", flush=True)


def gpu(rounds: int):
    import torch

    if not torch.cuda.is_available():
        return print("\nno GPU here")
    flags, rows = "--env-id HalfCheetah-v5 --learning-starts 1000 --device cuda", {}
    for more in ("", " --compile"):
        rows[f"`sac.py{more}`"] = lambda more=more: ours("sac.py", flags + more, 12_000, 4_000)
    compare(f"SAC, HalfCheetah-v5, one update a step, {torch.cuda.get_device_name()}", rows, rounds)
    pixels(rounds, devices=[" --device cuda"], total=40_000)


# --- Measurements in processes of their own ---------------------------------------------------------------------------


def sb3_sac(library: str, num_threads: int | None = None) -> float:
    """Steps per second of another library's SAC on HalfCheetah-v5, with its defaults, and layers as in sac.py."""
    import importlib

    import gymnasium as gym
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    starts, after, total = SAC_STEPS

    class Clock(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == after:
                self.begin = time.perf_counter()
            return True

    clock, policy = Clock(), {"net_arch": [256, 256]}
    SAC = importlib.import_module(library).SAC
    SAC("MlpPolicy", gym.make("HalfCheetah-v5"), seed=1, learning_starts=starts, policy_kwargs=policy).learn(
        total, callback=clock
    )
    return (total - after) / (time.perf_counter() - clock.begin)


def sb3_a2c(total_timesteps: int = 100_000) -> float:
    """Steps per second of Stable-Baselines3's A2C with its defaults, eight environments and one thread."""
    import torch
    from stable_baselines3 import A2C
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    model = A2C("MlpPolicy", make_vec_env("CartPole-v1", 8, seed=1), seed=1, device="cpu")
    start = time.perf_counter()
    model.learn(total_timesteps)
    return model.num_timesteps / (time.perf_counter() - start)


GROUPS = {  # patterns of the profiler's names; the first that fits counts
    "products of matrices": r"(::|cpu_)b?(add)?b?mm",
    "random numbers": "randn|normal_|randint",
    "guards, and the call of the graph": "Dynamo|Torch-Compiled|Pregraph|AOTDispatcher|CompiledFxGraph",
    "Adam and Polyak, with what is fused into them": "adam|Adam|Optimizer|lerp|sqrt",
    "copies": "copy_|clone",
    "the rest: elementwise, sums, Python": "",
}


def sac_step(compiled: bool, num_threads: int, steps: int = 1_000, profiled: bool = False) -> dict:
    """Milliseconds of the parts of a step of sac.py, each timed between the others as in a run; of its update, when
    profiled: compiled kernels have names then, which costs time."""
    import numpy as np
    import torch
    from torch.profiler import ProfilerActivity, profile

    import sac
    from common.checkpoint import set_precision

    torch._inductor.config.cpp.enable_kernel_profile = profiled
    torch.set_num_threads(num_threads)
    set_precision("auto")
    args, device, clock = sac.Args(env_id="HalfCheetah-v5"), torch.device("cpu"), time.perf_counter
    envs = sac.make_envs(args)
    agent, buffer = sac.make_agent(envs, args), sac.RingBuffer(10_000, device)
    optimizer, update = sac.make_optimizer(agent, args), sac.update
    update = sac.compiled(update, device) if compiled else update
    obs, valid, times = envs.reset(seed=1)[0], np.ones(1, bool), np.zeros((steps, 5))
    for t in range(-min(steps, 300), steps):
        marks = [clock()]
        actions = agent.act(torch.as_tensor(obs)).numpy()
        marks.append(clock())
        next_obs, rewards, terminated, _, _ = envs.step(actions)
        marks.append(clock())
        buffer.add(valid, obs=obs, actions=actions, rewards=rewards, next_obs=next_obs, terminated=terminated)
        obs = next_obs
        marks.append(clock())
        batch = buffer.sample(256)
        marks.append(clock())
        update(agent, optimizer, batch, args)
        times[t] = np.diff([*marks, clock()])  # those before 0 are written over

    def repeated(function, num: int) -> float:
        start = clock()
        for _ in range(num):
            function()
        return (clock() - start) * 1e3 / num

    if profiled:
        with profile(activities=[ProfilerActivity.CPU]) as events:
            repeated(lambda: update(agent, optimizer, batch, args), 200)
        found = {f"of the update: {group}": 0.0 for group in GROUPS}
        for event in events.key_averages():
            group = next(name for name, pattern in GROUPS.items() if re.search(pattern, event.key))
            found[f"of the update: {group}"] += event.self_cpu_time_total / 1e3 / 200
        return found
    mean, (a, b) = 1e3 * times.mean(0), torch.randn(2, 2, 256, 256)
    found = {"a step": mean.sum()} | dict(zip(("act", "environment", "store", "sample", "update"), mean))
    found["act, in a loop"] = repeated(lambda: agent.act(torch.as_tensor(obs)).numpy(), steps)
    found["environment, in a loop"] = repeated(lambda: envs.step(actions), steps)
    found["update, in a loop"] = repeated(lambda: update(agent, optimizer, batch, args), steps // 4)
    found["its 16 products of 256 x 256 x 256, in a loop"] = 8 * repeated(lambda: torch.bmm(a, b), steps)
    return found


WORKERS = {function.__name__: function for function in (sb3_sac, sb3_a2c, sac_step)}


def machine() -> str:
    """The processor's name, family and model (a virtual machine hides more), cores, torch."""
    text = Path("/proc/cpuinfo").read_text()
    info = dict(re.findall(r"^(.*?)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    units = f"{'with' if 'amx_bf16' in text else 'without'} bfloat16 matrix units"
    names = f"{info['model name']}, family {info['cpu family']}, model {info['model']}, {CORES} cores, {units}"
    return f"{names}; torch {call('-c', 'import torch; print(torch.__version__)').strip()}"


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    if options.worker:
        name, arguments = json.loads(options.worker)
        print(json.dumps(WORKERS[name](**arguments)))
        sys.exit()
    print(machine(), flush=True)
    for part in (sac, a2c, replay, pixels, a3c, step, busy, gpu):
        if options.part in ("all", part.__name__):
            part(options.rounds)
