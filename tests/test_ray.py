"""--engine ray: workers as Ray actors, in a cluster of three nodes on this machine, of which one may not act.

All but the first three tests need the extra `ray` and are slow: pytest -m slow -n 0 tests/test_ray.py
"""

import importlib.util
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_workers
from conftest import ROOT, finish, start
from helpers import checkpoint, metrics, processes, session_members, wait_for

from a3c_async import Args, check_flags, train
from common.flags import UserError

SCRIPT = ROOT / "a3c_async.py"
RAY = "--update", "pooled", "--engine", "ray", "--run-dir", "run"


def test_hogwild_is_refused(workdir):
    with pytest.raises(UserError, match="hogwild's workers share memory"):
        train(Args(engine="ray"))
    assert not list(workdir.iterdir())


def test_hogwild_on_a_gpu_is_refused():
    with pytest.raises(UserError, match="hogwild's workers share the CPU's memory"):
        check_flags(Args(device="cuda"))
    check_flags(Args(device="cuda", update="pooled"))


def test_without_ray_a_sentence_says_how_to_install_it(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "common.ray_workers", raising=False)
    with pytest.raises(UserError, match=r'needs an extra: pip install -e "\.\[ray\]"'):
        train(Args(engine="ray", update="pooled"))
    assert not list(workdir.iterdir())


# --- A cluster --------------------------------------------------------------------------------------------------------


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
        from ray.cluster_utils import Cluster

        clusters.append(Cluster())
        clusters[0].add_node(num_cpus=0, include_dashboard=False)
    (cluster,) = clusters
    nodes = cluster.worker_nodes  # what the last test has left
    while len(nodes) > 2:
        cluster.remove_node(next(iter(nodes)), allow_graceful=False)
    while len(nodes) < 2:
        cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    return cluster


@pytest.fixture
def begin(cluster):
    """Starts workers on the cluster; first() is called when it is connected."""
    from common.ray_workers import Workers

    begun = []

    def begin(target, *args, num=2, timeout=60.0, first=lambda: None):
        workers = Workers(target, num, {"number": ((3,), np.int64)}, timeout)
        begun.append(workers)
        first()
        workers.start(*args)
        return workers

    yield begin
    for workers in begun:
        workers.close()
        workers.close()  # a second time does no harm
    assert not sys.modules["ray"].is_initialized()


def actors(parent=None) -> list[int]:
    """Process ids of live actors, those of one raylet or all."""
    return [pid for pid, above, _, name in processes() if name.startswith(b"ray::Worker") and parent in (None, above)]


