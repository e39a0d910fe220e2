"""What workers do in test_workers.py and test_ray.py. A module of its own, because every worker imports it."""

import itertools
import os
import signal
import subprocess
import time

import numpy as np
import torch

IMAGES = (64, 128, 128)  # 1 MB of uint8


def network():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4), torch.nn.Linear(200, 200))
    return net.to(memory_format=torch.channels_last)


def set_parameters(module, value):
    for p in module.parameters():
        torch.nn.init.constant_(p, value)


def hand_over(worker, numbers=None, started=None):
    """Hands (index, generation, number) over, for these numbers or for ever; counts in `started` how often it may."""
    module = network()
    for number in itertools.count() if numbers is None else numbers:
        worker.next(module)
        if started is not None:
            started[worker.index] += 1
        worker.send(number=[worker.index, worker.generation, number])


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


def call(worker, function, *args):
    function(*args)


def fail(worker, Error=ValueError, text="broken"):
    raise Error(f"{text} in generation {worker.generation}")


def fail_at_first(worker, Error=ValueError, index=0, times=1):
    if worker.index == index and worker.generation < times:
        fail(worker, Error)
    hand_over(worker)


def fail_beside_a_frozen_simulator(worker):
    worker.at_exit.callback(time.sleep, 10**6)
    fail(worker)


def hand_over_and_fail(worker, own_a_process=False):
    """With what an environment may have started, whose process id is then the number."""
    child = subprocess.Popen(["sleep", "100000"]) if own_a_process else None
    if child:
        worker.at_exit.callback(lambda: (time.sleep(0.3), child.kill()))  # as slow as an environment may close
    hand_over(worker, [child.pid if child else 0])
    worker.next(network())  # until it has been taken
    fail(worker)


def hang(worker):
    """In its second record, the first worker of all."""
    hand_over(worker, [0])
    hand_over(worker, itertools.count(1)) if worker.index or worker.generation else time.sleep(10**6)


def return_as_number_0(worker):
    hand_over(worker, [0] if worker.index == 0 else None)


def hogwild_that_dies(worker, *args):
    """a3c_async.py's worker, killed when it has learned from its third rollout and not handed it over yet."""
    from a3c_async import hogwild_worker

    send, numbers = worker.send, itertools.count(1)
    worker.send = lambda **record: send(**record) if next(numbers) < 3 else os.kill(os.getpid(), signal.SIGKILL)
    hogwild_worker(worker, *args)
