"""Workers as Ray actors, on however many machines there are: --engine ray.

The interface is that of common/workers.py. A worker is asked for one record at a time, and the newest parameters travel
with the request, through Ray's object store: a machine gets a version once, however many workers it has. What dies,
with its machine or alone, ends the call that waits for it; what hangs leaves the question for its beats unanswered.
"""

import logging
import math
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque

os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # its remarks on workers that died: watch() has a line for each
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import cloudpickle
import gymnasium as gym
import numpy as np
import ray
import torch
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from tqdm import tqdm

from common.flags import ROOT, UserError
from common.precision import get_precision, set_precision
from common.workers import BaseWorkers, copy_parameters

CONNECT_SECONDS = 10.0  # for a cluster to answer
WAITING_SECONDS = 10.0  # after which a worker that has no process yet is worth a line
MAX_UNBORN = 3  # times in a row that a worker may die before it began, with its machine, and not be counted


class Snapshot:
    """A module's parameters, published by one process; in a worker, those that came with its last request."""

    def __init__(self, module: torch.nn.Module):
        self.newest = None

    def publish(self, module: torch.nn.Module, version: int):
        vector = torch.cat([p.detach().flatten() for p in module.parameters()])
        self.newest = ray.put((version, vector.cpu().numpy()))

    def pull(self, module: torch.nn.Module) -> int:
        """Copies the parameters; returns their version."""
        version, vector = self.newest
        params = list(module.parameters())
        parts = torch.tensor(vector).split([p.numel() for p in params])
        copy_parameters(params, [part.view_as(p) for part, p in zip(parts, params)])
        return version

    def __getstate__(self) -> dict:
        return {"newest": None}  # a worker gets them with its requests


class Worker:
    """The actor, and the Worker that `target` sees, which runs in a thread of it."""

    def __init__(self, index: int, generation: int, fields: dict, precision: tuple[str, str], program: bytes):
        self.index, self.generation, self._fields = index, generation, fields
        self._beats, self._newest, self._ends, self._is_ready = 0, None, False, False
        self._asked, self._records, self._close_at_exit = threading.Event(), queue.SimpleQueue(), []
        set_precision(*precision)
        self._thread = threading.Thread(target=self._run, args=(program,), daemon=True)
        self._thread.start()

    def _run(self, program: bytes):
        end = "came to an end"
        try:
            torch.set_num_threads(1)
            target, args, spec = cloudpickle.loads(program)
            if (spec := cloudpickle.loads(spec)) is not None:
                gym.registry[spec.id] = spec
            self._snapshots = [arg for arg in args if isinstance(arg, Snapshot)]
            target(self, *args)
        except SystemExit:
            pass
        except BaseException:
            end = f"failed:\n{traceback.format_exc()}"
        self._records.put(end)
        for thing in self._close_at_exit:
            thing.close()

    # What the main process calls

    def next(self, newest) -> dict[str, np.ndarray] | str:
        """A record, made with these parameters or later ones; or how the target has ended."""
        self._newest = newest
        self._asked.set()
        return self._records.get()

    def beats(self) -> tuple[int, str, bool]:
        """How many there have been, where, and whether it is ready for a first request, or has ended before it."""
        place = f"process {os.getpid()} on {ray.util.get_node_ip_address()}"
        return self._beats, place, self._is_ready or not self._thread.is_alive()

    def close(self):
        self._ends = True
        self._thread.join()

    # What the target calls, as of common/workers.py

    def close_at_exit(self, thing):
        self._close_at_exit.append(thing)
        return thing

    def beat(self):
        if self._ends:
            sys.exit()
        self._beats += 1

    def wait(self):
        self._is_ready = True
        while not self._asked.wait(0.1):
            self.beat()
        for snapshot in self._snapshots:
            snapshot.newest = self._newest

    def send(self, **record):
        self.wait()
        self._asked.clear()
        self._records.put({name: np.array(record[name], dtype) for name, (_, dtype) in self._fields.items()})
        self.beat()


