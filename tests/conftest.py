import array
import atexit
import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import zygote

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
# Whichever test starts the fork server of this process: workers and environments that it forks need not import these
multiprocessing.set_forkserver_preload(["torch", "gymnasium", "tyro", "torch.utils.tensorboard"])


def environment():
    """Of a process: toy_envs importable, one thread, this interpreter."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "PATH": path}


def start(*words, cwd, real=False, **popen):
    """A script as a user starts it: its own process, another working directory.

    A script of the repository is forked from the zygote, which saves the two seconds of its imports, unless `real`.
    """
    words = list(map(str, words))
    if not real and Path(words[0]).suffix == ".py" and Path(cwd, words[0]).resolve().parent == ROOT:
        return Forked(words, cwd, **popen)
    return subprocess.Popen(
        [sys.executable, *words], cwd=cwd, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **popen,
    )  # fmt: skip


class Forked:
    """A process that the zygote has forked, with as much of subprocess.Popen as the tests use."""

    control = None  # the line to the zygote, which starts with the first process and ends with pytest

    def __init__(self, words, cwd, start_new_session=False):
        if Forked.control is None:
            Forked.control = start_zygote()
        pipes = [os.pipe() for _ in range(3)]  # stdout, stderr, and what the zygote says: process id, exit status
        request = {"words": words, "cwd": str(cwd), "environment": environment(), "new_session": start_new_session}
        rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [end for _, end in pipes])
        Forked.control.sendmsg([json.dumps(request).encode()], [rights])
        for _, end in pipes:
            os.close(end)
        self._status, self._written = pipes[2][0], (bytearray(), bytearray())
        self._files = {pipes[0][0]: self._written[0], pipes[1][0]: self._written[1]}  # those that are still open
        self.args, self.returncode, self.pid = words, None, self._read()

    def _read(self):
        return zygote.NUMBER.unpack(os.read(self._status, zygote.NUMBER.size))[0]

    def poll(self):
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._read()
            os.close(self._status)
        return self.returncode

    def communicate(self, timeout=None):
        """What it and its children have written, when the last of them has closed these files, and it has ended."""
        end = None if timeout is None else time.monotonic() + timeout
        while self._files:
            ready, _, _ = select.select(self._files, [], [], None if end is None else max(0, end - time.monotonic()))
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout)
            for file in ready:
                if chunk := os.read(file, 1 << 16):
                    self._files[file] += chunk
                else:
                    os.close(file)
                    del self._files[file]
        self.wait(None if end is None else max(0, end - time.monotonic()))
        return tuple(stream.decode() for stream in self._written)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start_zygote():
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, zygote.__file__, str(its.fileno())]
    process = subprocess.Popen(command, env=environment(), pass_fds=[its.fileno()], stdout=subprocess.DEVNULL)
    its.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


def finish(process, timeout=300):
    """(exit status, stdout, stderr)"""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty working directory with a space in its name."""
    path = tmp_path / "a folder"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def double():
    """float64: for numbers that are compared with numbers from elsewhere."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