def raylet(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def kill_machine(cluster, node):
    """As when its power fails: raylet and all that runs on it."""
    main = raylet(node)
    for pid in [main, *(pid for pid, above, *_ in processes() if above == main)]:
        os.kill(pid, signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)


def receive(workers, seconds=90):
    end = time.monotonic() + seconds
    while (record := workers.receive()) is None:
        assert time.monotonic() < end, "timed out"
    return record["number"].tolist()


def generations_until(workers, generation, index):
    end = time.monotonic() + 90
    while receive(workers)[:2] != [index, generation]:
        assert time.monotonic() < end, "timed out"


def place(workers, index) -> int:
    """Process id of a worker."""
    while not workers._places[index]:
        receive(workers)
    return int(workers._places[index].split()[1])


@pytest.mark.slow
def test_actors_and_nodes_that_are_killed_are_replaced_and_a_new_node_gets_who_waits(begin, cluster, capfd):
    workers = begin(toy_workers.count, num=3)  # for two CPUs
    generations_until(workers, 0, 0)
    start, seen = time.monotonic(), set()
    while time.monotonic() - start < 13:
        seen.add(tuple(receive(workers)[:2]))
    assert len(seen) == 2 and workers.replaced == 0  # the third one waits, and is not taken for dead
    out, err = capfd.readouterr()
    assert err.count("waits for a free CPU in the Ray cluster\n") == 1

    third = cluster.add_node(num_cpus=1)
    while len(seen) < 3:
        seen.add(tuple(receive(workers)[:2]))
    assert workers.replaced == 0
    os.kill(place(workers, 1), signal.SIGKILL)
    generations_until(workers, 1, 1)
    assert workers.replaced == 1
    generations = list(workers._generations)
    kill_machine(cluster, third)
    while workers.replaced == 1:
        receive(workers)
    assert workers.replaced == 2
    cluster.add_node(num_cpus=1)
    (index,) = (i for i in range(3) if workers._generations[i] > generations[i])
    generations_until(workers, generations[index], index)
    assert workers.replaced == 2
    out, err = capfd.readouterr()
    assert "The actor is dead because its worker process has died\n  replaced (1 of at most 100)" in err


@pytest.mark.slow
def test_an_exception_is_shown_once_with_its_traceback(begin, capfd):
    workers = begin(toy_workers.fail_at_first, num=1)
    generations_until(workers, 1, 0)
    out, err = capfd.readouterr()
    assert workers.replaced == 1 == (out + err).count("ValueError: broken in generation 0")
    assert "worker 0 (" in err and "in fail_at_first" in err and "toy_workers.py" in err


@pytest.mark.slow
def test_workers_that_fail_before_anything_comes_in_end_the_run(begin):
    workers = begin(toy_workers.fail)
    with pytest.raises(UserError, match="(?s)^workers died 4 times before anything.* failed:.*ValueError: broken in"):
        receive(workers)
    assert workers.replaced == 3


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True], ids=["sleeps", "SIGSTOP"])
def test_a_worker_that_hangs_is_replaced(begin, capfd, stopped):
    workers = begin(toy_workers.count if stopped else toy_workers.hang_as_number_0, timeout=3.0)
    generations_until(workers, 0, 0)
    if stopped:
        os.kill(place(workers, 0), signal.SIGSTOP)
    start = time.monotonic()
    while workers.replaced == 0:
        receive(workers)
    assert 2.0 < time.monotonic() - start < 20.0
    generations_until(workers, 1, 0)  # Ray kills a stopped one after five seconds
    out, err = capfd.readouterr()
    assert workers.replaced == 1 and "worker 0 (process " in err and "gave no sign of life for 3 seconds" in err


@pytest.mark.slow
def test_a_worker_that_waits_for_the_main_process_does_not_hang(begin):
    workers = begin(toy_workers.wait_twice, num=1, timeout=1.0)
    (_, _, pid) = receive(workers)
    while not workers._places[0]:
        receive(workers)
    record = None
    while record is None:  # it has been asked for a second one, and sends it, and then nobody asks for seconds
        workers._listen(0.1)
        record = workers._records and workers._records[0]
    end = time.monotonic() + 4
    while time.monotonic() < end:
        workers._listen(0.0)
        workers.watch()
        time.sleep(0.05)
    assert receive(workers)[2] == receive(workers)[2] == pid and workers.replaced == 0


@pytest.mark.slow
def test_a_worker_has_the_parameters_that_were_newest_when_it_was_asked(begin):
    from common.ray_workers import Snapshot

    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4), torch.nn.Linear(50, 60))
    module[0].to(
        memory_format=torch.channels_last
    )  # whose parameters do not lie in memory in the order of their indices
    snapshot = Snapshot(module)

    def publish(version):
        for p in module.parameters():
            torch.nn.init.constant_(p, version)
        snapshot.publish(module, version)

    workers = begin(toy_workers.tell_version, snapshot, module, num=1, first=lambda: publish(1))
    found = []
    for version in range(2, 12):
        publish(version)
        found.append(receive(workers)[:2])
    # The first was asked for when the worker was ready, each other one when the one before came in
    assert found == [[version, 1] for version in (2, *range(2, 11))]
    for p in module.parameters():
        torch.nn.init.normal_(p)
    snapshot.publish(module, 12)
    copy = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4), torch.nn.Linear(50, 60))
    copy[0].to(memory_format=torch.channels_last)
    import ray

    snapshot.newest = ray.get(snapshot.newest)  # as an actor has it
    assert snapshot.pull(copy) == 12
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), copy.parameters()))


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_before_it_begins_is_counted(begin, capfd):
    from ray.exceptions import RayActorError

    error = RayActorError(
        "0" * 32, "The actor died.\nThe actor never ran - it was cancelled before it started running."
    )
    workers = begin(toy_workers.own_a_process, num=1)
    for _ in range(3):  # as of a machine that has died
        workers._lost(0, error)
        assert workers._causes[0] is None and workers.replaced == 0
    workers._lost(0, error)
    time.sleep(0.2)
    workers.watch()
    assert workers.replaced == 1 and "worker 0 (no process yet) died" in capfd.readouterr().err