class Workers(BaseWorkers):
    """Ray actors that run target(worker, *args), spread over the machines. close() ends them."""

    def __init__(self, target, num: int, fields: dict[str, tuple], timeout: float, spec=None):
        super().__init__(target, num, timeout, spec)
        self._fields = fields
        self._actors, self._places, self._causes = [None] * num, [""] * num, [None] * num
        self._next_look, self._next_notice = [0.0] * num, 0.0
        self._is_asked, self._unborn = [False] * num, [0] * num
        self._calls = {}  # those without an answer: reference -> (worker, its actor, method)
        self._records = deque()  # (worker, its actor, record)
        self._has_started_ray = connect(num)

    def start(self, *args):
        self._snapshot = next((arg for arg in args if isinstance(arg, Snapshot)), None)
        self._program = ray.put(cloudpickle.dumps((self._target, args, self._spec)))
        super().start(*args)

    def _launch(self, index: int):
        # The same folders hold the same modules on every machine
        folders = [str(ROOT), os.getcwd(), *(x for x in sys.path if not x.startswith((sys.prefix, sys.base_prefix)))]
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(folders)}}
        make = ray.remote(num_cpus=1, max_concurrency=3, scheduling_strategy="SPREAD", runtime_env=environment)(Worker)
        args = index, self._generations[index], self._fields, get_precision(), self._program
        self._actors[index] = make.remote(*args)
        self._places[index], self._causes[index] = "", None
        self._next_look[index] = 0.0
        self._next_notice = time.monotonic() + WAITING_SECONDS
        self._is_asked[index] = False  # before it is ready: it may take long, and parameters would become old

    def _ask(self, index: int):
        self._call(index, "next", self._snapshot and self._snapshot.newest)

    def _call(self, index: int, method: str, *args):
        actor = self._actors[index]
        self._calls[getattr(actor, method).remote(*args)] = index, actor, method

    def _listen(self, seconds: float):
        """Takes in the answers that have come, or the first one that comes within so many seconds."""
        calls = list(self._calls)
        answered, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        if not answered and seconds > 0:
            answered, _ = ray.wait(calls, timeout=seconds)
        for call in answered:
            index, actor, method = self._calls.pop(call, (None, None, None))
            if actor is None:  # of one that has just been replaced
                continue
            try:
                answer = ray.get(call, timeout=self._timeout)
            except RayError as error:
                self._lost(index, error)
                continue
            if method == "beats":
                self._beats[index], self._places[index], is_ready = answer
                self._next_look[index] = time.monotonic() + (self._timeout / 10 if self._is_asked[index] else 0.1)
                self._unborn[index] = 0
                if is_ready and not self._is_asked[index]:
                    self._is_asked[index] = True
                    self._ask(index)
            elif isinstance(answer, str):
                self._causes[index] = answer
            else:
                self._records.append((index, actor, answer))
                self._beats[index] += 1  # a sign of life, too

    def _lost(self, index: int, error: RayError):
        if isinstance(error, RayTaskError) or getattr(error, "actor_init_failed", False):
            self._causes[index] = f"failed:\n{error}"
        elif isinstance(error, ActorUnavailableError):
            self._causes[index] = "cannot be reached any more"
        elif "never ran" in str(error) and self._unborn[index] < MAX_UNBORN:  # perhaps its machine has died
            self._unborn[index] += 1
            self._end(index)
            self._generations[index] -= 1
            self._start(index)
        else:  # Ray's advice left out
            self._unborn[index] = 0
            self._causes[index] = f"died: {str(error).splitlines()[-1].strip().partition('. ')[0]}"

    def receive(self, seconds: float = 0.1) -> dict[str, np.ndarray] | None:
        """A record of a worker, in the order in which they came in; None if there is none for so long."""
        self._listen(0.0 if self._records else seconds)
        self.watch()
        if not self._records:
            return None
        index, actor, record = self._records.popleft()
        self._failures = 0
        if actor is self._actors[index]:
            self._ask(index)
        return record

    def _look(self, index: int) -> str | None:
        now = time.monotonic()
        if now > self._next_look[index]:
            self._next_look[index] = math.inf  # until there is an answer
            self._call(index, "beats")
        if not self._places[index]:
            self._silence[index] = 0.0  # it may wait for a machine with a free CPU as long as it takes
            if now > self._next_notice:
                self._next_notice = now + WAITING_SECONDS
                if ray.available_resources().get("CPU", 0) < 1:
                    self._next_notice = math.inf
                    tqdm.write(f"worker {index} waits for a free CPU in the Ray cluster", file=sys.stderr)
        return self._causes[index]

    def _name(self, index: int) -> str:
        return f"worker {index} ({self._places[index] or 'no process yet'})"

    def _end(self, *indices: int):
        """Lets them close what they own, for a second at most, and kills them."""
        closing = [self._actors[index].close.remote() for index in indices if self._places[index]]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=1)
        for index in indices:
            ray.kill(self._actors[index])
            self._actors[index] = None
        self._calls = {call: rest for call, rest in self._calls.items() if rest[0] not in indices}

    def close(self, terminate: bool = False):
        """Ends all actors, and Ray where it was started for them."""
        self._end(*(index for index, actor in enumerate(self._actors) if actor is not None))
        if self._has_started_ray:
            self._has_started_ray = False
            ray.shutdown()


def connect(num: int) -> bool:
    """To the cluster of RAY_ADDRESS, or starts Ray on this machine; False if the calling program has done so."""
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS") or "local"
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"num_cpus": num, "include_dashboard": False}
    else:
        host, _, port = address.rpartition(":")
        try:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except (OSError, ValueError) as error:
            raise UserError(f"RAY_ADDRESS={address}, which should be host:port: {error}.") from None
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, **options)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        hint = "If it has tokens, RAY_AUTH_MODE=token and the file ~/.ray/auth_token belong on every machine."
        hint = "" if address == "local" else f" {hint}"
        raise UserError(f"Ray cannot be used at {address}: {' '.join(str(error).split())[:300]}.{hint}") from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, handler)  # Ray has set one of its own
    return True
