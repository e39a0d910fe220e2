"""metrics.csv, TensorBoard events and the progress bar. The x axis is environment steps, never iterations."""

import os
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Logger:
    """Every episode goes into metrics.csv; TensorBoard gets the mean of those since the last log."""

    def __init__(self, run_dir: Path, total_timesteps: int, env_steps: int = 0, state: dict | None = None):
        """`state`: of the checkpoint at `env_steps`; what was logged after it is cut off, or hidden by TensorBoard."""
        path = run_dir / "metrics.csv"
        if state is not None and path.exists():  # perhaps shorter than it was, if the machine lost power
            kept = path.read_bytes()[: state["csv_size"]]
            os.truncate(path, kept.rfind(b"\n") + 1)
        self._csv = open(path, "a")
        if self._csv.tell() == 0:
            self._csv.write("env_steps,seconds,tag,value\n")
        self._events = SummaryWriter(str(run_dir), purge_step=None if state is None else env_steps + 1)
        state = state or {"seconds": 0.0, "returns": [], "episodes": []}
        self._returns = deque(state["returns"], maxlen=100)
        self._episodes = state["episodes"]  # return and length, since the last log
        self.longest = state.get("longest", 0)  # episode
        self._start = time.perf_counter() - state["seconds"]
        seconds = 0.2 if getattr(sys.stderr, "isatty", bool)() else 10  # in a file, a line now and then
        begin = min(env_steps, total_timesteps)
        self._bar = tqdm(total=total_timesteps, initial=begin, unit=" steps", unit_scale=True, mininterval=seconds)

    def seconds(self) -> float:
        """Seconds of training so far, earlier sessions of a resumed run included."""
        return time.perf_counter() - self._start

    def recent_return(self) -> float | None:
        """Mean training return of the last 100 episodes."""
        return sum(self._returns) / len(self._returns) if self._returns else None

    def episodes(self, env_steps: int, episodes: list):
        """Logs (environment, return, length) of each episode that ended."""
        seconds = self.seconds()
        for _, episodic_return, length in episodes:
            self._returns.append(episodic_return)
            self._episodes.append((episodic_return, length))
            self.longest = max(self.longest, int(length))
            self._csv.write(f"{env_steps},{seconds:.3f},charts/episodic_return,{episodic_return!r}\n")
            self._csv.write(f"{env_steps},{seconds:.3f},charts/episodic_length,{length:.0f}\n")

    def log(self, env_steps: int, metrics: dict):
        """Logs numbers or one-element tensors: critic_loss becomes the tag losses/critic_loss."""
        seconds = self.seconds()
        values = {name if "/" in name else f"losses/{name}": torch.as_tensor(x).item() for name, x in metrics.items()}
        values["charts/SPS"] = env_steps / seconds
        for tag, value in values.items():
            self._csv.write(f"{env_steps},{seconds:.3f},{tag},{value!r}\n")
        if self._episodes:
            means = [sum(column) / len(self._episodes) for column in zip(*self._episodes)]
            values |= zip(("charts/episodic_return", "charts/episodic_length"), means)
            self._episodes = []
            self._bar.set_postfix_str(f"return {self.recent_return():.1f}", refresh=False)
        for tag, value in values.items():
            self._events.add_scalar(tag, value, env_steps)
        self.progress(env_steps)

    def progress(self, env_steps: int):
        self._bar.update(min(env_steps, self._bar.total) - self._bar.n)

    def histogram(self, env_steps: int, tag: str, counts: dict[int, int]):
        """TensorBoard's histogram of whole numbers: value -> how often; a bucket each. Of none, nothing."""
        if counts:
            values = np.repeat(list(counts), list(counts.values()))
            edges = np.arange(min(counts), max(counts) + 2) - 0.5
            self._events.add_histogram(tag, values, env_steps, bins=edges)

    def close(self):
        if not self._csv.closed:
            self._csv.close()
            self._events.close()
            self._bar.close()

    def state_dict(self) -> dict:
        """metrics.csv only grows, so its size says what belongs to a checkpoint."""
        self._csv.flush()
        self._events.flush()
        return {
            "csv_size": self._csv.tell(), "seconds": self.seconds(),
            "returns": list(self._returns), "episodes": list(self._episodes), "longest": self.longest,
        }  # fmt: skip