@pytest.mark.slow
def test_what_a_worker_owns_is_closed(begin):
    workers = begin(toy_workers.own_a_process)
    pids = set()
    while len(pids) < 2:
        pids.add(receive(workers)[2])
    place(workers, 0), place(workers, 1)
    assert pids <= {pid for pid, *_ in processes()}
    workers.close()
    wait_for(lambda: not pids & {pid for pid, *_ in processes()}, timeout=5)


# --- Whole runs -------------------------------------------------------------------------------------------------------


def has_logged():
    return Path("run/metrics.csv").exists() and "lag/mean" in Path("run/metrics.csv").read_text()


def check_counts(total, num_envs, num_steps):
    """Every step counted once: by the run, and by the lag of each transition."""
    end = json.loads(Path("run/results.json").read_text())
    assert total <= end["env_steps"] < total + num_envs * num_steps and end["dropped"] == 0
    assert sum(end["lag_histogram"].values()) == end["env_steps"]
    steps = [step for step, *_ in metrics("run")]
    assert steps == sorted(steps) and steps[-1] <= end["env_steps"]
    return end


@pytest.mark.slow
def test_twelve_kills_of_actors_and_nodes_cost_nothing_but_their_rollouts(workdir, cluster, capfd):
    """At random moments. Episodes last ten steps; one counted twice or in halves would have another length."""
    total = 4500
    flags = "--env-id toy_envs:Slow-v0 --num-workers 2 --envs-per-worker 2 --num-steps 5 --batch-size 40".split()
    process = start(SCRIPT, *RAY, *flags, "--total-timesteps", total, "--eval-episodes", 2, cwd=workdir, real=True)
    wait_for(has_logged)
    rng, killed, victims, nodes = random.Random(0), 0, set(), list(cluster.worker_nodes)
    try:
        while killed < 12:
            time.sleep(rng.uniform(0.2, 2.0))
            assert process.poll() is None, "too short a run"
            if killed % 4 == 3:  # a node, with the actor that it has, and another one in its place
                node = nodes.pop(0)
                if found := set(actors(raylet(node))) - victims:
                    kill_machine(cluster, node)
                    nodes.append(cluster.add_node(num_cpus=1))
                else:
                    nodes.append(node)
                    continue
            elif found := set(actors()) - victims:
                found = {rng.choice(sorted(found))}
                os.kill(*found, signal.SIGKILL)
            killed, victims = killed + len(found), victims | found
        status, out, err = finish(process)
    finally:
        process.kill()
    assert status == 0, err
    end = check_counts(total, 4, 5)
    assert end["workers_replaced"] == killed, err
    lengths = [value for _, tag, value in metrics("run") if tag == "charts/episodic_length"]
    assert set(lengths) == {"10"} and 10 * len(lengths) <= end["env_steps"]
    assert "Traceback" not in err and "raylet" not in out + err
    with capfd.disabled():
        print(f"\n{killed} kills, {end['env_steps']} steps, {end['workers_replaced']} replaced\n{err}")


