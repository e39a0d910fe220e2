"""common/workers.py: nothing half-written is read, and workers that die, hang or fail are replaced or end the run."""

import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import toy_workers
from conftest import ROOT, finish, start
from helpers import children, processes, session_members, wait_for

import a3c_async
from common import workers as workers_module
from common.envs import make_envs
from common.flags import UserError
from common.workers import Workers, shared

ARRAYS = np.zeros(toy_workers.IMAGES, np.uint8), np.zeros(1000, np.int64)


def beginning(Workers):
    """A function that starts workers, for a fixture; they are closed at its end."""
    begun = []

    def begin(target, *args, num=2, arrays=(), timeout=300.0):
        flags = SimpleNamespace(matmul_precision="medium", worker_timeout=timeout)
        begun.append(workers := Workers(target, num, flags, module := toy_workers.network(), arrays))
        workers.set = lambda version: toy_workers.set_parameters(module, version) or workers.publish(version)
        workers.seen = {}
        workers.set(0)
        workers.start(*args)
        return workers

    yield begin
    for workers in begun:
        workers.close()
        workers.close()  # a second time does no harm


@pytest.fixture
def begin():
    yield from beginning(Workers)
    assert not children(os.getpid())


@pytest.fixture
def clock(monkeypatch):
    """The main process's clock, which `clock.ahead` seconds have been added to."""
    clock = SimpleNamespace(ahead=0.0)
    clock.monotonic = lambda: time.monotonic() + clock.ahead
    monkeypatch.setattr(workers_module, "time", clock)
    return clock


def check(workers, record) -> tuple[int, int, int]:
    """(index, generation, number) of a whole record, which follows that worker's last one."""
    index, generation, number = record["number"]
    assert number == workers.seen.get((index, generation), -1) + 1
    workers.seen[index, generation] = number
    assert all((array == number % 251).all() for array in record["arrays"])
    return index, generation, number


def receive(workers) -> dict:
    end = time.monotonic() + 300
    while (record := workers.receive()) is None:
        assert time.monotonic() < end, "timed out"
    return record


def take(workers) -> tuple[int, int, int]:
    return check(workers, receive(workers))


def until(workers, index, generation):
    while take(workers)[:2] != (index, generation):
        assert workers._generations[index] <= generation


def pids(workers) -> list[int]:
    return [process.pid for process in workers._processes]


def wait_until_stopped(pid):
    wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def let_pass(workers, clock, seconds, but=()):
    """The main process is busy for so long; meanwhile all workers but these have something for it."""
    waiting = [*but, *(index for index, _ in workers._records)]
    wait_for(lambda: all(workers._pipes[i].poll() for i in range(len(workers._pipes)) if i not in waiting))
    clock.ahead += seconds
    record = workers.receive()
    return record and check(workers, record)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("num", [1, 2])
def test_of_a_worker_that_ends_in_half_a_record_the_record_is_lost_and_nothing_else(begin, clock, capsys, num, how):
    """(D7) It is replaced at its place, at once or after --worker-timeout, and not before; the other one goes on."""
    workers = begin(toy_workers.fill, how, num=num, arrays=ARRAYS, timeout=600.0)
    while workers.seen.get((0, 0), -1) < 2:
        take(workers)
    cause = "has ended with exit code -9 (out of memory?)"
    if how == signal.SIGSTOP:
        cause = "handed nothing over for 600 seconds (--worker-timeout)"
        wait_until_stopped(pids(workers)[0])
        for _ in range(5):
            let_pass(workers, clock, 100.0, but=[0])
        assert workers.replaced == 0
        while workers.replaced == 0 and clock.ahead < 800.0:
            let_pass(workers, clock, 100.0, but=[0])
    for index in range(num):
        until(workers, index, int(index == 0))
    assert workers.seen[0, 0] == 2 and workers.replaced == 1 and (1, 1) not in workers.seen
    assert capsys.readouterr().err == f"worker 0 {cause}\n  replaced (1 of 100)\n"


@pytest.mark.parametrize("num", [1, 2])
def test_of_workers_killed_or_stopped_at_random_moments_records_are_whole_and_none_comes_twice(begin, clock, num):
    """And parameters are never half of an update, whoever dies while they are handed over."""
    rng, version, workers = random.Random(num), 0, begin(toy_workers.fill, num=num, arrays=ARRAYS)
    for wounded in range(1, 26):
        for _ in range(rng.randrange(1, 10)):
            version += 1
            workers.set(version)
            check(workers, record := receive(workers))
            assert record["whole"]
        time.sleep(rng.uniform(0, 3e-3))
        victim, how = rng.randrange(num), signal.SIGSTOP if wounded % 8 == 0 else signal.SIGKILL
        os.kill(pids(workers)[victim], how)
        if how == signal.SIGSTOP:
            wait_until_stopped(pids(workers)[victim])
        while workers.replaced < wounded:
            if how == signal.SIGSTOP:
                let_pass(workers, clock, 400.0, but=[victim])
            elif record := workers.receive():
                check(workers, record)
    assert workers.replaced == 25 == sum(workers._generations)


