"""--engine ray: workers as Ray actors, in a cluster of three nodes on this machine, of which one may not act.

All but the first test need the extra `ray` and are slow: pytest -m slow -n 0 tests/test_ray.py
"""

import importlib.util
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import test_workers
import toy_workers
from conftest import ROOT, finish, start
from helpers import checkpoint, metrics, processes, results, session_members, wait_for
from test_workers import await_checkpoints, beginning, check, receive, take, until

from a3c_async import Args, check_flags
from common.flags import UserError

SCRIPT = ROOT / "a3c_async.py"
RAY = "--update", "pooled", "--engine", "ray", "--run-dir", "run"


def test_what_ray_and_hogwild_are_not_for_is_refused(monkeypatch):
    for args in Args(engine="ray"), Args(device="cuda"):
        with pytest.raises(UserError, match="hogwild: its workers share the memory of this machine's CPU"):
            check_flags(args)
    check_flags(Args(device="cuda", update="pooled"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'needs an extra: pip install -e "\.\[ray\]"'):
        check_flags(Args(engine="ray", update="pooled"))


@pytest.fixture
def needs_ray(monkeypatch):
    if importlib.util.find_spec("ray") is None:
        pytest.fail('this test needs an extra: pip install -e ".[ray]"')
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def clusters():
    found = []
    yield found
    for cluster in found:
        cluster.shutdown()
    wait_for(lambda: not actors(), timeout=10)


@pytest.fixture
def cluster(needs_ray, clusters, monkeypatch):
    """A head, where nothing acts, and two nodes of one CPU each."""
    if not clusters:
        clusters.append(importlib.import_module("ray.cluster_utils").Cluster())
        clusters[0].add_node(num_cpus=0, include_dashboard=False)
    nodes = clusters[0].worker_nodes  # what the last test has left
    while len(nodes) > 2:
        clusters[0].remove_node(next(iter(nodes)), allow_graceful=False)
    while len(nodes) < 2:
        clusters[0].add_node(num_cpus=1)
    clusters[0].wait_for_nodes()  # or a worker might be sent to one that is just dying, and counted as dead
    monkeypatch.setenv("RAY_ADDRESS", clusters[0].address)
    return clusters[0]


@pytest.fixture
def begin(cluster):
    from common.ray_workers import Workers

    yield from beginning(Workers)
    assert not sys.modules["ray"].is_initialized()


def actors(parent=None) -> list[int]:
    """Process ids of live actors, those of one raylet or all."""
    return [pid for pid, above, _, name in processes() if name.startswith(b"ray::Worker") and parent in (None, above)]


@pytest.mark.slow
def test_a_worker_that_finds_no_cpu_waits_and_is_not_taken_for_dead(begin, cluster):
    workers, begun = begin(toy_workers.hand_over, num=3, timeout=5.0), time.monotonic()  # for two CPUs
    while time.monotonic() - begun < 15 or len(workers.seen) < 2:
        take(workers)
    assert len(workers.seen) == 2 and workers.replaced == 0
    cluster.add_node(num_cpus=1)
    while len(workers.seen) < 3:
        take(workers)
    assert workers.replaced == 0


@pytest.mark.slow
def test_an_exception_is_shown_once_with_its_traceback_and_many_end_the_run(begin, capfd):
    workers = begin(toy_workers.fail_at_first, num=1)
    until(workers, 0, 1)
    shown = "".join(capfd.readouterr())
    assert workers.replaced == 1 == shown.count("ValueError: broken in generation 0")
    assert "worker 0 failed:" in shown and "in fail_at_first" in shown and "toy_workers.py" in shown
    workers.close()
    with pytest.raises(UserError, match="(?s)^workers died 3 times in a row; .* failed:.*ValueError: broken in"):
        receive(begin(toy_workers.fail, num=1))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleeps", "SIGSTOP"])
def test_a_worker_that_hangs_is_replaced_and_one_that_waits_is_not(begin, capfd, how):
    """(D7) However long the main process was busy, when several have a record for it."""
    workers = begin(toy_workers.hang if how == "sleeps" else toy_workers.hand_over, timeout=10.0)
    while len(workers.seen) < 2:
        take(workers)
    if how == "SIGSTOP":
        os.kill(actors()[0], signal.SIGSTOP)
    while workers.replaced == 0:
        if record := workers.receive():
            check(workers, record)
    index = workers._generations.index(1)
    assert "handed nothing over for 10 seconds" in "".join(capfd.readouterr())
    until(workers, index, 1)  # Ray kills a stopped one after five seconds
    time.sleep(12)
    for _ in range(4):
        take(workers)
    assert workers.replaced == 1


@pytest.mark.slow
def test_a_worker_gets_the_parameters_that_were_newest_when_it_was_asked(begin):
    """Whole ones, also in another order of memory; and arrays come as they were sent."""
    workers, wanted = begin(toy_workers.fill), {}
    for version in range(1, 31):
        workers.set(version)
        record = receive(workers)
        index, _, number = record["number"]
        assert record["whole"] and record["version"] == wanted.get(index, 0)
        assert [(x.dtype.kind, (x == number).all()) for x in record["arrays"]] == [("u", True), ("i", True)]
        wanted[index] = version


@pytest.mark.slow
def test_what_a_worker_owns_is_closed_when_it_fails_and_when_it_is_ended(begin):
    test_workers.test_what_a_worker_owns_is_closed_when_it_fails_and_when_it_is_ended(begin)


@pytest.mark.slow
def test_twelve_kills_of_actors_and_nodes_cost_nothing_but_their_rollouts(workdir, cluster):
    """At random moments. Episodes last ten steps; one counted twice or in halves would have another length."""
    flags = "--env-id toy_envs:Slow-v0 --num-workers 2 --num-envs 4 --num-steps 5 --batch-size 40 --eval-episodes 2"
    flags = *flags.split(), "--total-timesteps", 4500, "--checkpoint-every", 100
    process = start(SCRIPT, *RAY, *flags, cwd=workdir, real=True)
    rng, killed, victims, nodes = random.Random(0), 0, set(), list(cluster.worker_nodes)
    try:
        while killed < 12:
            await_checkpoints(1 if killed % 2 else 2)  # or too many would die in a row
            time.sleep(rng.uniform(0.2, 2.0))
            assert process.poll() is None, finish(process)
            if killed % 4 == 3:  # a node, with the actor that it has, and another one in its place
                nodes.append(node := nodes.pop(0))
                raylet = node.all_processes["raylet"][0].process.pid
                if found := set(actors(raylet)) - victims:
                    for pid in raylet, *(pid for pid, above, *_ in processes() if above == raylet):
                        os.kill(pid, signal.SIGKILL)  # as when its power fails
                    cluster.remove_node(node, allow_graceful=False)
                    nodes[-1] = cluster.add_node(num_cpus=1)
            elif found := set(actors()) - victims:
                found = {rng.choice(sorted(found))}
                os.kill(*found, signal.SIGKILL)
            killed, victims = killed + len(found), victims | found
        status, out, err = finish(process)
    finally:
        process.kill()
    assert status == 0 and "Traceback" not in err and "raylet" not in out + err, err
    assert "died: The actor is dead because its worker process has died\n  replaced (" in err
    end, lengths = results("run"), [value for _, tag, value in metrics("run") if tag == "charts/episodic_length"]
    assert 4500 <= end["env_steps"] < 4500 + 4 * 5 and end["dropped"] == 0, err
    assert killed <= end["workers_replaced"] <= killed + 3, err  # one may have been sent to each node that was dying
    assert sum(end["lag_histogram"].values()) == end["env_steps"]  # every step once
    assert set(lengths) == {"10"} and 10 * len(lengths) <= end["env_steps"]


@pytest.mark.slow
def test_nothing_is_left_on_a_cluster_when_the_learner_is_killed(workdir, cluster):
    process = start(SCRIPT, *RAY, "--num-workers", 2, "--total-timesteps", 10**7, cwd=workdir, real=True)
    try:
        wait_for(lambda: len(actors()) == 2)
    finally:
        process.kill()
        finish(process)
    wait_for(lambda: not actors(), timeout=10)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["Ctrl-C", "SIGTERM", "SIGKILL"])
