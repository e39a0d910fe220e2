"""metrics.csv, TensorBoard events and the progress bar. The x axis is environment steps, never iterations."""

import os
import sys
import time
from collections import deque
from itertools import groupby
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
import torch
from tqdm import tqdm


class Logger:
    """Collects rows and writes them together: a log call costs a list append, so every episode can be logged."""

    def __init__(self, run_dir: Path, total_timesteps: int, env_steps: int, seconds: float):
        self._dir = run_dir
        self._csv = open(run_dir / "metrics.csv", "a")
        if self._csv.tell() == 0:
            self._csv.write("env_steps,seconds,tag,value\n")
        self._events = EventFileWriter(str(run_dir))
        self._rows = []
        self._returns = deque(maxlen=100)
        self._start = time.perf_counter() - seconds
        slow = not sys.stderr.isatty()  # in a file, a line now and then
        self._bar = tqdm(
            total=total_timesteps, initial=env_steps, unit=" steps", unit_scale=True, mininterval=10 if slow else 0.2
        )

    def seconds(self) -> float:
        """Seconds of training so far, earlier sessions of a resumed run included."""
        return time.perf_counter() - self._start

    def recent_return(self) -> float | None:
        """Mean training return of the last 100 episodes."""
        return sum(self._returns) / len(self._returns) if self._returns else None

    def episodes(self, env_steps: int, infos: dict):
        """Logs the episodes that gymnasium's RecordEpisodeStatistics reports as finished."""
        if "episode" not in infos:
            return
        self.progress(env_steps)
        finished, seconds = infos["_episode"], self.seconds()
        for episodic_return, length in zip(infos["episode"]["r"][finished], infos["episode"]["l"][finished]):
            self._returns.append(float(episodic_return))
            self._rows.append((env_steps, seconds, "charts/episodic_return", float(episodic_return)))
            self._rows.append((env_steps, seconds, "charts/episodic_length", int(length)))

    def log(self, env_steps: int, **scalars):
        """Logs numbers or one-element tensors: log(critic_loss=...) becomes the tag losses/critic_loss."""
        seconds = self.seconds()
        for name, value in scalars.items():
            tag = name if "/" in name else f"losses/{name}"
            self._rows.append((env_steps, seconds, tag, torch.as_tensor(value).item()))
        self._rows.append((env_steps, seconds, "charts/SPS", env_steps / seconds))
        if self._returns:
            self._bar.set_postfix_str(f"return {self.recent_return():.1f}", refresh=False)
        self.progress(env_steps)
        self._write()

    def progress(self, env_steps: int):
        self._bar.update(min(env_steps, self._bar.total) - self._bar.n)

    def histogram(self, env_steps: int, tag: str, counts: dict[int, int]):
        """TensorBoard's histogram of whole numbers: value -> how often; a bucket each."""
        numbers = sorted(counts)
        histogram = HistogramProto(
            min=numbers[0],
            max=numbers[-1],
            num=sum(counts.values()),
            sum=sum(n * count for n, count in counts.items()),
            sum_squares=sum(n * n * count for n, count in counts.items()),
            bucket_limit=[n + 0.5 for n in range(numbers[0], numbers[-1] + 1)],
            bucket=[counts.get(n, 0) for n in range(numbers[0], numbers[-1] + 1)],
        )
        summary = Summary(value=[Summary.Value(tag=tag, histo=histogram)])
        self._events.add_event(Event(wall_time=time.time(), step=env_steps, summary=summary))

    def _write(self):
        self._csv.write(
            "".join(f"{steps},{seconds:.3f},{tag},{value!r}\n" for steps, seconds, tag, value in self._rows)
        )
        now = time.time() - self.seconds()
        for steps, rows in groupby(self._rows, key=lambda row: row[0]):
            rows = list(rows)
            values = [Summary.Value(tag=tag, simple_value=value) for _, _, tag, value in rows]
            self._events.add_event(Event(wall_time=now + rows[0][1], step=steps, summary=Summary(value=values)))
        self._rows = []

    def flush(self):
        self._write()
        self._csv.flush()
        self._events.flush()

    def close(self):
        if not self._csv.closed:
            self.flush()
            self._csv.close()
            self._events.close()
            self._bar.close()

    def state_dict(self) -> dict:
        """Sizes of the files, all of which only grow: `rewind` cuts off what was written after a checkpoint."""
        self.flush()
        return {
            "sizes": {path.name: path.stat().st_size for path in log_files(self._dir)},
            "returns": list(self._returns),
        }

    def load_state_dict(self, state: dict):
        self._returns.extend(state["returns"])

    @staticmethod
    def rewind(run_dir: Path, state: dict):
        """Cuts metrics.csv and the event files back to `state`, so that nothing appears twice after a resume."""
        for path in log_files(run_dir):
            if path.name in state["sizes"]:
                os.truncate(path, state["sizes"][path.name])
            else:
                path.unlink()


def log_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("events.out.tfevents.*")) + sorted(run_dir.glob("metrics.csv"))
