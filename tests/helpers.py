"""What tests read out of a run folder."""

import csv
import json
from pathlib import Path

import torch


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
    """TensorBoard's own reading of the event files: {tag: [(step, value), ...]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def record_agents(monkeypatch, script):
    """A list that every agent a run of `script` makes will be in."""
    agents, init = [], script.ActorCritic.__init__
    monkeypatch.setattr(script.ActorCritic, "__init__", lambda agent, *args: agents.append(agent) or init(agent, *args))
    return agents


def record_initial_weights(monkeypatch, script):
    """A dictionary that will hold the agent's parameters as they are when the run is opened."""
    initial, original = {}, script.Run.open

    def remember(run, **parts):
        initial.update({name: p.detach().clone() for name, p in parts["agent"].named_parameters()})
        return original(run, **parts)

    monkeypatch.setattr(script.Run, "open", remember)
    return initial


def children(parent):
    """Ids of the live worker processes that a process has spawned; multiprocessing's own servers left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields, command = stat.read_text().rpartition(")")[2].split(), (stat.parent / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent and fields[0] != "Z" and b"spawn_main" in command:
            found.append(int(stat.parent.name))
    return found
