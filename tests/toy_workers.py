"""What workers do in test_workers.py. A module of its own, because every worker imports it: it should be small."""

import os
import signal
import subprocess
import time

import numpy as np


def put_for_ever(mailbox):
    number = 0
    while True:
        if not mailbox.is_full():
            mailbox.put(number=number, block=np.full((50, 50), number, np.float32))
            number += 1


def count(worker, *rest):
    """Sends (index, generation, count) for ever."""
    for number in range(10**9):
        worker.send(number=[worker.index, worker.generation, number])
        time.sleep(0.002)


def tell_precision(worker):
    worker.send(number=[get_precision() == ("medium", "bf16"), 0, 0])
    count(worker)


def fail(worker):
    worker.beat()
    raise ValueError(f"broken in generation {worker.generation}")


def fail_at_length(worker):
    raise ValueError("ü" * 10_000 + "the end")


def send_and_fail(worker):
    worker.send(number=[worker.index, worker.generation, 0])
    raise ValueError("broken")


def fail_as_number_1(worker):
    if worker.index == 1 and worker.generation < 4:
        fail(worker)
    count(worker)


def fail_at_first(worker):
    if worker.generation == 0:
        fail(worker)
    count(worker)


def abort(worker):
    os.abort()


def leave(worker):
    worker.beat()


def hang_at_first(worker):
    worker.send(number=[worker.index, worker.generation, 0])
    if worker.generation == 0:
        time.sleep(10**6)
    count(worker)


def beat_once(worker):
    """The first; those that come after it do not even begin."""
    if worker.generation == 0:
        worker.beat()
    time.sleep(10**6)


class Child:
    """What an environment may have started."""

    def __init__(self):
        self.process = subprocess.Popen(["sleep", "1000"])

    def close(self):
        self.process.kill()


def own_a_process(worker):
    child = worker.close_at_exit(Child())
    worker.beat()
    while True:
        worker.send(number=[worker.index, worker.generation, child.process.pid])


class Frozen:
    """A simulator that will never answer."""

    def close(self):
        time.sleep(10**6)


def fail_beside_a_frozen_simulator(worker):
    signal.alarm = lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds / 50)  # a fast clock
    worker.close_at_exit(Frozen())
    fail(worker)


def hang_as_number_0(worker):
    """In the second record of the first generation."""
    worker.send(number=[worker.index, worker.generation, 0])
    if worker.index == worker.generation == 0:
        time.sleep(10**6)
    count(worker)


def wait_twice(worker):
    """As after a rollout that had no transition."""
    while True:
        worker.wait()
        worker.wait()
        worker.send(number=[worker.index, worker.generation, os.getpid()])


def tell_version(worker, snapshot, module):
    """The version that came with the request, and whether the parameters are all of that version."""
    while True:
        worker.wait()
        version = snapshot.pull(module)
        whole = all((p == version).all() for p in module.parameters())
        worker.send(number=[version, whole, os.getpid()])
