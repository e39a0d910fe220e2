"""Runs the commands that a claim compares, and keeps what figures and tables need of them in experiments/data."""

import ast
import csv
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

from common.flags import ROOT
from experiments.judge import AtLeast, counted

DATA = ROOT / "experiments" / "data"
PPO = ROOT / "docs" / "exercises" / "ppo.diff"
FIRST_SEED = 100  # flags are chosen on seeds below it
QUICK = {  # flags that make a run of each script a matter of seconds
    "a2c_sync": "--total-timesteps 4000 --eval-episodes 2 --no-compile",
    "a3c_async": "--total-timesteps 4000 --eval-episodes 2",
    "off_policy_ac": "--total-timesteps 700 --learning-starts 300 --eval-episodes 2 --no-compile",
    "sac": "--total-timesteps 700 --learning-starts 300 --eval-episodes 2 --no-compile",
    "peers": "--total-timesteps 700 --eval-episodes 2",
}
ANEW = {"a2c_lag", "a3c_accumulate"}  # variants with a state that is in no checkpoint: never resumed
running = set()  # processes
RUN = ["task", "row", "seed", "command", "code", "commit", "versions", "processor", "date", "seconds of run"]
POINT = ["task", "row", "seed", "env_steps", "seconds", "return"]
DIVERGED = "diverged"  # in place of seconds: the run ended in numbers that are not finite
MISSING = "missing"  # in place of a measure that was declared after the run


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
    return without_empty(ast.dump(tree)), [module_path(name) for name in names]


def without_empty(tree: str) -> str:
    """Python's versions differ in the empty fields that they show."""
    return re.sub(r"(, )?\w+=(\[\]|None)", "", tree).replace("(, ", "(")


def module_path(name: str) -> Path:
    return ROOT / (name.replace(".", "/") + ".py")


def sources(path: Path, found: dict | None = None) -> dict[Path, str]:
    """The syntax trees of a file and of the repository's modules that it imports, and so on."""
    found = {} if found is None else found
    if path not in found and path.is_file():
        found[path], imported = parsed(path, path.stat().st_mtime_ns)
        for each in imported:
            sources(each, found)
    return found


def code_version(job: Job) -> str:
    """Hash of the syntax trees of what a command runs, an environment's module included."""
    found = sources(job.source())
    for word in job.words()[1]:
        if ":" in word:  # --env-id module:Name
            sources(module_path(word.partition(":")[0]), found)
    if ROOT / "experiments" / "patch.py" in found:  # a2c_ppo.py
        found[PPO] = PPO.read_text()
    trees = [(str(name.relative_to(ROOT)), tree) for name, tree in found.items()]
    return hashlib.sha256(repr(sorted(trees)).encode()).hexdigest()[:16]


def script_of(job: Job) -> str:
    """Which script a command trains with."""
    named = [word for word in job.words()[0] if word in QUICK]
    return (named + [path.stem for path in sources(job.source()) if path.stem in QUICK])[0]


def run(job: Job, out: Path, fresh: bool = False, timed: bool = False) -> dict:
    """What the data needs of a run: results, log, code, circumstances; raises RuntimeError if it fails.

    A folder of the same command, seed and code is used again: its results, or its checkpoint, from where it was. One
    whose time counts is never that of a run beside others. Without results: the run has diverged. The folder notes the
    circumstances of each start, since a run may go on elsewhere.
    """
    made = {"code": code_version(job), "circumstances": circumstances()}  # before anyone changes a file
    name = "".join(c if c.isalnum() else "-" for c in job.command)[:80]
    digest = hashlib.sha256(f"{job.command} {made['code']}{' timed' if timed else ''}".encode()).hexdigest()[:10]
    folder = out / f"{name}-{digest}__{job.seed}"
    starts, diverged = folder / "starts.csv", False
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "results.json").exists():
        (target, flags), where = job.words(), ["--resume", str(folder)]
        if job.source().stem in ANEW or not (folder / "checkpoint.pt").exists():
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
        if folder.exists():  # else the run was refused
            with open(starts, "a", newline="") as file:
                csv.writer(file).writerow(made["circumstances"])
        diverged = "is not finite at environment step" in errors
        if process.returncode != 0 and not diverged:
            raise RuntimeError(f"{shlex.join(command[1:])}\n{errors[-2000:]}")
    if starts.exists():
        with open(starts, newline="") as file:
            made["circumstances"] = tuple(" then ".join(dict.fromkeys(each)) for each in zip(*csv.reader(file)))
    if diverged:
        return made
    return made | {"results": json.loads((folder / "results.json").read_text()), "log": read_log(folder)}


