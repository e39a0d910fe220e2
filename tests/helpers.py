"""Short runs, and what tests read out of a run folder."""

import csv
import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path

import torch

import a2c_sync
import a3c_async
import off_policy_ac
import sac
from common.run import run_cli
from evaluate import load_args

SCRIPTS = {"a2c_sync": a2c_sync, "a3c_async": a3c_async, "off_policy_ac": off_policy_ac, "sac": sac}
SHORT = {name: {"num_envs": 2, "num_steps": 3} for name in ("a2c_sync", "a3c_async")}
SHORT |= {name: {"learning_starts": 60, "batch_size": 16, "buffer_size": 200} for name in ("off_policy_ac", "sac")}
SHORT["a3c_async"]["num_workers"] = 1


def short_run(script=a2c_sync, **flags):
    flags = {"run_dir": "run", "total_timesteps": 120, "eval_episodes": 1} | SHORT[script.__name__] | flags
    return script.train(script.Args(**flags))


def resume(run_dir="run", **flags):
    args = dataclasses.replace(load_args(run_dir), **flags)
    return importlib.import_module(type(args).__module__).train(args)


def command_line(monkeypatch, *words, script=a2c_sync):
    """As in a shell, but in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    return run_cli(script.train, script.Args)


def content(folder):
    """Every file of a folder and its bytes."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def metrics(run_dir):
    """Rows of metrics.csv without the wall-clock ones: (env_steps, tag, value)."""
    with open(Path(run_dir) / "metrics.csv") as file:
        rows = [(int(row["env_steps"]), row["tag"], row["value"]) for row in csv.DictReader(file)]
    return [row for row in rows if row[1] != "charts/SPS"]


def results(run_dir):
    """results.json without what depends on the clock or on the machine."""
    content = json.loads((Path(run_dir) / "results.json").read_text())
    return {name: value for name, value in content.items() if name not in ("seconds", "sps", "peak_memory_mb")}


def checkpoint(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Bit-identical nested state."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def events(run_dir):
    """TensorBoard's own reading of the event files, what a resumed run hides left out: {tag: [(step, value), ...]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}, purge_orphaned_data=True).Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def processes():
    """Of all live processes: (id, parent's id, session, command)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session, *_ = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found.append((int(stat.parent.name), int(parent), int(session), command))
    return found


def children(main):
    """Ids of the live worker processes of a live process: they are children of its fork server."""
    found = processes()
    servers = {pid for pid, parent, _, command in found if parent == main and b"multiprocessing.forkserver" in command}
    return [pid for pid, parent, _, _ in found if parent in servers]


def session_members(session):
    """Ids of the live processes of a session."""
    return [pid for pid, _, found, _ in processes() if found == session]


def wait_for(condition, timeout=300):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)
