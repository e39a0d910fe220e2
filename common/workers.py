"""Worker processes: started, watched and replaced. What they hand over goes through a pipe, of which each has its own.

So a worker may be killed at any moment: what it had not finished handing over is lost, and nothing else. What a worker
computes is up to the script, which gives a module-level function `target(worker, *args)`.
"""

import signal
import sys
import time
import traceback
from collections import deque
from contextlib import ExitStack
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait

import numpy as np
import torch
import torch.multiprocessing as mp
from tqdm import tqdm

from common.flags import UserError

MAX_REPLACED = 100  # workers in one run


def shared(shape: tuple[int, ...], dtype) -> torch.Tensor:
    """Zeros in memory that processes share; handed over as an argument of a process."""
    return torch.from_numpy(np.zeros(shape, dtype)).share_memory_()


@torch.no_grad()
def copy_parameters(to, source):
    torch._foreach_copy_(list(to), list(source))


class Worker:
    """A worker's own view: which one it is, and its line to the main process."""

    def __init__(self, index: int, generation: int, pipe: Connection, precision: str):
        self.index, self.generation = index, generation  # generation: how many there were before it in its place
        self.at_exit, self._pipe, self._precision = ExitStack(), pipe, precision  # what it owns is closed at its end

    def next(self):
        """Waits until the main process has taken what was handed over last; returns what it gives: the newest news."""
        return self._pipe.recv()

    def send(self, **record):
        """Hands a record over. Between two of them stands a next()."""
        self._pipe.send(record)

    def run(self, target, args: tuple):
        """The process: until `target` fails, or the main process ends it or is no more."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision(self._precision)
        with self.at_exit:
            try:
                self.send()  # asks for the first news
                target(self, *args)
            except (EOFError, BrokenPipeError):  # no main process any more
                pass
            except Exception:
                self._pipe.send(f"failed:\n{traceback.format_exc()}")


class BaseWorkers:
    """The rules for `num` workers, whatever they are: who dies is replaced.

    A subclass has _launch and _end, with a worker's index. To `Run` they are the environments: close() ends them.
    """

    def __init__(self, target, num: int):
        self._target, self._generations = target, [0] * num
        self._failures = self.replaced = 0  # workers that died, since a record came in and altogether
        self._news = None

    def start(self, *args):
        """`args` go to the target behind its Worker; tensors among them should be shared."""
        self._args = args
        for index in range(len(self._generations)):
            self._launch(index)

    def publish(self, news):
        """What workers get from now on when a record of theirs has been taken."""
        self._news = news

    def _replace(self, index: int, cause: str):
        """With a line; raises UserError when that would not help."""
        self._end(index)
        self._failures += 1
        self.replaced += 1
        if self._failures > 2 * len(self._generations) or self.replaced > MAX_REPLACED:
            raise UserError(f"workers died {self._failures} times in a row; the last, worker {index}, {cause}")
        tqdm.write(f"worker {index} {cause}\n  replaced ({self.replaced} of {MAX_REPLACED})", file=sys.stderr)
        self._generations[index] += 1
        self._launch(index)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict):
        pass


class Workers(BaseWorkers):
    """Processes that run target(worker, *args). close() ends them."""

    def __init__(self, target, num: int):
        super().__init__(target, num)
        self._processes, self._pipes, self._records = [None] * num, [None] * num, deque()
        # Forked from a process that has imported everything and run nothing, a worker starts in hundredths of a second
        mp.set_forkserver_preload([target.__module__, "torch", "gymnasium", "tyro", "torch.utils.tensorboard"])

    def _launch(self, index: int):
        self._pipes[index], its = mp.Pipe()
        worker = Worker(index, self._generations[index], its, torch.get_float32_matmul_precision())
        process = mp.get_context("forkserver").Process(target=worker.run, args=(self._target, self._args))
        resource_tracker.ensure_running()  # it would lift the mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for the fork server and its workers, too
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        its.close()
        self._processes[index] = process

    def receive(self, seconds: float = 0.1) -> dict | None:
        """A record of a worker, in the order in which they came in; None if there is none for so long."""
        end = time.monotonic() + seconds
        while not self._records:
            ready = wait(self._pipes, max(0.0, end - time.monotonic()))
            if not ready:
                return None
            for pipe in ready:
                self._read(self._pipes.index(pipe), pipe)
        index, pipe, record = self._records.popleft()
        self._answer(pipe)
        self._failures = 0
        return record

    def _read(self, index: int, pipe: Connection):
        try:
            record = pipe.recv()
        except (EOFError, OSError):  # its end is closed: the process has died
            self._processes[index].join(1)
            record = f"has ended with exit code {self._processes[index].exitcode} (-9: out of memory?)"
        if isinstance(record, str):
            self._replace(index, record)
        elif record:
            self._records.append((index, pipe, record))
        else:  # it has just begun
            self._answer(pipe)

    def _answer(self, pipe: Connection):
        try:
            pipe.send(self._news)
        except OSError:  # it has died, which the next look at the pipe will show
            pass

    def _end(self, index: int):
        end([self._processes[index]])
        self._pipes[index].close()

    def close(self):
        """Ends all processes."""
        end([process for process in self._processes if process is not None])
        self._processes = [None] * len(self._processes)


def end(processes: list):
    """Lets processes close what they own, and kills those that have not ended a second later."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + 1
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
