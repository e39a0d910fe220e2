"""Runs the commands that a claim compares, and keeps what figures and tables need of them in experiments/data."""

import ast
import csv
import hashlib
import importlib.metadata
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean

from common.flags import ROOT

DATA = ROOT / "experiments" / "data"
FIRST_SEED = 100  # flags are chosen on seeds below it
QUICK = {  # flags that make a run of each script a matter of seconds
    "a2c_sync": "--total-timesteps 4000 --eval-episodes 2",
    "a3c_async": "--total-timesteps 4000 --eval-episodes 2",
    "off_policy_ac": "--total-timesteps 700 --learning-starts 300 --eval-episodes 2 --no-compile",
    "sac": "--total-timesteps 700 --learning-starts 300 --eval-episodes 2 --no-compile",
}
running = set()  # processes
RUN = ["task", "row", "seed", "command", "code", "commit", "versions", "processor", "date", "seconds of run"]
POINT = ["task", "row", "seed", "env_steps", "seconds", "return"]


@dataclass
class Job:
    """One run of a claim: a row of a task, with a seed."""

    task: str
    row: str
    seed: int
    command: str  # a script or a module with its flags, without --seed and --run-dir
    key: tuple = field(init=False)

    def __post_init__(self):
        self.key = self.task, self.row, str(self.seed)

    def words(self) -> tuple[list[str], list[str]]:
        """For Python: what to call (a path, or -m and a module, and its positional words), and flags."""
        words = shlex.split(self.command)
        flags = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
        return [*([] if words[0].endswith(".py") else ["-m"]), *words[:flags]], words[flags:]

    def source(self) -> Path:
        target = shlex.split(self.command)[0]
        return ROOT / (target if target.endswith(".py") else target.replace(".", "/") + ".py")


@lru_cache
def parsed(path: Path, _modified: int) -> tuple[str, list[Path]]:
    """A file as text of its syntax tree without comments and docstrings, and what it may import from the repository."""
    tree, names = ast.parse(path.read_text()), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return ast.dump(tree), [ROOT / (name.replace(".", "/") + ".py") for name in names]


def sources(path: Path, found: dict | None = None) -> dict[Path, str]:
    """The syntax trees of a file and of the repository's modules that it imports, and so on."""
    found = {} if found is None else found
    if path not in found and path.is_file():
        found[path], imported = parsed(path, path.stat().st_mtime_ns)
        for each in imported:
            sources(each, found)
    return found


def code_version(path: Path) -> str:
    """Hash of these syntax trees."""
    trees = [(str(name.relative_to(ROOT)), tree) for name, tree in sources(path).items()]
    return hashlib.sha256(repr(sorted(trees)).encode()).hexdigest()[:16]


def script_of(job: Job) -> str:
    """Which of the four scripts a command trains with."""
    named = [word for word in job.words()[0] if word in QUICK]
    return (named + [path.stem for path in sources(job.source()) if path.parent == ROOT and path.stem in QUICK])[0]


def run(job: Job, out: Path, fresh: bool = False) -> dict:
    """The run's row of the data, measures included, and its curve; raises RuntimeError if it fails.

    A folder of the same command, seed and code is used again: its results, or its checkpoint, from where it was.
    """
    name = "".join(c if c.isalnum() else "-" for c in job.command)[:80]
    digest = hashlib.sha256(f"{job.command} {code_version(job.source())}".encode()).hexdigest()[:10]
    folder = out / f"{name}-{digest}__{job.seed}"
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "results.json").exists():
        (target, flags), where = job.words(), ["--resume", str(folder)]
        if not (folder / "checkpoint.pt").exists():
            shutil.rmtree(folder, ignore_errors=True)
            where = [*flags, "--run-dir", str(folder), "--seed", str(job.seed)]
        command = [sys.executable, *target, *where]
        # One thread each, and on the CPU like all data so far, if the caller does not say otherwise
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | os.environ | {"PYTHONPATH": str(ROOT)}
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        process = subprocess.Popen(command, **options, env=environment, cwd=ROOT)  # whose end by Ctrl-C is up to us
        running.add(process)
        _, errors = process.communicate()
        running.remove(process)
        if process.returncode != 0:
            raise RuntimeError(f"{shlex.join(command[1:])}\n{errors[-2000:]}")
    results = json.loads((folder / "results.json").read_text())
    return {"results": results, "log": read_log(folder)}