@pytest.mark.slow
def test_nothing_is_left_on_a_cluster_when_the_learner_is_killed(workdir, cluster):
    process = start(SCRIPT, *RAY, "--num-workers", 2, "--total-timesteps", 10**8, cwd=workdir, real=True)
    try:
        wait_for(lambda: has_logged() and len(actors()) == 2)
    finally:
        process.kill()
    finish(process)
    wait_for(lambda: not actors(), timeout=10)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["Ctrl-C", "SIGTERM", "SIGKILL"])
def test_a_local_instance_ends_with_the_learner(workdir, needs_ray, monkeypatch, how):
    monkeypatch.delenv("RAY_AUTH_MODE")  # as users have it
    flags = *RAY, "--num-workers", 2, "--total-timesteps", 10**8
    process = start(SCRIPT, *flags, cwd=workdir, real=True, start_new_session=True)
    try:
        wait_for(has_logged)
        members = session_members(process.pid)
        assert len(members) > 5 and len(set(actors()) & set(members)) == 2
        if how == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, how)  # as a terminal does
        status, out, err = finish(process, timeout=20)
        if how != signal.SIGKILL:
            assert status == 128 + how and out == "", out + err
            assert [line for line in err.split("\n") if line and "steps/s" not in line] == [
                "a3c_async.py on CartPole-v1, cpu, matrix products highest, run folder run",
                *err.rstrip().split("\n")[-2:],
            ], err
            assert "--resume run" in err.rstrip().split("\n")[-1]
            assert checkpoint("run")["env_steps"] > 0
        # When Ray's server has been killed with the learner, two agents of Ray's look for it for a minute more
        allowed = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent") if how == signal.SIGKILL else ()
        wait_for(
            lambda: all(name.startswith(allowed) for *_, session, name in processes() if session == process.pid),
            timeout=10,
        )
    finally:
        for pid in session_members(process.pid):
            os.kill(pid, signal.SIGKILL)


PROGRAM = """
import dataclasses, json, os, sys
sys.path.insert(0, {root!r})
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv
from a3c_async import Args, check_flags, train
from evaluate import load_args

class Short(CartPoleEnv):
    pass

if __name__ == "__main__":
    gym.register("Short-v0", entry_point=Short, max_episode_steps=7)
    args = Args(env_id="Short-v0", update="pooled", engine="ray", num_workers=2, total_timesteps=1000, eval_episodes=1)
    if "ray" in sys.argv:
        import ray
        ray.init("local", num_cpus=2, log_to_driver=False)
    for run_dir in "first", "second":
        train(dataclasses.replace(args, run_dir=run_dir))
    train(dataclasses.replace(load_args("first"), total_timesteps=2000))
    if "ray" in sys.argv:
        assert ray.is_initialized()
        ray.get(ray.remote(lambda: 1).remote())
    else:
        import ray
        assert not ray.is_initialized()
"""


@pytest.mark.slow
@pytest.mark.parametrize("word", ["", "ray"], ids=["", "the caller's Ray"])
def test_a_program_trains_twice_and_resumes_with_an_environment_of_its_own(workdir, needs_ray, word):
    (workdir / "program.py").write_text(PROGRAM.format(root=str(ROOT)))
    status, out, err = finish(start(workdir / "program.py", word, cwd=workdir), timeout=180)
    assert status == 0, err
    for run_dir, steps in ("first", 2000), ("second", 1000):
        assert steps <= json.loads(Path(run_dir, "results.json").read_text())["env_steps"] < steps + 64
        assert max(float(value) for _, tag, value in metrics(run_dir) if tag == "charts/episodic_length") == 7


@pytest.mark.slow
def test_an_address_where_no_ray_is_ends_in_a_sentence(workdir, needs_ray, monkeypatch):
    for address in "127.0.0.1:9", "nonsense":
        monkeypatch.setenv("RAY_ADDRESS", address)
        begin = time.monotonic()
        status, out, err = finish(start(SCRIPT, *RAY, cwd=workdir, real=True))
        assert status == 1 and err.count("\n") == 1 and err.startswith(f"error: RAY_ADDRESS={address}"), err
        assert time.monotonic() - begin < 30 and not list(workdir.iterdir())
