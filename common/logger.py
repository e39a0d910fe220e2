"""metrics.csv, TensorBoard events and the progress bar. The x axis is environment steps, never iterations."""

import contextlib
import time
from collections import deque
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Logger:
    """Every episode goes into metrics.csv, which two processes cannot open; TensorBoard gets the mean of those since
    the last log."""

    def __init__(self, run_dir: Path, total_timesteps: int, env_steps: int = 0, state: dict | None = None):
        """`state`: of the checkpoint at `env_steps`; what was logged after it is cut off, or hidden by TensorBoard."""
        self._csv = open(run_dir / "metrics.csv", "a")
        try:
            import fcntl

            fcntl.flock(self._csv, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when the process dies
        except (ImportError, OSError) as error:  # Windows, or a file system without locks
            if isinstance(error, BlockingIOError):
                raise
        if state is not None:
            self._csv.seek(self._csv.truncate(min(state["csv_size"], self._csv.tell())))
        if self._csv.tell() == 0:
            self._csv.write("env_steps,seconds,tag,value\n")
        self._events = SummaryWriter(str(run_dir), purge_step=None if state is None else env_steps + 1)
        state = state or {"seconds": 0.0, "returns": [], "episodes": []}
        self._returns = deque(state["returns"], maxlen=100)
        self._episodes = state["episodes"]  # return and length, since the last log
        self.start = time.perf_counter() - state["seconds"]
        self._bar = tqdm(total=total_timesteps, initial=env_steps, unit=" steps", unit_scale=True, mininterval=0.5)

    def seconds(self) -> float:
        """Seconds of training so far, earlier sessions of a resumed run included."""
        return time.perf_counter() - self.start

    def recent_return(self) -> float | None:
        """Mean training return of the last 100 episodes."""
        return sum(self._returns) / len(self._returns) if self._returns else None

    def episodes(self, env_steps: int, episodes: list):
        """Logs (environment, return, length) of each episode that ended."""
        for _, episodic_return, length in episodes:
            self._returns.append(episodic_return)
            self._episodes.append((episodic_return, length))
            self._write(env_steps, {"charts/episodic_return": episodic_return, "charts/episodic_length": int(length)})
        self._bar.update(env_steps - self._bar.n)

    def log(self, env_steps: int, metrics: dict):
        """Logs numbers or one-element tensors: critic_loss becomes the tag losses/critic_loss."""
        values = {name if "/" in name else f"losses/{name}": torch.as_tensor(x).item() for name, x in metrics.items()}
        values["charts/SPS"] = env_steps / self.seconds()
        self._write(env_steps, values)
        if self._episodes:
            means = [sum(column) / len(self._episodes) for column in zip(*self._episodes)]
            values |= zip(("charts/episodic_return", "charts/episodic_length"), means)
            self._episodes = []
            self._bar.set_postfix_str(f"mean return of 100 episodes {self.recent_return():.1f}", refresh=False)
        self._draw(env_steps, values)
        self._bar.update(env_steps - self._bar.n)

    def evaluation(self, env_steps: int, mean_return: float):
        """Logs a greedy evaluation amid the training."""
        self._write(env_steps, {"eval/return": mean_return})
        self._draw(env_steps, {"eval/return": mean_return})

    def flags(self, flags: dict):
        rows = (f"| {name} | {value} |" for name, value in flags.items())
        self._events.add_text("flags", "\n".join(["| flag | value |", "|---|---|", *rows]))

    def _write(self, env_steps: int, values: dict):
        self._csv.writelines(f"{env_steps},{self.seconds():.3f},{tag},{value!r}\n" for tag, value in values.items())

    def _draw(self, env_steps: int, values: dict):
        for tag, value in values.items():
            self._events.add_scalar(tag, value, env_steps)

    def close(self):
        for each in (self._csv, self._events, self._bar):
            with contextlib.suppress(OSError):  # of a full disk; save() has named it
                each.close()

    def state_dict(self) -> dict:
        """metrics.csv only grows, so its size says what belongs to a checkpoint."""
        self._csv.flush()
        self._events.flush()
        numbers = {"csv_size": self._csv.tell(), "seconds": self.seconds()}
        return numbers | {"returns": list(self._returns), "episodes": list(self._episodes)}
