"""common/workers.py: nothing half-written is read, and workers that die, hang or fail are replaced or end the run."""

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import toy_workers
from conftest import ROOT, finish, start
from helpers import checkpoint, children, processes, session_members, wait_for

from common import workers as workers_module
from common.flags import UserError
from common.workers import Mailbox, Snapshot, Workers

FIELDS = {"number": ((), np.int64), "block": ((50, 50), np.float32)}


def receive(workers):
    end = time.monotonic() + 60
    while (record := workers.receive()) is None:
        assert time.monotonic() < end, "timed out"
    return record["number"]


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


def test_a_writer_killed_at_any_moment_leaves_whole_records():
    """Every record is whole and in its place, and the mailbox serves the next writer."""
    mailbox, context = Mailbox(FIELDS), mp.get_context("forkserver")
    for _ in range(4):
        process = context.Process(target=toy_workers.put_for_ever, args=(mailbox,), daemon=True)
        process.start()
        expected, end = 0, time.monotonic() + 60
        while expected < 500:
            record = mailbox.take()
            assert record is not None or time.monotonic() < end
            if record is None:
                time.sleep(1e-5)
            else:
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
        versions, pulls, end = set(), 0, time.monotonic() + 180
        while pulls < 1000 or len(versions) <= 10:  # a busy machine lets the two threads take long turns
            assert time.monotonic() < end
            version, pulls = snapshot.pull(copy), pulls + 1
            versions.add(version)
            assert version == 0 or ((copy.weight == version).all() and (copy.bias == version).all())
    finally:
        stop.set()
        thread.join()


def test_a_snapshot_that_changes_while_it_is_read_is_read_again(monkeypatch):
    source, copy = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    snapshot, reads, copy_parameters = Snapshot(source), [], workers_module.copy_parameters

    def disturbed(to, source_params):
        copy_parameters(to, source_params)
        reads.append(to)
        if len(reads) == 1:  # somebody publishes after this read and before its end
            torch.nn.init.constant_(source.weight, 7.0)
            snapshot.publish(source, version=5)

    monkeypatch.setattr(workers_module, "copy_parameters", disturbed)
    assert snapshot.pull(copy) == 5 and (copy.weight == 7.0).all()


# --- Life and death ---------------------------------------------------------------------------------------------------


@pytest.fixture
def begin():
    """Starts workers; at the end of the test none may be left."""
    begun = []

    def begin(target, *args, num=2, timeout=60.0):
        workers = Workers(target, num, {"number": ((3,), np.int64)}, timeout)
        begun.append(workers)
        workers.start(*args)
        return workers

    yield begin
    for workers in begun:
        workers.close()
    assert not children(os.getpid())


def test_workers_multiply_as_the_main_process_does(begin):
    before = get_precision()
    set_precision("medium", "bf16")
    workers = begin(toy_workers.tell_precision, num=1)
    set_precision(*before)
    assert receive(workers)[0] == 1


@pytest.fixture
def clock(monkeypatch):
    """The main process's clock, which `clock.ahead` seconds have been added to."""
    clock = SimpleNamespace(ahead=0.0, sleep=time.sleep)
    clock.monotonic = lambda: time.monotonic() + clock.ahead
    monkeypatch.setattr(workers_module, "time", clock)
    return clock


def generations_until(workers, generation, index):
    end = time.monotonic() + 60
    while True:
        assert time.monotonic() < end, "timed out"
        i, found, _ = receive(workers)
        if (i, found) == (index, generation):
            return


def let_pass(workers, clock, seconds, alive=()):
    """The main process is busy for so long, while those that are alive beat; then it looks."""
    before = workers._beats.tolist()
    wait_for(lambda: all(workers._beats[index] != before[index] for index in alive))
    clock.ahead += seconds
    workers.watch()


def test_every_worker_has_its_turn(begin):
    workers, order = begin(toy_workers.count, num=3), []
    for _ in range(9):
        wait_for(lambda: all(mailbox.is_full() for mailbox in workers._mailboxes))
        order.append(int(receive(workers)[0]))
    assert order[:3] == order[3:6] == order[6:] and set(order) == {0, 1, 2}


def test_receive_comes_back_without_a_record(begin):
    workers, start = begin(toy_workers.beat_once, num=1), time.monotonic()
    assert workers.receive(0.1) is None and 0.1 <= time.monotonic() - start < 5


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_replaced_in_its_place(begin, capsys, number):
    workers = begin(toy_workers.count)
    generations_until(workers, 0, 1)
    os.kill(workers.pids[1], number)
    generations_until(workers, 1, 1)
    generations_until(workers, 0, 0)  # and the other one goes on
    assert workers.replaced == 1
    assert f"was killed by signal {number}" in capsys.readouterr().err