def test_a_local_instance_ends_with_the_learner(workdir, needs_ray, monkeypatch, how):
    monkeypatch.delenv("RAY_AUTH_MODE")  # as users have it
    flags = *RAY, "--num-workers", 2, "--total-timesteps", 10**7, "--checkpoint-every", 1000
    process = start(SCRIPT, *flags, cwd=workdir, real=True, start_new_session=True)
    try:
        await_checkpoints(2)
        wait_for(lambda: len(set(actors()) & set(session_members(process.pid))) == 2)
        if how == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, how)  # as a terminal does
        status, out, err = finish(process)
        if how != signal.SIGKILL:
            assert status == 128 + how and out == "", out + err
            lines = [line for line in err.split("\n") if line.strip() and "steps/s" not in line]
            first, stopped, command = lines  # nothing of Ray's
            assert first.endswith("run folder run"), err
            assert "Stopped" in stopped and "--resume run" in command and checkpoint("run")["env_steps"] > 0, err
        # When Ray's server has been killed with the learner, two agents of Ray's look for it for a minute more
        may = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent") if how == signal.SIGKILL else ()
        wait_for(lambda: all(name.startswith(may) for *_, of, name in processes() if of == process.pid), timeout=10)
    finally:
        for pid in session_members(process.pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_run_that_ray_ends_says_how_to_go_on(workdir, needs_ray, monkeypatch):
    """Where one of its own processes on this machine dies, Ray ends the program at once, from C++."""
    monkeypatch.delenv("RAY_AUTH_MODE")
    flags = *RAY, "--num-workers", 2, "--total-timesteps", 10**6, "--checkpoint-every", 1000
    process = start(SCRIPT, *flags, cwd=workdir, real=True, start_new_session=True)
    try:
        await_checkpoints(2)
        (agent,) = (pid for pid, *_, name in processes() if name.startswith(b"ray::DashboardAgent"))
        os.kill(agent, signal.SIGKILL)
        status, out, err = finish(process)
    finally:
        for pid in session_members(process.pid):
            os.kill(pid, signal.SIGKILL)
    assert status == 1
    assert re.search(r"error: .* killed. Go on .* with\n  python .*a3c_async.py --resume run\n", err)


PROGRAM = """
import dataclasses, ray, sys
sys.path.insert(0, {root!r})
from a3c_async import Args, train
from evaluate import load_args

if __name__ == "__main__":
    if "ray" in sys.argv:
        ray.init("local", num_cpus=2, log_to_driver=False)
    flags = {{"env_id": "mine:Short-v0", "update": "pooled", "engine": "ray", "num_workers": 2, "run_dir": "run"}}
    train(Args(**flags, total_timesteps=1000))
    train(dataclasses.replace(load_args("run"), total_timesteps=2000))
    assert ray.is_initialized() == ("ray" in sys.argv)
"""
MINE = """
import gymnasium as gym
gym.register("Short-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=7)
"""


@pytest.mark.slow
@pytest.mark.parametrize("word", ["", "ray"], ids=["", "the caller's Ray"])
def test_a_program_trains_and_resumes_with_an_environment_of_its_own_folder(workdir, needs_ray, word):
    Path("program.py").write_text(PROGRAM.format(root=str(ROOT)))
    Path("mine.py").write_text(MINE)
    status, out, err = finish(start(workdir / "program.py", word, cwd=workdir))
    assert status == 0 and 2000 <= results("run")["env_steps"] < 2000 + 128, err
    assert max(float(value) for _, tag, value in metrics("run") if tag == "charts/episodic_length") == 7


@pytest.mark.slow
def test_an_address_where_no_ray_is_ends_in_a_sentence(workdir, needs_ray, monkeypatch):
    for address in "127.0.0.1:9", "nonsense":
        monkeypatch.setenv("RAY_ADDRESS", address)
        status, out, err = finish(start(SCRIPT, *RAY, cwd=workdir, real=True), timeout=60)
        assert status == 1 and err.count("\n") == 1 and err.startswith(f"error: RAY_ADDRESS={address}"), err
        assert not list(workdir.iterdir())