def read_log(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """metrics.csv: tag -> (environment steps, seconds, value) of each row."""
    log = {"charts/episodic_return": []}
    for row in read(folder / "metrics.csv"):
        if row["value"]:  # else the last line of a run that is still going on
            log.setdefault(row["tag"], []).append((int(row["env_steps"]), float(row["seconds"]), float(row["value"])))
    return log


# --- Measures: of results.json, or of the training episodes ----------------------------------------------------------


def measured(name: str, results: dict, log: dict) -> float | None:
    """`return` is that of the greedy evaluation; `steps to X` when 20 training episodes first had a mean of X; `worst
    after X` the lowest mean of 100 episodes in a row from then on.

    The mean of a logged loss by its name; else what results.json has under the name.
    """
    episodes = log["charts/episodic_return"]
    if name == "return":
        return results["eval_return_mean"]
    if not episodes and re.search("training return|last tenth|worst stretch| to | after ", name):
        return None
    if name == "training return":  # the mean over all steps: how soon as well as how much
        return mean(value for _, _, value in curve(episodes, results["env_steps"]))
    if name == "last tenth":  # the training return of the last tenth of the steps: no lottery of the last policy
        return mean(value for _, _, value in curve(episodes, results["env_steps"])[-10:])
    if name == "worst stretch":  # lowest mean of 20 episodes in a row of the second half
        returns = [value for env_steps, _, value in episodes if env_steps > results["env_steps"] / 2] or [
            episodes[-1][2]
        ]
        return min(mean(returns[i : i + 20]) for i in range(max(1, len(returns) - 19)))
    if logged := log.get(f"losses/{name}"):
        return mean(value for _, _, value in logged)
    if not (found := re.fullmatch(r"(steps|seconds) to (.+)|worst after (.+)", name)):
        return results.get(name)
    returns, threshold = [value for *_, value in episodes], float(found[2] or found[3])
    there = next((i for i in range(20, len(returns) + 1) if mean(returns[i - 20 : i]) >= threshold), None)
    if found[3]:
        returns = returns[there:] if there else []
        return min((mean(returns[i : i + 100]) for i in range(len(returns) - 99)), default=mean(returns or [0.0]))
    if there is None:
        return AtLeast(results["env_steps" if found[1] == "steps" else "seconds"])
    return episodes[there - 1][0 if found[1] == "steps" else 1]


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
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, names, restval=MISSING, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)


def key(row: dict) -> tuple:
    return row["task"], row["row"], row["seed"]


def number_in(text: str) -> float | None:
    return None if text == DIVERGED else AtLeast(text[1:]) if text.startswith(">") else float(text)


def text(value: float | None) -> str:
    return "" if value is None else f"{'>' if isinstance(value, AtLeast) else ''}{value:.6g}"


def runs_of(claim, data: Path) -> list[dict]:
    """A claim's runs; without those of an earlier command, or of earlier code, where a row has some of today's."""
    declared = {job.key[:2]: job for job in jobs_of(claim, 1)}
    runs = [run for run in read(data / f"{claim.name}.runs.csv") if key(run)[:2] in declared]
    for name, today in (("command", lambda job: job.command), ("code", code_version)):
        wanted = {row: today(job) for row, job in declared.items()}
        renewed = {key(run)[:2] for run in runs if run[name] == wanted[key(run)[:2]]}
        runs = [run for run in runs if key(run)[:2] not in renewed or run[name] == wanted[key(run)[:2]]]
    return runs


def points_of(claim, runs: list[dict], data: Path) -> list[dict]:
    """The curves' points of these runs."""
    keys = set(map(key, runs))
    return [point for point in read(data / f"{claim.name}.curves.csv") if key(point) in keys]


def sample(runs: list[dict], task: str, row: str, measure: str) -> list[float | None]:
    """The measure of each seed of a row: AtLeast where a run did not get there, None where it diverged."""
    mine = [run for run in runs if (run["task"], run["row"]) == (task, row)]
    texts = [DIVERGED if run["seconds of run"] == DIVERGED else run.get(measure) for run in mine]
    return [number_in(text) for text in texts if text not in (None, "", MISSING)]