def test_a_worker_that_raises_is_replaced_and_its_traceback_shown(begin, capsys):
    workers = begin(toy_workers.fail_as_number_1, num=3)
    generations_until(workers, 4, 1)
    err = capsys.readouterr().err
    assert "worker 1" in err and "ValueError: broken in generation 0" in err and "fail_as_number_1" in err
    assert workers.replaced == 4  # the others go on, so it is not everybody's fault


def test_a_worker_that_ends_by_itself_is_replaced_too(begin, capsys):
    workers = begin(toy_workers.leave, num=1)
    with pytest.raises(UserError, match="exited with 1"):
        receive(workers)
    assert workers.replaced == 1


@pytest.mark.parametrize("num", [1, 2])
def test_workers_that_fail_before_anything_comes_in_end_the_run_with_the_last_traceback(begin, capsys, num):
    """Twice as many of them as there are workers, and not one fewer."""
    workers = begin(toy_workers.fail, num=num)
    expected = (
        rf"(?s)^workers died {2 * num} times before anything came in; the last, worker \d \(process \d+\), failed:"
    )
    with pytest.raises(
        UserError, match=expected + ".*toy_workers.py.*in fail.*ValueError: broken in generation"
    ) as error:
        receive(workers)
    assert workers.replaced == 2 * num - 1 == capsys.readouterr().err.count("ValueError: broken in generation")
    assert any(f"(process {pid})" in str(error.value) for pid in workers.pids)


def test_of_a_long_traceback_the_end_is_shown(begin):
    workers = begin(toy_workers.fail_at_length, num=1)
    with pytest.raises(UserError, match="(?s)failed:.*üüü.*the end\n$"):
        receive(workers)


def test_workers_of_which_each_brings_something_before_it_fails_do_not_end_the_run(begin):
    workers = begin(toy_workers.send_and_fail, num=1)
    generations_until(workers, 6, 0)
    assert workers.replaced in (6, 7)


def test_workers_that_die_before_they_begin_end_the_run(begin):
    workers = begin(toy_workers.abort)
    with pytest.raises(UserError, match="workers died 4 times .* was killed by signal 6"):
        receive(workers)


def test_a_cause_is_not_that_of_the_worker_before(begin, capsys):
    workers = begin(toy_workers.fail_at_first, num=1)
    generations_until(workers, 1, 0)
    assert "ValueError: broken in generation 0" in capsys.readouterr().err
    receive(workers)  # its first beat may come after its first record
    os.kill(workers.pids[0], signal.SIGKILL)
    generations_until(workers, 2, 0)
    err = capsys.readouterr().err
    assert "was killed by signal 9, SIGKILL (out of memory?)\n" in err and "ValueError" not in err


def test_a_close_that_hangs_does_not_hide_the_traceback(begin):
    workers = begin(toy_workers.fail_beside_a_frozen_simulator, num=1)
    with pytest.raises(UserError, match="(?s)worker 0.*failed:.*ValueError: broken in generation 1"):
        receive(workers)


def test_replacing_has_an_end(begin, monkeypatch):
    monkeypatch.setattr(workers_module, "MAX_REPLACED", 1)
    workers = begin(toy_workers.count)
    with pytest.raises(UserError, match="1 workers have been replaced; the last, worker . .* was killed by signal 9"):
        for generation in (0, 1, 2):
            generations_until(workers, generation, 0)
            os.kill(workers.pids[0], signal.SIGKILL)


def test_what_a_worker_owns_is_closed(begin):
    workers = begin(toy_workers.own_a_process)
    pids = set()
    while len(pids) < 2:
        pids.add(int(receive(workers)[2]))
    assert pids <= {pid for pid, *_ in processes()}
    workers.close()
    wait_for(lambda: not pids & {pid for pid, *_ in processes()}, timeout=5)


def test_close_ends_even_a_stopped_worker(begin):
    workers = begin(toy_workers.count)
    generations_until(workers, 0, 0)
    os.kill(workers.pids[0], signal.SIGSTOP)
    assert sorted(children(os.getpid())) == sorted(workers.pids)
    workers.close()
    workers.close()  # a second time does no harm
    assert not children(os.getpid())


