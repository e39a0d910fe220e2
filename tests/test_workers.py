"""common/workers.py: nothing half-written is read, and workers that die, hang or fail are replaced or end the run."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from helpers import children

from common import workers as workers_module
from common.errors import UserError
from common.workers import Mailbox, Snapshot, Workers

FIELDS = {"number": ((), np.int64), "block": ((50, 50), np.float32)}


def receive(workers, timeout=60.0):
    end = time.time() + timeout
    while (record := workers.receive()) is None:
        assert time.time() < end, "timed out"
        workers.watch()
        time.sleep(0.001)
    return record


# --- Mailbox and Snapshot ---------------------------------------------------------------------------------------------


def test_mailbox_holds_one_record():
    """Against a list, with random puts and takes."""
    rng, mailbox, model = np.random.default_rng(0), Mailbox({"number": ((), np.int64)}), []
    for i in range(2000):
        assert mailbox.is_full() == (len(model) == 1)
        if rng.random() < 0.5 and not model:
            mailbox.put(number=i)
            model.append(i)
        elif rng.random() < 0.5:
            record = mailbox.take()
            assert (record is None) == (not model)
            assert record is None or record["number"] == model.pop(0)
    assert i > 1000


def test_a_record_is_a_copy():
    mailbox = Mailbox(FIELDS)
    mailbox.put(number=1, block=1)
    record = mailbox.take()
    mailbox.put(number=2, block=2)
    assert record["number"] == 1 and (record["block"] == 1).all()


def put_for_ever(mailbox):
    number = 0
    while True:
        if not mailbox.is_full():
            mailbox.put(number=number, block=np.full((50, 50), number, np.float32))
            number += 1


def test_a_writer_killed_at_any_moment_leaves_whole_records():
    """Every record is whole and in its place, and the ring goes on with the next writer."""
    mailbox, context = Mailbox(FIELDS), mp.get_context("spawn")
    for _ in range(2):
        process = context.Process(target=put_for_ever, args=(mailbox,), daemon=True)
        process.start()
        expected, end = 0, time.time() + 60
        while expected < 3000:
            record = mailbox.take()
            assert record is not None or time.time() < end
            if record is not None:
                assert record["number"] == expected and (record["block"] == expected).all()
                expected += 1
        process.kill()
        process.join()
        while (record := mailbox.take()) is not None:  # what it had finished
            assert record["number"] == expected and (record["block"] == expected).all()
            expected += 1


def test_a_snapshot_is_never_half_of_an_update():
    source, copy = torch.nn.Linear(200, 200), torch.nn.Linear(200, 200)
    snapshot, stop = Snapshot(source), threading.Event()

    def publish():
        version = 0
        while not stop.is_set():
            version += 1
            with torch.no_grad():
                source.weight.fill_(version), source.bias.fill_(version)
            snapshot.publish(source, version)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        versions = set()
        for _ in range(2000):
            version = snapshot.pull(copy)
            versions.add(version)
            assert version == 0 or ((copy.weight == version).all() and (copy.bias == version).all())
    finally:
        stop.set()
        thread.join()
    assert len(versions) > 10


# --- Life and death ---------------------------------------------------------------------------------------------------


def count(worker, *rest):
    """Sends (index, life, count) for ever."""
    for number in range(10**9):
        worker.send(number=[worker.index, worker.life, number])
        time.sleep(0.002)


def raise_in_life(worker, lives):
    worker.send(number=[worker.index, worker.life, 0])
    if worker.life in lives:
        raise ValueError(f"broken in life {worker.life}")
    count(worker)


def raise_in_lives_of_1(worker):
    if worker.index == 1 and worker.life < 4:
        worker.beat()
        raise ValueError(f"broken in life {worker.life}")
    count(worker)


class Child:
    """What an environment may have started."""

    def __init__(self):
        self.process = subprocess.Popen(["sleep", "1000"])

    def close(self):
        self.process.kill()


def own_a_process(worker):
    child = worker.owns(Child())
    worker.beat()
    while True:
        worker.send(number=[worker.index, worker.life, child.process.pid])


def abort(worker):
    os.abort()


def hang_in_first_life(worker):
    worker.send(number=[worker.index, worker.life, 0])
    if worker.life == 0:
        time.sleep(10**6)
    count(worker)


class Frozen:
    """A simulator that will never answer."""

    def close(self):
        time.sleep(10**6)


def raise_beside_a_frozen_simulator(worker):
    worker.owns(Frozen())
    worker.beat()
    raise ValueError("broken")


@pytest.fixture
def start():
    started = []

    def start(target, *args, num=2, timeout=60.0):
        workers = Workers(target, num, {"number": ((3,), np.int64)}, timeout)
        started.append(workers)
        workers.start(*args)
        return workers

    yield start
    for workers in started:
        workers.close()
    assert not children(os.getpid())


def lives_until(workers, life, index):
    end = time.time() + 60
    while True:
        assert time.time() < end, "timed out"
        i, found, _ = receive(workers)["number"]
        if (i, found) == (index, life):
            return


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_replaced_in_its_place(start, capsys, number):
    workers = start(count)
    lives_until(workers, 0, 1)
    os.kill(workers._processes[1].pid, number)
    lives_until(workers, 1, 1)
    assert workers.replaced == 1 and {receive(workers)["number"][0] for _ in range(20)} == {0, 1}
    assert f"was killed by signal {number}" in capsys.readouterr().err


def test_a_worker_that_raises_is_replaced_and_its_traceback_shown(start, capsys):
    workers = start(raise_in_lives_of_1, num=3)
    lives_until(workers, 4, 1)
    err = capsys.readouterr().err
    assert "worker 1" in err and "ValueError: broken in life 0" in err and "raise_in_lives_of_1" in err
    assert workers.replaced == 4  # the others go on, so it is not everybody's fault


def test_a_fault_that_all_workers_hit_ends_with_its_traceback(start):
    begin = time.time()
    workers = start(raise_in_life, list(range(100)), num=2)
    with pytest.raises(UserError, match="(?s)every worker fails in the same place.*raise_in_life.*ValueError: broken"):
        while True:
            receive(workers)
    assert time.time() - begin < 60 and workers.replaced <= 2


def test_a_close_that_hangs_does_not_hide_the_traceback(start):
    workers = start(raise_beside_a_frozen_simulator)
    with pytest.raises(UserError, match="(?s)every worker fails in the same place.*ValueError: broken"):
        receive(workers, timeout=50.0)  # less than it takes to find out that a worker hangs


def test_faults_far_apart_or_of_old_workers_are_not_those_of_all(monkeypatch):
    workers, clock = Workers(count, 2, {"number": ((3,), np.int64)}, 60.0), [0.0]
    monkeypatch.setattr(workers_module.time, "monotonic", lambda: clock[0])

    def fail(index, line, hours, age=5.0):
        clock[0] += 3600 * hours
        workers._began[index] = clock[0] - age
        text = f'File "x.py", line {line}\n  code\nValueError: {clock}'.encode()
        workers._errors[index, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return workers._cause(index, 1)

    for index, line in ((0, 1), (1, 2), (0, 1), (1, 1), (1, 1)):  # in one place, but never both within two minutes
        assert "ValueError" in fail(index, line, hours=1)
    for index in (0, 1, 0, 1):  # at the same time, but after a long life
        assert "ValueError" in fail(index, 1, hours=0.001, age=200.0)
    clock[0] += 3600
    assert "ValueError" in fail(1, 1, hours=1)
    with pytest.raises(UserError, match="same place"):
        fail(0, 1, hours=0.01)


@pytest.mark.parametrize("stopped", [False, True], ids=["sleeps", "SIGSTOP"])
def test_a_worker_that_hangs_is_replaced(start, capsys, stopped):
    workers = start(count if stopped else hang_in_first_life, timeout=1.0)
    lives_until(workers, 0, 0)
    if stopped:
        os.kill(workers._processes[0].pid, signal.SIGSTOP)
    lives_until(workers, 1, 0)
    assert "gave no sign of life for 1 seconds" in capsys.readouterr().err


def test_a_worker_that_waits_for_the_main_process_does_not_hang(start):
    workers = start(count, timeout=1.0)
    lives_until(workers, 0, 1)
    for _ in range(30):  # mailboxes are full, nobody takes
        time.sleep(0.1)
        workers.watch()
    assert workers.replaced == 0


def test_replacing_has_an_end(start, monkeypatch):
    monkeypatch.setattr(workers_module, "MAX_REPLACED", 1)
    workers = start(count)
    with pytest.raises(UserError, match="1 workers have been replaced; the last, worker . .* was killed by signal 9"):
        for life in (0, 1, 2):
            lives_until(workers, life, 0)
            os.kill(workers._processes[0].pid, signal.SIGKILL)


def test_workers_that_die_before_they_begin_end_the_run(start):
    workers = start(abort, num=2)
    with pytest.raises(UserError, match="workers die before they begin; the last was killed by signal 6"):
        lives_until(workers, 9, 0)
    assert workers.replaced <= 2


def test_what_a_worker_owns_is_closed(start):
    workers = start(own_a_process)
    pids = set()
    while len(pids) < 2:
        pids.add(int(receive(workers)["number"][2]))
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    workers.close()
    end = time.time() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.time() < end, "left behind"
        time.sleep(0.01)


def test_time_in_which_the_main_process_was_stopped_does_not_count(start):
    workers = start(count, timeout=2.0)
    lives_until(workers, 0, 0)
    lives_until(workers, 0, 1)
    pids = [process.pid for process in workers._processes]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(0.2)
    workers.watch()  # hears their last beats
    time.sleep(2.5)  # all stopped, as by Ctrl-Z
    workers.watch()
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    for _ in range(100):
        receive(workers)
    assert workers.replaced == 0


@pytest.mark.parametrize("seconds", [1.2, 2.0])
def test_a_busy_main_process_still_notices_who_hangs(start, seconds):
    workers = start(count, timeout=3.0)
    lives_until(workers, 0, 0)
    lives_until(workers, 0, 1)
    os.kill(workers._processes[0].pid, signal.SIGSTOP)
    for _ in range(4):
        time.sleep(seconds)  # an update that takes so long
        receive(workers)
        workers.watch()
    assert workers.replaced == 1


def test_close_ends_even_a_stopped_worker(start):
    workers = start(count)
    lives_until(workers, 0, 0)
    os.kill(workers._processes[0].pid, signal.SIGSTOP)
    assert len(children(os.getpid())) >= 2
    workers.close()
    workers.close()  # a second time does no harm
