"""Speed of the scripts next to Stable-Baselines3's, or to plainer code, measured in turn in one run:

    pip install -e ".[mujoco,atari,bench]"
    python experiments/speed.py                  all parts
    python experiments/speed.py --part equal     a2c_sync.py, eager and compiled, and Stable-Baselines3, equal settings
    python experiments/speed.py --part native    a2c_sync.py, 256 environments of gymnasium's native vector kind
    python experiments/speed.py --part solve     a2c_sync.py, seconds until 100 episodes have a mean return of 475
    python experiments/speed.py --part replay    off_policy_ac.py, K = 10, eager, compiled, and plain code: updates/s
    python experiments/speed.py --part buffer    the ring buffer against Stable-Baselines3's, with HalfCheetah's sizes
    python experiments/speed.py --part sac       sac.py, HalfCheetah-v5, eager and compiled, Stable-Baselines3, SBX
    python experiments/speed.py --part pixels    a2c_sync.py, Pong, eager and compiled, one and two threads: steps/s
    python experiments/speed.py --part update    sac.py, where the time of a step goes: milliseconds
    python experiments/speed.py --part denormals  Adam's step when half of the gradients are zero, with denormals or not
    python experiments/speed.py --part workers   a3c_async.py with 1, 2, 4 workers: steps per second
    python experiments/speed.py --part race      a3c_async.py and a2c_sync.py with sixteen environments: seconds to 475

Every measurement is a process of its own, with one thread unless a row says otherwise. Machines vary by the minute:
read the ratios, which are those of the medians to the first row.
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
from statistics import mean, median
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
EQUAL = dict(
    num_envs=8, num_steps=5, gamma=0.99, gae_lambda=1.0, ent_coef=0.0, learning_rate=7e-4
)  # SB3's defaults and zoo
OURS_EQUAL = (
    "--num-envs 8 --num-steps 5 --gae-lambda 1 --ent-coef 0 "
    "--optimizer rmsprop --actor-lr 7e-4 --no-lr-decay --max-grad-norm 0.5"
)


@dataclass
class Options:
    part: Literal[
        "all",
        "equal",
        "native",
        "solve",
        "replay",
        "buffer",
        "sac",
        "pixels",
        "update",
        "parts",
        "busy",
        "denormals",
        "workers",
        "race",
    ] = "all"
    """which comparison to run"""
    rounds: int = 3
    """how often each side of all parts but `solve` and `race` is measured, in turn"""
    seeds: int = 5
    """seeds of `solve` and `race`"""
    worker: str | None = None
    """internal: one measurement of the other side"""


def call(*words) -> str:
    """Standard output of a Python command in the repository's root; ends the comparison if it fails."""
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def variant(out: Path, script: str, name: str, edits: dict[str, str]) -> Path:
    """A script with some passages replaced, as a file of its own."""
    source = (ROOT / f"{script}.py").read_text()
    for old, new in edits.items():
        assert source.count(old) == 1, f"a passage that {name} replaces is not in {script}.py: {old[:60]!r}"
        source = source.replace(old, new)
    path = out / name / f"{script}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return path


def ours(flags: str, total_timesteps: int, seed: int = 1, script: str = "a2c_sync.py", after: int = 0) -> dict:
    """One run, with the seconds after which 100 episodes had a mean return of 475.

    after: measure steps per second only from there on, without start-up and warm-up.
    """
    flags = f"--total-timesteps {total_timesteps} --eval-episodes 1 {flags}"
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        call(script, "--run-dir", run_dir, "--seed", seed, *flags.split())
        end = json.loads((run_dir / "results.json").read_text()) | {"solved_seconds": seconds_to(475, run_dir)}
        if after:
            end |= speed(run_dir, after)
        return end


def seconds_to(threshold: float, run_dir: Path) -> float | None:
    """Until 100 training episodes first had a mean return of this."""
    with open(run_dir / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["tag"] == "charts/episodic_return"]
    for i in range(100, len(rows) + 1):
        if mean(float(row["value"]) for row in rows[i - 100 : i]) >= threshold:
            return float(rows[i - 1]["seconds"])
    return None


def speed(run_dir: Path, after: int) -> dict:
    """Steps per second from `after` steps on, and the seconds for 20,000 steps, warm-up included."""
    with open(run_dir / "metrics.csv") as file:
        rows = [(int(r["env_steps"]), float(r["seconds"])) for r in csv.DictReader(file)]
    steps, seconds = next(row for row in rows if row[0] >= after)
    sps = (rows[-1][0] - steps) / (rows[-1][1] - seconds)
    return {"sps": sps, "to_20k": seconds + (20_000 - steps) / sps}