def add(claim, data: Path, job: Job, made: dict):
    """Puts a finished run among the claim's data, in the order of the declaration."""
    rows = [(task, row) for task, rows in claim.tasks.items() for row in rows]
    results, log = made.get("results"), made.get("log")
    row, points = dict(zip(RUN, [*job.key, job.command, made["code"], *made["circumstances"]])), []
    if results is None:
        row |= {"seconds of run": DIVERGED} | dict.fromkeys(claim.measures, "")
    else:
        row["seconds of run"] = f"{results['seconds']:.1f}"
        row |= {name: text(measured(name, results, log)) for name in claim.measures}
        points = [
            dict(zip(POINT, [*job.key, env_steps, f"{seconds:.1f}", f"{value:.6g}"]))
            for env_steps, seconds, value in curve(log["charts/episodic_return"], results["env_steps"])
        ]
    data.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock

    with FileLock(data / ".lock"):  # another laboratory may be at work on other tasks of the claim
        # The curve first: a run that is in the other file is not made again
        for kind, names, new in (("curves", POINT, points), ("runs", RUN + list(claim.measures), [row])):
            path = data / f"{claim.name}.{kind}.csv"
            kept = [each for each in read(path) if key(each) != job.key and key(each)[:2] in rows]
            write(path, names, sorted(kept + new, key=lambda each: (int(each["seed"]), rows.index(key(each)[:2]))))


def circumstances() -> tuple[str, str, str, str]:
    """Commit (+ if code differs from it), versions, processor and date."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    try:
        changed = git(["git", "status", "--porcelain", "-uno", "--", "*.py"]).stdout
        commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout
    except FileNotFoundError:  # no git
        changed, commit = "", "unknown"
    names = [name for name in ("torch", "gymnasium", "mujoco", "stable_baselines3") if find_spec(name)]
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    family = f" (family {cpu.get('cpu family')}, model {cpu.get('model')})" if cpu else ""
    processor = cpu.get("model name", "unknown") + family
    return commit.strip() + ("+" if changed else ""), versions, processor, time.strftime("%Y-%m-%d")


def jobs_of(claim, seeds: int | None = None) -> list[Job]:
    """A seed of every row before the next seed, so that what is there can be compared at any time."""
    return [
        Job(task, row, FIRST_SEED + i, command)
        for i in range(seeds or claim.seeds)
        for task, rows in claim.tasks.items()
        for row, command in rows.items()
        if i < (seeds or claim.seeds_of(task))
    ]


def run_claim(
    claim, task: str, seeds: int | None, at_a_time: int, quick: bool, fresh: bool, out: Path, data: Path
) -> int:
    """Runs what the data lacks, or all if `fresh`; returns how many runs failed."""
    jobs = [job for job in jobs_of(claim, seeds or (1 if quick else None)) if job.task.startswith(task)]
    if quick:
        for job in jobs:
            job.command += " " + QUICK[script_of(job)]
    rows = read(data / f"{claim.name}.runs.csv")
    whole = [row for row in rows if not fresh and MISSING not in [row.get(name, MISSING) for name in claim.measures]]
    known = {key(row): (row["command"], row["code"]) for row in whole}
    todo = [job for job in jobs if known.get(job.key) != (job.command, code_version(job))]
    hint = "" if todo else "; --fresh makes all anew, --quick tries it"
    print(f"{claim.name}: {counted(len(todo), 'run')} to make, {len(jobs) - len(todo)} made before{hint}", flush=True)
    start, done, failed, stopped = time.perf_counter(), 0, 0, False

    def make(job: Job):
        nonlocal done, failed
        try:
            made = run(job, out, fresh, claim.timed)
            add(claim, data, job, made)
            words = f"return {made['results']['eval_return_mean']:.6g}" if "results" in made else DIVERGED
        except Exception as error:  # whatever it is: shown, and the others go on
            if stopped:
                return
            failed += 1
            words = f"FAILED: {error}"
        done += 1
        left = (time.perf_counter() - start) / done * (len(todo) - done) / 60
        name = ", ".join(filter(None, [job.task, job.row, f"seed {job.seed}"]))
        print(f"  {done}/{len(todo)}  {name}: {words}; {left:.0f} min left", flush=True)

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
