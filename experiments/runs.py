"""Runs of the scripts in processes of their own, for the experiments."""

import ast
import csv
import hashlib
import json
import os
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent


def call(*words) -> str:
    """Standard output of a Python command in the repository's root; ends the experiment if it fails."""
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def run(
    script: str | Path, flags: str, seed: int, run_dir: Path, threshold: float = float("inf"), episodes: int = 100
) -> dict:
    """results.json of one run, and where its last `episodes` training episodes first had a mean return of `threshold`.

    A run folder that already holds the results of the same flags and code is read, not run again.
    """
    made, wanted = run_dir / "made.json", {"flags": flags, "seed": seed, "code": code_version(ROOT / script)}
    if not (run_dir / "results.json").exists():
        call(script, "--run-dir", run_dir, "--seed", seed, *flags.split())
        made.write_text(json.dumps(wanted))
    elif not made.exists() or json.loads(made.read_text()) != wanted:
        raise SystemExit(f"{run_dir} was made with other flags or other code; remove it, or name another folder.")
    results, last = json.loads((run_dir / "results.json").read_text()), deque(maxlen=episodes)
    results |= {"solved_steps": None, "solved_seconds": None}
    for env_steps, seconds, episodic_return in training_episodes(run_dir):
        last.append(episodic_return)
        if len(last) == episodes and mean(last) >= threshold:
            return results | {"solved_steps": env_steps, "solved_seconds": seconds}
    return results


def code_version(script: Path) -> str:
    """Hash of the syntax trees of a script and of common/, without comments and docstrings."""
    digest = hashlib.sha256()
    for path in [script, *sorted((ROOT / "common").glob("*.py"))]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                node.value.value = ""
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def training_episodes(run_dir: Path) -> list[tuple[int, float, float]]:
    """Environment steps, seconds and return of every training episode, in the order in which they ended."""
    with open(run_dir / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["tag"] == "charts/episodic_return"]
    return [(int(row["env_steps"]), float(row["seconds"]), float(row["value"])) for row in rows]


def worst_return(run_dir: Path, episodes: int = 20) -> float:
    """Lowest mean training return of `episodes` episodes in a row that ended in the second half of the steps."""
    rows = training_episodes(run_dir)
    returns = [episodic_return for env_steps, _, episodic_return in rows if env_steps > rows[-1][0] / 2]
    return min((mean(returns[i : i + episodes]) for i in range(len(returns) - episodes + 1)), default=mean(returns))


def run_all(jobs: list[tuple], at_a_time: int) -> list[dict]:
    """Results of run(*job) for all jobs, in their order."""
    with ThreadPoolExecutor(at_a_time) as pool:
        return list(pool.map(lambda job: run(*job), jobs))


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


def mean_std(values: list[float], digits: int = 1) -> str:
    """Mean ± sample standard deviation over seeds."""
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):,.{digits}f} ± {spread:,.{digits}f}"
