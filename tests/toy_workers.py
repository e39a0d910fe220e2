"""What workers do in test_workers.py and test_ray.py. A module of its own, because every worker imports it."""

import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import torch

IMAGES = (64, 128, 128)  # 1 MB of uint8


def hand_over(worker, numbers=None, module=None):
    """Hands (index, generation, number) over, for ever or for these numbers."""
    for number in itertools.count() if numbers is None else numbers:
        worker.next(module)
        worker.send(number=[worker.index, worker.generation, number])


def count(worker):
    hand_over(worker, module=network())


def count_aloud(worker, started):
    """Says in shared memory how often it has been allowed to go on."""
    for number in itertools.count():
        worker.next()
        started[worker.index] += 1
        worker.send(number=[worker.index, worker.generation, number])


def one_record(worker):
    """As worker 0 returns after one record."""
    hand_over(worker, [0] if worker.index == 0 else None)


def network():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4), torch.nn.Linear(200, 200)).to(memory_format=torch.channels_last)


def set_parameters(module, value):
    for p in module.parameters():
        torch.nn.init.constant_(p, value)


def fill(worker, how=0):
    """Arrays full of the record's number, and the version with which it was made. In its fourth record the first worker
    gets the signal `how` when it has written half of it."""
    module = network()

    def halves(number):
        yield np.full(IMAGES, number % 251, np.uint8)
        if how and number == 3 and worker.index == worker.generation == 0:
            os.kill(os.getpid(), how)
        yield np.full(1000, number % 251)

    for number in itertools.count():
        version = worker.next(module)
        whole = all((p == version).all() for p in module.parameters())
        worker.send(halves(number), number=[worker.index, worker.generation, number], version=version, whole=whole)


def tell_precision(worker):
    worker.next()
    worker.send(number=[torch.get_float32_matmul_precision() == "medium", torch.get_num_threads(), 0])


def fail(worker, Error=ValueError):
    raise Error(f"broken in generation {worker.generation}")


def fail_at_length(worker):
    raise ValueError("ü" * 300_000 + "the end")


def fail_beside_a_frozen_simulator(worker):
    worker.at_exit.callback(time.sleep, 10**6)
    fail(worker)


def fail_as_number_1(worker, Error):
    if worker.index == 1 and worker.generation < 4:
        fail(worker, Error)
    count(worker)


def fail_at_first(worker):
    if worker.generation == 0:
        fail(worker)
    count(worker)


def hand_over_and_fail(worker):
    hand_over(worker, [0])
    worker.next()  # until it has been taken
    fail(worker)


def abort(worker):
    os.abort()


def leave(worker):
    sys.exit(3)


def hang(worker):
    """In its second record, the first worker of all."""
    hand_over(worker, [0], network())
    if worker.index == worker.generation == 0:
        time.sleep(10**6)
    hand_over(worker, itertools.count(1), network())


def hang_at_the_start(worker):
    """As an environment that is never built."""
    time.sleep(10**6)


def own_a_process(worker):
    """What an environment may have started."""
    child = subprocess.Popen(["sleep", "100000"])
    worker.at_exit.callback(child.kill)
    worker.next(network())
    worker.send(number=[worker.index, worker.generation, child.pid])
    worker.next(network())
    fail(worker)


def hogwild_that_dies(worker, *args):
    """a3c_async.py's worker, killed when it has learned from its third rollout and not handed it over yet."""
    from a3c_async import hogwild_worker

    send, numbers = worker.send, itertools.count(1)
    worker.send = lambda **record: send(**record) if next(numbers) < 3 else os.kill(os.getpid(), signal.SIGKILL)
    hogwild_worker(worker, *args)
