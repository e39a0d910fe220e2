"""Worker processes: started, watched and replaced. What they hand over goes through shared memory, without a lock.

A process that dies inside a lock or a queue leaves it blocked for everybody. Here every number has one writer, so a
worker may be killed or stopped at any moment: what it had not finished handing over is lost, and nothing else. What a
worker computes is up to the script, which gives a module-level function `target(worker, *args)`.

The order in which one process sees another's writes is that of x86 (and of anything as strict).
"""

import ctypes
import os
import signal
import sys
import time
import traceback
from multiprocessing import forkserver, resource_tracker

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
import torch.multiprocessing as mp
from tqdm import tqdm

from common.flags import UserError
from common.precision import get_precision, set_precision

POLL_SECONDS = 2e-4  # between two looks at a counter
STARTUP_SECONDS = 300.0  # that a new worker has for its imports and its environments
MAX_REPLACED = 100  # workers in one run


def shared(shape: tuple[int, ...], dtype) -> torch.Tensor:
    """Zeros in memory that processes share; handed over as an argument of a process."""
    return torch.from_numpy(np.zeros(shape, dtype)).share_memory_()


class Mailbox:
    """Records of one shape, from one process to one other: room for one, and a counter on either side.

    fields: name -> (shape, dtype). A side raises its counter when it is done with a record, never before.
    """

    def __init__(self, fields: dict[str, tuple]):
        self._dtype = np.dtype([(name, dtype, shape) for name, (shape, dtype) in fields.items()], align=True)
        self._bytes = shared((self._dtype.itemsize,), np.uint8)
        self._counters = shared((2,), np.int64)  # records sent, records received

    def _record(self) -> np.ndarray:
        return self._bytes.numpy().view(self._dtype)[0]

    def is_full(self) -> bool:
        sent, received = self._counters.tolist()
        return sent > received

    def put(self, **record):
        """Copies a record into the mailbox, which must be empty."""
        place = self._record()
        for name in self._dtype.names:
            place[name] = record[name]
        self._counters[0] += 1

    def take(self) -> dict[str, np.ndarray] | None:
        """The record, if there is one."""
        if not self.is_full():
            return None
        place = self._record()
        record = {name: np.array(place[name]) for name in self._dtype.names}
        self._counters[1] += 1
        return record


class Snapshot:
    """A module's parameters, published by one process and copied by others, which never see half of an update.

    `_number` is odd while they are written; a reader that finds it odd or changed reads again.
    """

    def __init__(self, module: torch.nn.Module):
        self._params = [p.detach().cpu().clone().share_memory_() for p in module.parameters()]
        self._number, self._version = shared((1,), np.int64), shared((1,), np.int64)

    def publish(self, module: torch.nn.Module, version: int):
        self._number += 1
        copy_parameters(self._params, module.parameters())
        self._version[0] = version
        self._number += 1

    def pull(self, module: torch.nn.Module) -> int:
        """Copies the parameters; returns their version."""
        while True:
            before = int(self._number)
            if before % 2 == 0:
                copy_parameters(module.parameters(), self._params)
                version = int(self._version)
                if int(self._number) == before:
                    return version
            time.sleep(POLL_SECONDS)


@torch.no_grad()
def copy_parameters(to, source):
    torch._foreach_copy_(list(to), list(source))


