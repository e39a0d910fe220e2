"""Starts scripts as processes without their imports: forked from a process that has imported everything, run nothing.

Such a process differs from `python script.py` in its command line only. Its other end is `start` in conftest.py. There
is one thread here: a fork copies no others, but the locks that they hold.
"""

import array
import contextlib
import gc
import importlib
import json
import multiprocessing.process
import os
import selectors
import signal
import socket
import struct
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = "a2c_sync", "a3c_async", "off_policy_ac", "sac", "evaluate"
NUMBER = struct.Struct("q")


def serve(control):
    """Forks for every request; returns in the children, with the request. Here and nowhere else are they waited for."""
    wakeup, wakeup_end = os.pipe()
    os.set_blocking(wakeup_end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: for pytest
    signal.set_wakeup_fd(wakeup_end)
    selector, status_of = selectors.DefaultSelector(), {}
    for file in (control, wakeup):
        selector.register(file, selectors.EVENT_READ)
    while True:
        ready = [key.fileobj for key, _ in selector.select()]
        if wakeup in ready:
            os.read(wakeup, 1000)
            for pid in list(status_of):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    file = status_of.pop(pid)
                    with contextlib.suppress(BrokenPipeError):  # nobody wants to know
                        os.write(file, NUMBER.pack(os.waitstatus_to_exitcode(status)))
                    os.close(file)
        if control in ready:
            message, ancillary, _, _ = control.recvmsg(1 << 20, socket.CMSG_SPACE(3 * array.array("i").itemsize))
            if not message:  # there will be no more
                os._exit(0)
            request, (out, err, status) = json.loads(message), array.array("i", ancillary[0][2])
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.dup2(out, 1)
                os.dup2(err, 2)
                sys.stdout, sys.stderr = (open(file, "w", closefd=False, buffering=1) for file in (1, 2))
                if request.pop("new_session"):
                    os.setsid()
                os.write(status, NUMBER.pack(os.getpid()))  # from here on it may be sent signals
                selector.close()
                control.close()
                for file in (wakeup, wakeup_end, out, err, status, *status_of.values()):
                    os.close(file)
                return request
            status_of[pid] = status
            os.close(out)
            os.close(err)


def become(words, cwd, environment):
    """What Python does for `python script.py`: the code, and the module's dictionary to run it in."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.process.ORIGINAL_DIR = cwd
    path = os.path.abspath(words[0])
    sys.argv, sys.path[0] = words, os.path.dirname(path)
    main = types.ModuleType("__main__")
    main.__file__, main.__builtins__ = path, __builtins__
    sys.modules["__main__"] = main  # for pickle and for multiprocessing, whose processes import it by its file
    return compile(Path(path).read_bytes(), path, "exec"), main.__dict__


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    for name in (*SCRIPTS, "torch._dynamo"):  # which the first optimizer of a process imports, in a second
        importlib.import_module(name)
    for name in SCRIPTS:  # only what they import is to stay
        del sys.modules[name]
    assert len(os.listdir("/proc/self/task")) == 1
    gc.collect()
    gc.freeze()  # pages stay shared when a child collects garbage
    zygote = sys.modules["__main__"]  # stays alive in the children
    exec(*become(**serve(socket.socket(fileno=int(sys.argv[1])))))
