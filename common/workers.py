"""Worker processes: started, watched and replaced.

Each has a pipe, and shared memory for parameters and arrays, into which a side writes only while the other waits for
its message. So a worker may be killed or stopped at any moment: what it had not finished handing over is lost, and
nothing else. What it computes is up to the script, which gives a module-level function `target(worker, *args)`.
"""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections import deque
from contextlib import ExitStack, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait

import torch
import torch.multiprocessing as mp
from tqdm import tqdm

from common.checkpoint import set_precision
from common.flags import UserError

STARTUP_SECONDS = 300.0  # that a new worker has for its imports and its environments
MAX_REPLACED = 100  # workers in one run


def shared(array) -> torch.Tensor:
    """A copy in memory that processes share; handed over as an argument of a process."""
    try:
        return torch.as_tensor(array).detach().cpu().clone().share_memory_()
    except RuntimeError as error:
        raise UserError(f"{error}. Fewer workers, a larger /dev/shm, or more open files (ulimit -n) help.") from None


@torch.no_grad()
def copy_parameters(to, source):
    torch._foreach_copy_(list(to), list(source))


class Worker:
    """A worker's own view: which one it is, and its line to the main process."""

    def __init__(self, index: int, generation: int, pipe: Connection, params: list, arrays: list):
        self.index, self.generation = index, generation  # generation: how many there were before it in its place
        self.at_exit = ExitStack()  # of what it owns
        self._pipe, self._params, self._arrays = pipe, params, arrays

    def next(self, module: torch.nn.Module | None = None) -> int:
        """Waits until the last record has been taken; copies the newest parameters, and returns their version."""
        version = self._pipe.recv()
        if module is not None:
            copy_parameters(module.parameters(), self._params)
        return version

    def send(self, arrays=(), **record):
        """Hands a record over, and NumPy arrays. Before each one stands a next()."""
        for place, array in zip(self._arrays, arrays):
            place.numpy()[...] = array
        self._pipe.send(record)

    def run(self, target, args: tuple, precision: str):
        """The process: until the main process ends it or is no more, or `target` fails."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # which the fork server must not hear
        os.close(forkserver._forkserver._forkserver_alive_fd)  # or the fork server would live as long as this process
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not even a stopped one outlives the server
        torch.set_num_threads(1)
        set_precision(precision)
        with self.at_exit:
            try:
                self._pipe.send({})  # asks for the first parameters
                target(self, *args)
                while True:  # it has done its part
                    self._pipe.recv()
            except Exception:
                with suppress(OSError):  # there may be no main process any more
                    self._pipe.send(f"failed:\n{traceback.format_exc()}")
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing but SIGKILL cuts off what closes


class BaseWorkers:
    """The rules for `num` workers, whatever they are: who dies, or hands nothing over for so long, is replaced.

    A subclass launches, looks what has come in, takes a record, and ends. To `Run` they are the environments.
    """

    state_dict, load_state_dict = dict, staticmethod(lambda state: None)  # nothing of them is saved
    go_on = str  # gives the command for it; Run puts it here

    def __init__(self, target, num: int, args, module: torch.nn.Module | None = None, arrays=()):
        """`args`: flags; `module`: whose parameters workers get; `arrays`: like those that they hand over."""
        self._target, self._precision, self._timeout = target, args.matmul_precision, args.worker_timeout
        self._module, self._version, self._generations = module, 0, [0] * num
        self._due = {}  # of those that run: when the next record must be there, in the seconds of time.monotonic()
        self._failures = self.replaced = 0  # workers that died, since a record came in and altogether
        self._records = deque()  # (index, record), of which nothing has been taken yet

    def start(self, *args):
        """`args` go to the target behind its Worker; tensors among them should be shared."""
        self._args = args
        for index in range(len(self._generations)):
            self._launch(index)

    def publish(self, version: int):
        """The module's parameters as they are now go to a worker from now on when a record of its has been taken."""
        self._version = version

    def receive(self, seconds: float = 0.1) -> dict | None:
        """A record of a worker, in the order in which they came in; None if there is none for so long."""
        if not self._records:
            self._look(seconds)
            for index, due in self._due.items():
                if time.monotonic() > due:
                    self._replace(index, f"handed nothing over for {self._timeout:g} seconds (--worker-timeout)")
        if self._records:
            self._failures = 0
            return self._take(*self._records.popleft())

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

    def close(self):
        """Ends all of them."""
        self._end(*self._due)
        self._due = {}


class Workers(BaseWorkers):
    """Processes that run target(worker, *args)."""

    def __init__(self, target, num: int, args, module: torch.nn.Module | None = None, arrays=()):
        super().__init__(target, num, args, module, arrays)
        params = [] if module is None else list(module.parameters())
        self._params, self._arrays = ([[shared(x) for x in like] for _ in range(num)] for like in (params, arrays))
        self._processes, self._pipes = [None] * num, [None] * num
        # Forked from a process that has imported everything and run nothing, a worker starts in hundredths of a second
        mp.set_forkserver_preload([target.__module__, "torch", "gymnasium", "tyro", "torch.utils.tensorboard"])

    def _launch(self, index: int):
        self._pipes[index], its = mp.Pipe()
        worker = Worker(index, self._generations[index], its, self._params[index], self._arrays[index])
        args = self._target, self._args, self._precision
        for descriptor in [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]:
            os.close(descriptor)  # if there are too few (ulimit -n), it shows here, and not in the fork server
        process = mp.get_context("forkserver").Process(target=worker.run, args=args)
        resource_tracker.ensure_running()  # it would lift the mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # inherited
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        its.close()
        self._processes[index], self._due[index] = process, time.monotonic() + max(self._timeout, STARTUP_SECONDS)

    def _look(self, seconds: float):
        for pipe in wait(self._pipes, seconds):
            index = self._pipes.index(pipe)
            try:
                message = pipe.recv()
            except (EOFError, OSError):  # its end is closed: the process has died
                self._processes[index].join(1)
                code = self._processes[index].exitcode
                message = f"has ended with exit code {code}{' (out of memory?)' if code == -9 else ''}"
            if isinstance(message, str):
                self._replace(index, message)
            elif message:
                self._due[index] = float("inf")
                self._records.append((index, message))
            else:  # it has just begun, and builds its environments
                self._answer(index)
                self._due[index] = time.monotonic() + max(self._timeout, STARTUP_SECONDS)

    def _take(self, index: int, record: dict) -> dict:
        record["arrays"] = [array.numpy().copy() for array in self._arrays[index]]
        self._answer(index)
        return record

    def _answer(self, index: int):
        self._due[index] = time.monotonic() + self._timeout
        if self._module is not None:
            copy_parameters(self._params[index], self._module.parameters())
        try:
            self._pipes[index].send(self._version)
        except OSError:  # it has died, which the next look at the pipe will show
            pass

    def _end(self, *indices: int):
        """Lets processes close what they own, and kills those that have not ended a second later."""
        for index in indices:
            self._processes[index].terminate()
        deadline = time.monotonic() + 1
        for index in indices:
            self._processes[index].join(max(0.0, deadline - time.monotonic()))
            self._processes[index].kill()
            self._processes[index].join()
            self._pipes[index].close()