class Worker:
    """A worker's own view: which one it is, and its line to the main process."""

    def __init__(self, index: int, generation: int, mailbox: Mailbox, beats: torch.Tensor, errors: torch.Tensor):
        self.index, self.generation = index, generation  # generation: how many there were before it in its place
        self._mailbox, self._beats, self._errors = mailbox, beats, errors
        self._close_at_exit = []

    def close_at_exit(self, thing):
        """Gives `thing` back; its close() will be called when the worker ends, unless it is killed."""
        self._close_at_exit.append(thing)
        return thing

    def beat(self):
        """Says that it is alive; ends the process if there is no main process any more."""
        if os.getppid() != self._parent:
            sys.exit()
        self._beats[self.index] = time.monotonic()

    def wait(self):
        """Waits until the main process has taken what was handed over last."""
        pause = POLL_SECONDS
        while self._mailbox.is_full():
            self.beat()
            time.sleep(pause)
            pause = min(2 * pause, 50 * POLL_SECONDS)  # many that wait long would take the main process's time

    def send(self, **record):
        """Hands a record over."""
        self.wait()
        self._mailbox.put(**record)
        self.beat()

    def run(self, target, args: tuple, spec: bytes, precision: tuple[str, str]):
        """The process: until it is told to end, or `target` fails."""
        # The parent is the fork server, which lives as long as a process holds this file: now only the main one
        self._parent = os.getppid()
        os.close(forkserver._forkserver._forkserver_alive_fd)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not even a stopped one outlives its parent
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        torch.set_num_threads(1)
        set_precision(*precision)
        try:
            if (spec := cloudpickle.loads(spec)) is not None:
                gym.registry[spec.id] = spec
            target(self, *args)
        except SystemExit:
            pass
        except BaseException:
            text = traceback.format_exc().encode()[-self._errors.shape[1] :]
            self._errors[self.index, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            signal.alarm(5)  # the end, if close() waits for a simulator that is broken
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for thing in self._close_at_exit:
            thing.close()
        os._exit(1)


class BaseWorkers:
    """The rules for `num` workers, whatever they are: who dies or has not beaten for `timeout` seconds is replaced.

    A subclass has _launch, _end and _name, with a worker's index, and _look, which says why one has died, or None.
    To `Run` the workers are the environments: close() ends them.
    """

    def __init__(self, target, num: int, timeout: float, spec=None):
        """`spec`: gymnasium's, of the environment that workers make; the calling program may have made it itself."""
        try:
            self._spec = cloudpickle.dumps(spec)
        except Exception as error:
            raise UserError(f"{spec.id} cannot be sent to worker processes: {error}") from None
        self._target, self._timeout = target, timeout
        self._beats, self._generations = shared((num,), np.float64), [0] * num  # a beat changes the number from 0
        self._heard, self._silence = [0.0] * num, [0.0] * num  # last beat of a worker, seconds since
        self._warned = False
        self._failures = 0  # workers that died since a record came in
        self._last_watch = time.monotonic()
        self.replaced = 0

    def start(self, *args):
        """`args` go to the target behind its Worker; tensors among them should be shared."""
        self._args = args
        for index in range(len(self._generations)):
            self._start(index)

    def _start(self, index: int):
        self._beats[index] = 0
        self._heard[index] = self._silence[index] = 0.0
        self._launch(index)
        self._generations[index] += 1

    def watch(self):
        """Replaces workers that died or hang, with a line each; raises UserError when that would not help.

        Looks ten times a second, so that it can be called at every turn.
        """
        now = time.monotonic()
        if now - self._last_watch < 0.1:
            return
        # If this process was stopped, so were the workers, perhaps: of such a pause only so much counts
        passed = min(now - self._last_watch, self._timeout / 2)
        self._last_watch = now
        for index in range(len(self._generations)):
            beat = float(self._beats[index])
            allowed = self._timeout if beat else max(self._timeout, STARTUP_SECONDS)
            self._silence[index] = self._silence[index] + passed if beat == self._heard[index] else 0.0
            self._heard[index] = beat
            if (cause := self._look(index)) is not None:
                self._failures += 1
                self._replace(index, cause)
            elif self._silence[index] > allowed:
                self._replace(index, f"gave no sign of life for {allowed:g} seconds")
            elif self._silence[index] > allowed / 2 and not self._warned:
                self._warned = True
                tqdm.write(
                    f"worker {index} has taken {allowed / 2:g} seconds for a step and is replaced after {allowed:g}: "
                    "where steps take so long, give a larger --worker-timeout",
                    file=sys.stderr,
                )

    def _replace(self, index: int, cause: str):
        name = self._name(index)
        self._end(index)
        if self._failures >= 2 * len(self._generations):
            raise UserError(f"workers died {self._failures} times before anything came in; the last, {name}, {cause}")
        if self.replaced == MAX_REPLACED:
            raise UserError(f"{MAX_REPLACED} workers have been replaced; the last, {name}, {cause}")
        self.replaced += 1
        tqdm.write(f"{name} {cause}\n  replaced ({self.replaced} of at most {MAX_REPLACED})", file=sys.stderr)
        self._start(index)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict):
        pass


class Workers(BaseWorkers):
    """Processes that run target(worker, *args). close() ends them."""

    def __init__(self, target, num: int, fields: dict[str, tuple], timeout: float, spec=None):
        super().__init__(target, num, timeout, spec)
        self._mailboxes = [Mailbox(fields) for _ in range(num)]
        self._errors = shared((num, 8192), np.uint8)
        self._processes, self._turn = [None] * num, 0
        # Forked from a process that has imported everything and run nothing, a worker starts in hundredths of a second
        mp.set_forkserver_preload([target.__module__, "torch", "gymnasium", "tyro", "torch.utils.tensorboard"])

    def _launch(self, index: int):
        self._errors[index] = 0
        worker = Worker(index, self._generations[index], self._mailboxes[index], self._beats, self._errors)
        args = self._target, self._args, self._spec, get_precision()
        process = mp.get_context("forkserver").Process(target=worker.run, args=args)
        resource_tracker.ensure_running()  # it would lift the mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by the fork server and its workers
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._processes[index] = process

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def receive(self, seconds: float = 0.1) -> dict[str, np.ndarray] | None:
        """A record of a worker that has one, each in its turn; None if there is none for so long."""
        end = time.monotonic() + seconds
        while True:
            self.watch()
            for _ in self._mailboxes:
                self._turn = (self._turn + 1) % len(self._mailboxes)
                if (record := self._mailboxes[self._turn].take()) is not None:
                    self._failures = 0
                    return record
            if time.monotonic() > end:
                return None
            time.sleep(POLL_SECONDS)

    def _look(self, index: int) -> str | None:
        if (exitcode := self._processes[index].exitcode) is None:
            return None
        text = bytes(self._errors[index].numpy()).rstrip(b"\0").decode(errors="replace")
        if text:
            return f"failed:\n{text}"
        killed = f"was killed by signal {-exitcode}" if exitcode < 0 else f"exited with {exitcode}"
        if exitcode == -signal.SIGKILL:
            killed += ", SIGKILL (out of memory?)"
        elif exitcode > 0 and not self._beats[index]:
            killed += ' before it began (if your own program calls train(): behind `if __name__ == "__main__":`?)'
        return killed

    def _name(self, index: int) -> str:
        return f"worker {index} (process {self._processes[index].pid})"

    def _end(self, index: int):
        end([self._processes[index]])

    def close(self, terminate: bool = False):
        """Ends all processes."""
        end([process for process in self._processes if process is not None])
        self._processes = [None] * len(self._processes)


def engine(name: str) -> tuple[type, type]:
    """The Snapshot and the Workers of --engine."""
    if name == "processes":
        return Snapshot, Workers
    try:
        from common import ray_workers
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UserError('--engine ray needs an extra: pip install -e ".[ray]"') from None
    return ray_workers.Snapshot, ray_workers.Workers


def end(processes: list):
    """Lets processes close what they own, and kills those that have not ended a second later."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + 1
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