def test_a_worker_gets_the_parameters_and_the_version_that_were_newest_when_its_last_record_was_taken(begin):
    """Also those in another order of memory; and a record is a copy, which later ones do not change."""
    wanted, kept, version, workers = {}, [], 0, begin(toy_workers.fill, arrays=ARRAYS)
    end = time.monotonic() + 300
    while version < 40 or len(wanted) < 2:  # one may begin much later
        assert time.monotonic() < end
        workers.set(version := version + 1)
        kept = [*kept[-40:], receive(workers)]
        index = check(workers, kept[-1])[0]
        assert kept[-1]["whole"] and kept[-1]["version"] == wanted.get(index, kept[-1]["version"])
        wanted[index] = version
    for record in kept:
        assert all((array == record["number"][2] % 251).all() for array in record["arrays"])


def test_a_worker_is_one_record_ahead_and_every_worker_has_its_turn(begin, clock):
    started, turns = shared(np.zeros(3, np.int64)), []
    workers = begin(toy_workers.hand_over, None, started, num=3)
    while len(workers.seen) < 3:
        take(workers)
    while len(turns) < 30:
        turns.append(let_pass(workers, clock, 0.0)[0])
    assert sorted(map(turns.count, range(3))) in ([10, 10, 10], [9, 10, 11])
    time.sleep(0.2)
    assert started.tolist() == [workers.seen[i, 0] + 2 for i in range(3)]  # one waits to be taken


def test_workers_multiply_as_the_flag_says_and_with_one_thread_and_receive_comes_back_without_a_record(begin):
    workers = begin(toy_workers.tell_precision, num=1)
    assert receive(workers)["number"] == [True, 1, 0] and workers.receive() is workers.receive() is None


@pytest.mark.parametrize("Error", [ValueError, ConnectionResetError, EOFError], ids=lambda Error: Error.__name__)
def test_a_worker_that_raises_is_replaced_and_its_traceback_shown(begin, capfd, Error):
    """Whatever it raises; also what a broken pipe of the worker's own would."""
    workers = begin(toy_workers.fail_at_first, Error, 1, 4, num=3)
    until(workers, 1, 4)
    err = capfd.readouterr().err
    assert [err.count(f"{Error.__name__}: broken in generation {i}\n") for i in range(5)] == [1, 1, 1, 1, 0]
    assert err.count("worker 1 failed:") == 4 == workers.replaced and "in fail_at_first" in err


FAULTS = {
    "raises": ("failed:.*toy_workers.py.*in fail.*ValueError: broken in generation 2", toy_workers.fail),
    "long": ("failed:.*üüü in generation 2", toy_workers.fail, ValueError, "ü" * 300_000),
    "close() hangs": ("failed:.*ValueError: broken in generation 2", toy_workers.fail_beside_a_frozen_simulator),
    "aborts": ("has ended with exit code -6$", toy_workers.call, os.abort),
    "leaves": ("has ended with exit code 3$", toy_workers.call, sys.exit, 3),
}


@pytest.mark.parametrize("cause, target, args", [(x, y, z) for x, y, *z in FAULTS.values()], ids=FAULTS)
def test_more_than_two_deaths_in_a_row_for_each_worker_end_the_run_with_the_last_cause(begin, cause, target, args):
    workers = begin(target, *args, num=1)
    with pytest.raises(UserError, match=f"(?s)^workers died 3 times in a row; the last, worker 0, {cause}"):
        receive(workers)


def test_a_record_makes_up_for_deaths_and_replacing_has_an_end(begin, monkeypatch):
    monkeypatch.setattr(workers_module, "MAX_REPLACED", 6)
    workers = begin(toy_workers.hand_over_and_fail, num=1)
    with pytest.raises(UserError, match="ValueError: broken in generation 6"):
        for generation in range(8):
            assert take(workers) == (0, generation, 0)
    assert len(workers.seen) == 7


def test_a_worker_whose_target_returns_stays_and_close_ends_even_a_stopped_one(begin):
    workers = begin(toy_workers.return_as_number_0)
    first = pids(workers)
    while len(workers.seen) < 2 or workers.seen[1, 0] < 100:
        take(workers)
    assert workers.replaced == 0 and workers.seen[0, 0] == 0 and sorted(children(os.getpid())) == sorted(first)
    os.kill(first[0], signal.SIGSTOP)  # none is left: see `begin`