def long(script: str, flags: str, seconds: float, after: int) -> dict:
    """The speed of a run that is ended after so many seconds, from `after` steps on."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, ROOT / script, *flags.split(), "--run-dir", Path(folder) / "run"]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.terminate()
        process.wait()
        return speed(Path(folder) / "run", after)


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


def processor() -> str:
    """Its name, family and model (a virtual machine hides more), cores, and whether it multiplies bfloat16 matrices."""
    text = Path("/proc/cpuinfo").read_text()
    info = dict(re.findall(r"^(.*?)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    names = f"{info['model name']}, family {info['cpu family']}, model {info['model']}"
    return f"{names}, {os.cpu_count()} cores, {'with' if 'amx_bf16' in text else 'without'} bfloat16 matrix units"


def line(name: str, values: list[dict], key: str = "sps", digits: int = 0):
    shown = " ".join("never" if v[key] is None else f"{v[key]:,.{digits}f}" for v in values)
    memory = (
        f"   peak memory {max(v['peak_memory_mb'] for v in values):.0f} MB" if "peak_memory_mb" in values[0] else ""
    )
    print(f"  {name:<40}{shown}{memory}", flush=True)


def ratio(a: list[dict], b: list[dict]):
    ratios = [x["sps"] / y["sps"] for x, y in zip(a, b)]
    print(f"  ratio {median(ratios):.2f} (median; {' '.join(f'{r:.2f}' for r in ratios)})", flush=True)


def compare(title: str, rows: dict, rounds: int):
    """Each row's median and range of steps per second, and its ratio to the first row's, measured in turn."""
    print(f"{title}; {rounds} rounds: median (range), ratio of the medians", flush=True)
    found = {name: [] for name in rows}
    for _ in range(rounds):
        for name, measure in rows.items():
            found[name].append(measure())
    middle = {name: median(each["sps"] for each in ends) for name, ends in found.items()}
    for name, ends in found.items():
        values = [each["sps"] for each in ends]
        text = f"{middle[name]:,.0f} ({min(values):,.0f} to {max(values):,.0f})"
        if "to_20k" in ends[0]:
            text += f"   20,000 steps take {median(each['to_20k'] for each in ends):.0f} s, warm-up included"
        print(f"  {name:<40}{middle[name] / next(iter(middle.values())):5.2f}   {text}", flush=True)


def equal(options: Options):
    rows = {
        "Stable-Baselines3": lambda: theirs(total_timesteps=100_000, seed=1, until_solved=False),
        "a2c_sync.py": lambda: ours(OURS_EQUAL, 200_000, after=50_000),
        "a2c_sync.py --compile": lambda: ours(OURS_EQUAL + " --compile", 200_000, after=50_000),
    }
    compare("A2C, CartPole-v1, equal settings: 8 environments x 5 steps, steps/s", rows, options.rounds)


def pixels(options: Options):
    flags = "--env-id ALE/Pong-v5 --network shared --optimizer adam --num-envs 8 --num-steps 16 --max-grad-norm 0.5"
    flags += " --total-timesteps 2000000"
    rows = {}
    for more in ("", " --compile", " --matmul-precision medium", " --compile --matmul-precision medium"):
        for n in (1, os.cpu_count()):
            words = f"{flags} --num-threads {n}{more}"
            rows[f"{n} threads{more}"] = lambda words=words: long("a2c_sync.py", words, 75, after=4_000)
    compare("a2c_sync.py, Pong from pixels, 8 environments x 16 steps, steps/s", rows, options.rounds)


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
        share = mean(run["solved_seconds"] for run in a) / mean(run["solved_seconds"] for run in b)
        print(f"  ratio of the means {share:.2f}", flush=True)


# The same algorithm as one would write it first: a loop over the K samples, an optimizer a network, torch as it is
PLAIN = {
    "    envs = make_envs(args, images=False)\n": """    envs = make_envs(args, images=False)
    torch.set_flush_denormal(False)
""",
    """    with torch.no_grad():
        pi_actions = policy.sample(args.num_action_samples)  # (K, B): fresh, without the simulator (D11, D14)
        pi_q = agent.critic(batch.obs, pi_actions)  # (K, B)