def read_log(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """metrics.csv: tag -> (environment steps, seconds, value) of each row."""
    log = {"charts/episodic_return": []}
    with open(folder / "metrics.csv") as file:
        for row in csv.DictReader(file):
            log.setdefault(row["tag"], []).append((int(row["env_steps"]), float(row["seconds"]), float(row["value"])))
    return log


# --- Measures: of results.json, or of the training episodes ----------------------------------------------------------


def measured(name: str, results: dict, log: dict) -> float | None:
    """`return` is that of the greedy evaluation; `steps to X` when 20 training episodes first had a mean of X.

    The mean of a logged loss by its name; else what results.json has under the name.
    """
    episodes = log["charts/episodic_return"]
    if name == "return":
        return results["eval_return_mean"]
    if not episodes and (name in ("training return", "worst stretch") or " to " in name):
        return None
    if name == "training return":  # the mean over all steps: how soon as well as how much
        return mean(value for _, _, value in curve(episodes, results["env_steps"]))
    if name == "worst stretch":  # lowest mean of 20 episodes in a row of the second half
        returns = [value for env_steps, _, value in episodes if env_steps > results["env_steps"] / 2] or [
            episodes[-1][2]
        ]
        return min(mean(returns[i : i + 20]) for i in range(max(1, len(returns) - 19)))
    if logged := log.get(f"losses/{name}"):
        return mean(value for _, _, value in logged)
    unit, _, threshold = name.partition(" to ")
    if not threshold:
        return results.get(name)
    last = deque(maxlen=20)
    for env_steps, seconds, value in episodes:
        last.append(value)
        if len(last) == 20 and mean(last) >= float(threshold):
            return env_steps if unit == "steps" else seconds
    return results["env_steps"] if unit == "steps" else results["seconds"]  # not reached: at least so many


def curve(episodes: list, env_steps: int, points: int = 100) -> list[tuple[int, float, float]]:
    """Mean training return of the episodes that ended in each hundredth of the steps; where none did, the one before.

    (environment steps, seconds, return) at the end of each; it begins where the first episode has ended.
    """
    bins = [[] for _ in range(points)]
    for each in episodes:
        bins[min(points - 1, max(0, math.ceil(each[0] * points / env_steps) - 1))].append(each)
    line, last = [], None
    for i, ended in enumerate(bins):
        if ended:
            last = ended[-1][1], mean(value for _, _, value in ended)
        if last:
            line.append((env_steps * (i + 1) // points, *last))
    return line


# --- The data of a claim: CLAIM.runs.csv and CLAIM.curves.csv --------------------------------------------------------


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, names: list[str], rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".tmp"), "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".tmp").replace(path)


def key(row: dict) -> tuple:
    return row["task"], row["row"], row["seed"]


def add(claim, data: Path, job: Job, made: dict):
    """Puts a finished run among the claim's data, in the order of the declaration."""
    rows = [(task, row) for task, rows in claim.tasks.items() for row in rows]
    results, log = made["results"], made["log"]
    row = dict(zip(RUN, [*job.key, job.command, code_version(job.source()), *circumstances()]))
    row["seconds of run"] = f"{results['seconds']:.1f}"
    values = {name: measured(name, results, log) for name in claim.measures}
    row |= {name: "" if value is None else f"{value:.6g}" for name, value in values.items()}
    points = [
        dict(zip(POINT, [*job.key, env_steps, f"{seconds:.1f}", f"{value:.6g}"]))
        for env_steps, seconds, value in curve(log["charts/episodic_return"], results["env_steps"])
    ]
    for kind, names, new in (("runs", RUN + list(claim.measures), [row]), ("curves", POINT, points)):
        path = data / f"{claim.name}.{kind}.csv"
        kept = [each for each in read(path) if key(each) != job.key and key(each)[:2] in rows]
        write(path, names, sorted(kept + new, key=lambda each: (int(each["seed"]), rows.index(key(each)[:2]))))


def circumstances() -> tuple[str, str, str, str]:
    """Commit (+ if code differs from it), versions, processor and date."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    changed = git(["git", "status", "--porcelain", "-uno", "--", "*.py"]).stdout
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "gymnasium"))
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")
    return commit.strip() + ("+" if changed else ""), versions, processor, time.strftime("%Y-%m-%d")


def jobs_of(claim, seeds: int) -> list[Job]:
    """A seed of every row before the next seed, so that what is there can be compared at any time."""
    rows = [(task, row, command) for task, rows in claim.tasks.items() for row, command in rows.items()]
    seeds = range(FIRST_SEED, FIRST_SEED + seeds)
    return [Job(task, row, seed, command) for seed in seeds for task, row, command in rows]


def run_claim(
    claim, task: str, seeds: int | None, at_a_time: int, quick: bool, fresh: bool, out: Path, data: Path
) -> int:
    """Runs what the data lacks, or all if `fresh`; returns how many runs failed."""
    jobs = [job for job in jobs_of(claim, 1 if quick else seeds or claim.seeds) if job.task.startswith(task)]
    if quick:
        for job in jobs:
            job.command += " " + QUICK[script_of(job)]
    known = {} if fresh else {key(row): (row["command"], row["code"]) for row in read(data / f"{claim.name}.runs.csv")}
    todo = [job for job in jobs if known.get(job.key) != (job.command, code_version(job.source()))]
    print(f"{claim.name}: {len(todo)} runs to make, {len(jobs) - len(todo)} made before", flush=True)
    start, lock, done, failed, stopped = time.perf_counter(), threading.Lock(), 0, 0, False

    def make(job: Job):
        nonlocal done, failed
        try:
            made = run(job, out, fresh)
            with lock:
                add(claim, data, job, made)
            words = f"return {made['results']['eval_return_mean']}"
        except Exception as error:  # whatever it is: shown, and the others go on
            if stopped:
                return
            failed += 1
            words = f"FAILED: {error}"
        done += 1
        left = (time.perf_counter() - start) / done * (len(todo) - done) / 60
        print(f"  {done}/{len(todo)}  {job.task}, {job.row}, seed {job.seed}: {words}; {left:.0f} min left", flush=True)

    with ThreadPoolExecutor(1 if claim.timed else at_a_time) as pool:
        try:
            list(pool.map(make, todo))
        except KeyboardInterrupt:
            stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.kill()  # only from a checkpoint made in time does a run go on as if it had not been stopped
            raise
    return failed
