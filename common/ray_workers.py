"""Workers as Ray actors, on however many machines there are: --engine ray.

The interface is that of common/workers.py. A worker is asked for one record at a time, and the newest parameters travel
with the request, through Ray's object store: a machine gets them once, however many workers it has. What dies, with its
machine or alone, ends the call that waits for it.
"""

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import ExitStack

os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # its remarks on workers that died: we have a line for each
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import cloudpickle
import ray
import torch
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from common.checkpoint import set_precision
from common.flags import ROOT, UserError
from common.workers import BaseWorkers, copy_parameters

CONNECT_SECONDS = 10.0  # for a cluster to answer


class Worker:
    """The actor, and the Worker that `target` sees, which runs in a thread of it."""

    def __init__(self, index: int, generation: int, precision: str, program: bytes):
        self.index, self.generation, self.at_exit = index, generation, ExitStack()
        self._news, self._records = queue.SimpleQueue(), queue.SimpleQueue()
        set_precision(precision)
        self._thread = threading.Thread(target=self._run, args=(program,), daemon=True)
        self._thread.start()

    def _run(self, program: bytes):
        end = "came to an end"
        with self.at_exit:
            try:
                torch.set_num_threads(1)
                target, args = cloudpickle.loads(program)
                target(self, *args)
            except SystemExit:
                pass
            except BaseException:
                end = f"failed:\n{traceback.format_exc()}"
            self._records.put(end)

    # What the main process calls

    def ask(self, news) -> dict | str:
        """A record, made with these news; or how the target has ended."""
        self._news.put(news)
        return self._records.get()

    def close(self):
        self._news.put(None)
        self._thread.join()

    # What the target calls, as of common/workers.py

    def next(self, module: torch.nn.Module) -> int:
        if (news := self._news.get()) is None:
            sys.exit()
        version, params = news
        copy_parameters(module.parameters(), params)
        return version

    def send(self, arrays=(), **record):
        self._records.put(record | {"arrays": list(arrays)})


class Workers(BaseWorkers):
    """Ray actors that run target(worker, *args), spread over the machines."""

    def __init__(self, target, num: int, args, module: torch.nn.Module, arrays=()):
        super().__init__(target, num, args, module, arrays)
        self._actors, self._calls = [None] * num, {}  # those without an answer: reference -> worker
        self._watch = None
        self._has_started_ray = connect(num)

    def start(self, *args):
        self._program = ray.put(cloudpickle.dumps((self._target, args)))
        # When one of its own processes here dies, Ray ends this program: another says so, unless it hears of a good end
        words = f"error: the program or Ray has been killed. Go on from the last checkpoint with\n  {self.go_on()}"
        command = ["sh", "-c", 'read end || echo "$0" >&2', words]
        self._watch = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        super().start(*args)

    def publish(self, version: int):
        self._news = ray.put((version, [p.detach().cpu() for p in self._module.parameters()]))

    def _launch(self, index: int):
        # The same folders hold the same modules on every machine
        folders = [str(ROOT), os.getcwd(), *(x for x in sys.path if not x.startswith((sys.prefix, sys.base_prefix)))]
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(folders)}}
        make = ray.remote(num_cpus=1, max_concurrency=3, scheduling_strategy="SPREAD", runtime_env=environment)(Worker)
        self._actors[index] = make.remote(index, self._generations[index], self._precision, self._program)
        self._ask(index)
        self._due[index] = float("inf")  # it may wait for a machine with a free CPU as long as it takes

    def _ask(self, index: int):
        self._calls[self._actors[index].ask.remote(self._news)] = index
        self._due[index] = time.monotonic() + self._timeout

    def _look(self, seconds: float):
        calls = list(self._calls)
        ray.wait(calls, timeout=seconds)  # for the first; and now all that there are, or the others would look overdue
        answered, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        for call in answered:
            index = self._calls.pop(call)
            try:
                answer = ray.get(call)
            except RayError as error:
                answer = cause_of(error)
            if isinstance(answer, str):
                self._replace(index, answer)
            else:
                self._due[index] = float("inf")
                self._records.append((index, answer))

    def _take(self, index: int, record: dict) -> dict:
        self._ask(index)
        return record

    def _end(self, *indices: int):
        """Lets them close what they own, for a second at most, and kills them."""
        closing = [self._actors[index].close.remote() for index in indices]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=1)
        for index in indices:
            ray.kill(self._actors[index])
        self._calls = {call: index for call, index in self._calls.items() if index not in indices}

    def close(self):
        """Ends all of them, and Ray where it was started for them."""
        super().close()
        if self._watch:
            self._watch.communicate(b"\n")
            self._watch = None
        if self._has_started_ray:
            self._has_started_ray = False
            ray.shutdown()


def cause_of(error: RayError) -> str:
    if isinstance(error, RayTaskError) or getattr(error, "actor_init_failed", False):
        return f"failed:\n{error}"
    if isinstance(error, ActorUnavailableError):
        return "cannot be reached any more"
    return f"died: {str(error).splitlines()[-1].strip().partition('. ')[0]}"  # Ray's advice left out


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