""": """    log_probs, pi_q = [], []
    for _ in range(args.num_action_samples):
        with torch.no_grad():
            pi_actions = policy.sample()
            pi_q.append(agent.critic(batch.obs, pi_actions))
        log_probs.append(policy.log_prob(pi_actions))
    log_probs, pi_q = torch.stack(log_probs), torch.stack(pi_q)
""",
    "        log_probs = policy.log_prob(pi_actions)\n": "",
    "    return torch.optim.Adam(groups, fused=True)\n": """    agent.critic_optimizer = torch.optim.Adam(groups[1:])
    return torch.optim.Adam(groups[:1])
""",
    "    loss = actor_loss + critic_loss\n": "    loss = actor_loss, critic_loss\n",
    """    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agent.actor.bound_std()
    polyak_update(agent.target_critic, agent.critic, args.tau)
""": """    actor_loss, critic_loss = loss
    agent.critic_optimizer.zero_grad()
    critic_loss.backward()
    agent.critic_optimizer.step()
    optimizer.zero_grad()
    actor_loss.backward()
    optimizer.step()
    with torch.no_grad():
        for target_param, param in zip(agent.target_critic.parameters(), agent.critic.parameters()):
            target_param.copy_(args.tau * param + (1 - args.tau) * target_param)
""",
}


def replay(options: Options):
    """Steps of four updates, so that the environment does not count."""
    tasks = {"CartPole-v1": "", "HalfCheetah-v5": "--env-id HalfCheetah-v5"}
    with tempfile.TemporaryDirectory() as folder:
        plain = variant(Path(folder), "off_policy_ac", "plain", PLAIN)
        for task, flags in tasks.items():
            flags += " --num-action-samples 10 --updates-per-step 4 --learning-starts 150"
            rows = {
                name: lambda words=words, script=script: ours(f"{flags} {words}", 1_200, script=script, after=600)
                for name, script, words in (
                    ("plain code", plain, ""),
                    ("off_policy_ac.py", ROOT / "off_policy_ac.py", ""),
                    ("--matmul-precision highest", ROOT / "off_policy_ac.py", "--matmul-precision highest"),
                    ("--compile", ROOT / "off_policy_ac.py", "--compile"),
                    ("--compile, highest", ROOT / "off_policy_ac.py", "--compile --matmul-precision highest"),
                )
            }
            compare(f"off_policy_ac.py, {task}, K = 10, steps of 4 updates/s", rows, options.rounds)


def buffer_worker(name: str, calls: int) -> dict:
    """Calls a second: add one HalfCheetah transition and sample 256, in a full buffer of 100,000."""
    import gymnasium as gym
    import numpy as np
    import torch

    torch.set_num_threads(1)
    rng, size = np.random.default_rng(0), 100_000
    obs, action = rng.normal(size=(2, 1, 17)).astype(np.float32), rng.uniform(-1, 1, (1, 6)).astype(np.float32)
    reward, done, valid = np.ones(1, np.float32), np.zeros(1, bool), np.ones(1, bool)
    if name == "ours":
        from common.ring_buffer import RingBuffer

        buffer = RingBuffer(size)

        def add():
            buffer.add(valid, obs=obs[0], actions=action, rewards=reward, next_obs=obs[1], terminated=done)

    else:
        from stable_baselines3.common.buffers import ReplayBuffer

        box = gym.spaces.Box(-np.inf, np.inf, (17,), np.float32)
        buffer = ReplayBuffer(size, box, gym.spaces.Box(-1, 1, (6,), np.float32), device="cpu")

        def add():
            buffer.add(obs[0], obs[1], action, reward, done, [{}])

    for _ in range(size):  # full
        add()
    start = time.perf_counter()
    for _ in range(calls):
        add()
        buffer.sample(256)
    return {"sps": calls / (time.perf_counter() - start)}


def buffer(options: Options):
    print(f"Ring buffer: add one transition and sample 256, calls per second in {options.rounds} rounds")
    a, b = [], []
    for _ in range(options.rounds):
        a.append(theirs(buffer="ours", calls=20_000))
        b.append(theirs(buffer="sb3", calls=20_000))
    line("common/ring_buffer.py", a)
    line("Stable-Baselines3's ReplayBuffer", b)
    ratio(a, b)


UPDATES = {"batches of 256": "", "batches of 4": "--batch-size 4", "--compile": "--compile"}
SAC_STEPS = 1_000, 1_500, 4_000  # the first update, from where on it is timed (compiled, warm), the end


def sac_worker(library: str) -> dict:
    """Steps per second of another library's SAC on HalfCheetah-v5, with its defaults, which are those of sac.py."""
    import resource

    import gymnasium as gym
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    if library == "sbx":
        from sbx import SAC
    else:
        from stable_baselines3 import SAC

        torch.set_num_threads(os.cpu_count())
    starts, first, total = SAC_STEPS

    class Clock(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == first:
                self.begin = time.perf_counter()
            return True

    clock = Clock()
    policy = {"net_arch": [256, 256]}
    model = SAC("MlpPolicy", gym.make("HalfCheetah-v5"), seed=1, learning_starts=starts, policy_kwargs=policy)
    model.learn(total, callback=clock)
    sps = (total - first) / (time.perf_counter() - clock.begin)
    return {"sps": sps, "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def sac(options: Options):
    cores, (starts, first, total) = os.cpu_count(), SAC_STEPS
    rows = {"Stable-Baselines3": lambda: theirs(sac="sb3"), "SBX": lambda: theirs(sac="sbx")}
    for words in ("", "--compile"):
        for precision in ("auto", "highest", "medium"):
            flags = f"--env-id HalfCheetah-v5 --learning-starts {starts} --num-threads {cores} {words}"
            flags += f" --matmul-precision {precision}"
            rows[f"sac.py {words} {precision}"] = lambda flags=flags: ours(flags, total, script="sac.py", after=first)
    compare(f"SAC, HalfCheetah-v5, one update a step, {cores} threads, steps/s", rows, options.rounds)


def products_worker(num_threads: int, precision: str) -> dict:
    """Milliseconds of what one update of sac.py multiplies: 16 products of 256 x 256 matrices, two at a time."""
    import torch

    torch.set_num_threads(num_threads)
    torch.set_float32_matmul_precision(precision)
    a, b = torch.randn(2, 2, 256, 256)
    for _ in range(100):
        torch.bmm(a, b)
    start = time.perf_counter()
    for _ in range(8 * 200):
        torch.bmm(a, b)
    return {"ms": (time.perf_counter() - start) * 1e3 / 200}


def update(options: Options):
    print(f"sac.py, HalfCheetah-v5, milliseconds a step, environment included, in {options.rounds} rounds")
    cores, (starts, first, total) = os.cpu_count(), SAC_STEPS
    rows = {f"{n} threads, {name}": f"--num-threads {n} {more}" for n in (1, cores) for name, more in UPDATES.items()}
    times = {name: [] for name in rows}
    products = {(n, precision): [] for n in (1, cores) for precision in ("highest", "medium")}
    for _ in range(options.rounds):
        for (n, precision), into in products.items():
            into.append(theirs(products=n, precision=precision))
        for name, flags in rows.items():
            flags = f"--env-id HalfCheetah-v5 --learning-starts {starts} {flags}"
            end = ours(flags, total, script="sac.py", after=first)
            times[name].append(end | {"ms": 1e3 / end["sps"]})
    for (n, precision), each in products.items():
        line(f"{n} threads, matrix products, {precision}", each, "ms", 2)
    for name, each in times.items():
        line(name, each, "ms", 2)


def parts_worker(compiled: bool, steps: int = 1_500) -> dict:
    """Milliseconds of the parts of a step of sac.py, all cores, each timed between the others as in a run."""
    import numpy as np
    import torch

    import sac
    from common.checkpoint import set_precision

    torch.set_num_threads(os.cpu_count())
    args, device = sac.Args(env_id="HalfCheetah-v5"), torch.device("cpu")
    envs = sac.make_envs(args)
    agent = sac.make_agent(envs, args)
    optimizer = sac.make_optimizer(agent, args)
    set_precision("auto")
    buffer = sac.RingBuffer(10_000, device)
    update = sac.compiled(sac.update, device) if compiled else sac.update
    obs, valid, clock, names = envs.reset(seed=1)[0], np.ones(1, bool), time.perf_counter, "act env store sample update"
    times = np.zeros((steps, 5))
    for t in range(-300, steps):
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
    return dict(zip(names.split(), (1e3 * times.mean(0)).tolist()))


def parts(options: Options):
    print(f"The parts of a step of sac.py, HalfCheetah-v5, {os.cpu_count()} threads, milliseconds")
    for name, flag in (("eager", False), ("--compile", True)):
        rounds = [theirs(parts=flag) for _ in range(options.rounds)]
        for part in rounds[0]:
            line(f"{name}: {part}", rounds, part, 3)


def busy(options: Options):
    """One round: a run beside as many processes that compute; it is ended after 45 seconds, or 90 with --compile."""
    print(f"sac.py, HalfCheetah-v5, steps/s beside other processes that compute, {os.cpu_count()} cores")
    loop = [sys.executable, "-c", "while True: pass"]
    for flags in ("", "--compile"):
        for num_threads in (1, os.cpu_count()):
            for others in range(os.cpu_count() + 1):
                words = f"--env-id HalfCheetah-v5 --num-threads {num_threads} {flags}"
                processes = [subprocess.Popen(loop) for _ in range(others)]
                try:
                    found = long("sac.py", f"{words} --learning-starts 500", 90 if flags else 45, 600)["sps"]
                except StopIteration:
                    found = 0.0  # not a step in this time
                finally:
                    for process in processes:
                        process.kill()
                print(f"{flags or 'eager'}, {num_threads} threads, beside {others}: {found:.1f}", flush=True)


def adam_worker(flush: bool) -> dict:
    """Milliseconds of Adam's step for a layer of 256 x 256, 1,200 steps after half of its gradients became zero."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(flush)
    layer = torch.nn.Parameter(torch.randn(256, 256))
    optimizer, layer.grad = torch.optim.Adam([layer], lr=1e-3, fused=True), torch.randn(256, 256)
    optimizer.step()
    layer.grad[::2] = 0
    for _ in range(1_200):
        optimizer.step()
    start = time.perf_counter()
    for _ in range(1_000):
        optimizer.step()
    return {"ms": time.perf_counter() - start}


def denormals(options: Options):
    print(f"Adam's step, half of the gradients zero, milliseconds in {options.rounds} rounds")
    for name, flush in (("denormals flushed to zero", True), ("denormals kept", False)):
        line(name, [theirs(adam=flush) for _ in range(options.rounds)], "ms", 3)


def workers(options: Options):
    print(
        f"a3c_async.py, 1, 2 and 4 workers of four environments and one thread each, steps/s in {options.rounds} rounds"
    )
    pong = "--env-id ALE/Pong-v5 --network shared --num-steps 16"
    tasks = {"Pong": (pong, 9_000), "HalfCheetah": ("--env-id HalfCheetah-v5 --num-steps 16", 60_000)}
    for task, (flags, total) in tasks.items():
        for update in ("pooled", "hogwild"):
            speeds = {num: [] for num in (1, 2, 4)}
            for _ in range(options.rounds):
                for num, into in speeds.items():
                    words = f"{flags} --update {update} --num-workers {num}"
                    into.append(ours(words, total, script="a3c_async.py", after=total // 3))
            for num, each in speeds.items():
                line(f"{task}, {update}, {num} workers", each)
            ratio(speeds[2], speeds[1])
            ratio(speeds[4], speeds[1])


def race(options: Options):
    print(
        f"Sixteen environments, seconds to a mean training return of 475 over 100 episodes, seeds 1 to {options.seeds}"
    )
    sides = {
        "a2c_sync.py": ("a2c_sync.py", "--num-envs 16"),
        "a3c_async.py, pooled": ("a3c_async.py", "--num-envs 16 --update pooled"),
        "a3c_async.py, hogwild": ("a3c_async.py", "--num-envs 16 --update hogwild"),
    }
    runs = {name: [] for name in sides}
    for seed in range(1, options.seeds + 1):
        for name, (script, flags) in sides.items():
            runs[name].append(ours(flags, 500_000, seed, script))
    for name, each in runs.items():
        line(name + ": seconds", each, "solved_seconds", 1)
        line(name + ": steps", each, "solved_steps")
        line(name + ": steps/s", each)


def worker(spec: dict) -> dict:
    if "sac" in spec:
        return sac_worker(spec["sac"])
    if "parts" in spec:
        return parts_worker(spec["parts"])
    if "adam" in spec:
        return adam_worker(spec["adam"])
    if "products" in spec:
        return products_worker(spec["products"], spec["precision"])
    if "buffer" in spec:
        return buffer_worker(spec["buffer"], spec["calls"])
    return raw_worker(spec["num_envs"], spec["seconds"]) if spec.pop("raw", False) else sb3_worker(**spec)


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker))))
        sys.exit()
    print(processor())
    for part in (equal, native, solve, replay, buffer, sac, pixels, update, parts, busy, denormals, workers, race):
        if options.part in ("all", part.__name__):
            part(options)