def test_what_a_worker_owns_is_closed_when_it_fails_and_when_it_is_ended(begin):
    workers, owned = begin(toy_workers.hand_over_and_fail, True), set()
    while len(owned) < 4:  # two of them of workers that have failed
        owned.add(receive(workers)["number"][2])
    workers.close()
    wait_for(lambda: not owned & {pid for pid, *_ in processes()})


def test_a_worker_that_waits_for_the_main_process_does_not_hang(begin, clock):
    workers = begin(toy_workers.hand_over, num=3)
    for _ in range(20):
        let_pass(workers, clock, 1000.0)
    assert workers.replaced == 0 and len(workers.seen) == 3


def test_a_worker_has_minutes_for_its_environments_however_short_the_timeout(begin, clock, capsys):
    workers = begin(toy_workers.call, time.sleep, 10**6, num=1, timeout=10.0)
    for replaced in (0, 1):
        let_pass(workers, clock, 0.0)  # it has imported everything and builds its environments
        for _ in range(2):
            clock.ahead += 100.0
            assert workers.receive() is None and workers.replaced == replaced
        clock.ahead += 150.0
        assert workers.receive() is None and workers.replaced == replaced + 1
    assert capsys.readouterr().err.count("worker 0 handed nothing over for") == 2


def test_steps_of_a_hogwild_worker_are_never_more_than_the_main_process_counts(begin):
    """Else it would wait for ever for steps of workers that were killed between the two."""
    args = a3c_async.Args(num_workers=2, num_envs=2, num_steps=4, total_timesteps=150)
    agent = a3c_async.make_agent(make_envs(args, 1), args).share_memory()
    optimizer = a3c_async.make_optimizer(agent, args)
    steps, updates = (shared(np.zeros(2, np.int64)) for _ in range(2))
    workers, counted = begin(toy_workers.hogwild_that_dies, args, 0, agent, optimizer, steps, updates), 0
    while counted < 150:
        counted += receive(workers)["steps"]
        assert steps.sum() <= counted + 2 * 4  # one record of each may be on its way
    assert workers.replaced > 10


def await_checkpoints(num):
    """Until so many more have been written."""
    path = Path("run/checkpoint.pt")
    for _ in range(num):
        before = path.exists() and path.stat().st_mtime_ns
        wait_for(lambda: path.exists() and path.stat().st_mtime_ns != before)


RUNS = {"hogwild": "a3c_async.py --num-workers 2", "async": "a2c_sync.py --vectorization async"}
RUNS["pooled"] = "a3c_async.py --num-workers 2 --update pooled --batch-size 8"
ENDS = [(kind, how) for kind in RUNS for how in (signal.SIGKILL, signal.SIGINT)]
ENDS += [pytest.param(kind, signal.SIGTERM, marks=pytest.mark.slow) for kind in ("hogwild", "pooled")]


@pytest.mark.parametrize("kind, how", ENDS, ids=str)
def test_no_process_is_left(workdir, kind, how):
    """Ten seconds after SIGKILL of the main process, while workers step or (pooled) wait; Ctrl-C is for it alone.

    Not even a worker that hangs.
    """
    script, *flags = RUNS[kind].split()
    flags += ["--run-dir", "run", "--num-envs", 4, "--checkpoint-every", 100, "--total-timesteps", 10**7]
    process = start(ROOT / script, *flags, cwd=workdir, start_new_session=True)
    try:
        await_checkpoints(2)  # the first is that of step 0
        workers = children(process.pid)
        if how == signal.SIGKILL:
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.5 if kind == "pooled" else 0)  # until they wait
        else:
            for worker in workers if kind != "async" else ():
                os.kill(worker, signal.SIGINT)
            await_checkpoints(3)
            assert sorted(children(process.pid)) == sorted(workers) and len(workers) == (4 if kind == "async" else 2)
        if kind != "async":
            os.kill(workers[0], signal.SIGSTOP)
        process.kill() if how == signal.SIGKILL else os.killpg(process.pid, how)  # as a terminal or a batch system does
        process.wait(timeout=300)
        wait_for(lambda: not session_members(process.pid), timeout=10)
        status, _, err = finish(process)
        assert status == (-9 if how == signal.SIGKILL else 128 + how), err
        assert how == signal.SIGKILL or "--resume run" in err and "Traceback" not in err, err
        assert how == signal.SIGTERM or "replaced" not in err, err  # of SIGTERM a worker may have ended first
    finally:
        for pid in session_members(process.pid):
            os.kill(pid, signal.SIGKILL)