# --- Silence, by the main process's clock -----------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [False, True], ids=["sleeps", "SIGSTOP"])
def test_a_worker_that_hangs_is_replaced(begin, clock, capsys, stopped):
    workers = begin(toy_workers.count if stopped else toy_workers.hang_at_first, timeout=10.0, num=2 if stopped else 1)
    generations_until(workers, 0, 0)
    if stopped:
        generations_until(workers, 0, 1)
        os.kill(workers.pids[0], signal.SIGSTOP)
        wait_for(lambda: Path(f"/proc/{workers.pids[0]}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    wait_for(lambda: workers._beats[0] > 0)
    let_pass(workers, clock, 0.5)  # hears its last beat
    for _ in range(3):
        let_pass(workers, clock, 3.0, alive=[1] if stopped else [])
    assert workers.replaced == 0
    let_pass(workers, clock, 3.0, alive=[1] if stopped else [])
    assert workers.replaced == 1 and "worker 0" in (err := capsys.readouterr().err)
    assert "gave no sign of life for 10 seconds" in err
    generations_until(workers, 1, 0)


def test_a_worker_that_waits_for_the_main_process_does_not_hang(begin, clock):
    workers = begin(toy_workers.count, timeout=1.0)
    generations_until(workers, 0, 0)
    generations_until(workers, 0, 1)
    for _ in range(8):  # mailboxes are full, nobody takes
        let_pass(workers, clock, 0.45, alive=[0, 1])
    assert workers.replaced == 0


def test_time_in_which_the_main_process_was_stopped_does_not_count(begin, clock):
    workers = begin(toy_workers.count, timeout=2.0)
    generations_until(workers, 0, 0)
    generations_until(workers, 0, 1)
    for pid in workers.pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(0.2)
    workers.watch()  # hears their last beats
    let_pass(workers, clock, 1000.0)  # all stopped, as by Ctrl-Z
    for pid in workers.pids:
        os.kill(pid, signal.SIGCONT)
    for _ in range(100):
        receive(workers)
    assert workers.replaced == 0


@pytest.mark.parametrize("seconds", [1.2, 2.0])
def test_a_busy_main_process_still_notices_who_hangs(begin, clock, seconds):
    workers = begin(toy_workers.count, timeout=3.0)
    generations_until(workers, 0, 0)
    generations_until(workers, 0, 1)
    os.kill(workers.pids[0], signal.SIGSTOP)
    time.sleep(0.2)
    workers.watch()  # hears its last beat
    for _ in range(4):
        let_pass(workers, clock, seconds, alive=[1])  # an update that takes so long
        receive(workers)
    assert workers.replaced == 1


def test_a_worker_has_minutes_for_its_imports_and_seconds_after(begin, clock, capsys):
    workers = begin(toy_workers.beat_once, num=1, timeout=10.0)
    wait_for(lambda: workers._beats[0] > 0)
    let_pass(workers, clock, 1.0)  # hears it
    for _ in range(3):
        let_pass(workers, clock, 5.0)
    assert workers.replaced == 1 and "gave no sign of life for 10 seconds" in capsys.readouterr().err
    for _ in range(59):
        let_pass(workers, clock, 5.0)
    assert workers.replaced == 1
    for _ in range(3):
        let_pass(workers, clock, 5.0)
    assert workers.replaced == 2 and "gave no sign of life for 300 seconds" in capsys.readouterr().err
    for _ in range(59):  # and so has the next one
        let_pass(workers, clock, 5.0)
    assert workers.replaced == 2


# --- When the main process is gone ------------------------------------------------------------------------------------


def has_begun(pid):
    """A worker ignores Ctrl-C from the moment on that its life is tied to that of the fork server."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("SigIgn:")[2].split()[0], 16) & 1 << signal.SIGINT - 1


@pytest.mark.parametrize("update, real", [("hogwild", True), ("pooled", False)])
def test_nothing_outlives_a_killed_main_process(workdir, update, real):
    """Not even a stopped worker. And a worker that Ctrl-C reaches, at whatever moment, lives on."""
    flags = f"--run-dir run --num-workers 2 --checkpoint-every 200 --total-timesteps 1000000 --update {update}".split()
    process = start(ROOT / "a3c_async.py", *flags, cwd=workdir, start_new_session=True, real=real)
    try:
        wait_for(lambda: len(children(process.pid)) == 2)
        workers = children(process.pid)
        for worker in workers:
            os.kill(worker, signal.SIGINT)
        wait_for(lambda: checkpoint("run")["env_steps"] > 0)
        assert sorted(children(process.pid)) == sorted(workers)
        wait_for(lambda: all(has_begun(worker) for worker in workers))
        os.kill(workers[0], signal.SIGSTOP)
        process.kill()
        process.wait()
        wait_for(lambda: not session_members(process.pid), timeout=10)
    finally:
        for pid in session_members(process.pid):
            os.kill(pid, signal.SIGKILL)
        finish(process)
