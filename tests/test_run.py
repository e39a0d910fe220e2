"""What a run promises for every script: signals, locks, numbers that are not finite, no process left behind."""

import os
import re
import shlex
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, finish, start
from helpers import checkpoint, events, metrics, results, session_members, wait_for

import a2c_sync
from a2c_sync import Args, train
from common.flags import UserError

SCRIPT = ROOT / "a2c_sync.py"
SLOW = ["--env-id", "toy_envs:Slow-v0", "--run-dir", "my run"]
ASYNC = ["--vectorization", "async", "--num-envs", "2"]


def has_trained():
    return os.path.exists("my run/checkpoint.pt") and "losses/actor_loss" in events("my run")


def command_of(err):
    """The words of the command that says how to go on."""
    return shlex.split(re.search(r"^  python (.*--resume.*)$", err, re.MULTILINE).group(1))


# --- Signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupt_checkpoints_and_prints_how_to_go_on(workdir, number):
    """At once, long before the next one is due. With processes of environments, which end, too."""
    process = start(SCRIPT, *SLOW, *ASYNC, cwd=workdir, start_new_session=True)
    wait_for(has_trained)
    if number == signal.SIGTERM:  # as timeout(1) does, which sends it to the process and then to its group
        process.send_signal(number)
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal does
    status, out, err = finish(process, timeout=20)
    assert status == 128 + number and "Traceback" not in err, err
    wait_for(lambda: not session_members(process.pid), timeout=5)
    steps = checkpoint("my run")["env_steps"]
    assert f"Stopped at environment step {steps:,}." in err and not Path("my run/results.json").exists()
    more = f"--total-timesteps {steps + 20} --vectorization sync --eval-episodes 1".split()
    status, out, err = finish(start(*command_of(err), *more, cwd=workdir))
    assert status == 0 and steps + 20 <= results("my run")["env_steps"] < steps + 40, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_evaluation_says_how_to_go_on(workdir, number):
    words = "--num-envs 4 --total-timesteps 60 --eval-episodes 1000".split()
    process = start(SCRIPT, *SLOW, *words, cwd=workdir)
    wait_for(lambda: os.path.exists("my run/checkpoint.pt") and checkpoint("my run")["env_steps"] >= 60)
    time.sleep(0.2)
    process.send_signal(number)
    status, out, err = finish(process, timeout=20)
    assert status == 128 + number and "Traceback" not in err and command_of(err)[1:] == ["--resume", "my run"], err
    assert not Path("my run/results.json").exists()


def test_a_second_interrupt_ends_at_once(workdir):
    """For whoever will not wait for the end of the rollout."""
    process = start(SCRIPT, *SLOW, "--num-steps", "10000", cwd=workdir)
    wait_for(lambda: os.path.exists("my run/checkpoint.pt"))
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process, timeout=10)
    assert status != 0 and checkpoint("my run")["env_steps"] == 0


def test_handlers_of_signals_are_given_back(workdir):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(Args(run_dir="run", total_timesteps=50, num_envs=2, eval_episodes=1))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


# --- Processes of environments ----------------------------------------------------------------------------------------


def test_a_dead_environment_process_ends_the_run(workdir):
    process = start(SCRIPT, *SLOW, *ASYNC, cwd=workdir, start_new_session=True)
    wait_for(has_trained)
    environment = next(pid for pid in session_members(process.pid) if os.getpgid(pid) == pid != process.pid)
    os.kill(environment, signal.SIGKILL)
    status, out, err = finish(process, timeout=20)
    assert status not in (0, None)
    wait_for(lambda: not session_members(process.pid), timeout=10)


def test_no_environment_process_outlives_a_killed_run(workdir):
    process = start(SCRIPT, *SLOW, *ASYNC, cwd=workdir, start_new_session=True)
    wait_for(has_trained)
    assert len(session_members(process.pid)) >= 3
    process.kill()
    finish(process)
    wait_for(lambda: not session_members(process.pid), timeout=10)


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_in_use_by_a_live_run_is_refused(workdir):
    process = start(SCRIPT, *SLOW, "--num-envs", "1", cwd=workdir)
    try:
        wait_for(lambda: os.path.exists("my run/checkpoint.pt"))
        status, _, err = finish(start(SCRIPT, "--resume", "my run", cwd=workdir))
        assert status == 1 and err == "error: 'my run' is in use by another process.\n"
        status, _, err = finish(start(SCRIPT, *SLOW, cwd=workdir))
        assert status == 1 and "'my run' is already in use" in err
        assert process.poll() is None
    finally:
        process.kill()
        finish(process)
    words = f"--total-timesteps {checkpoint('my run')['env_steps'] + 20} --eval-episodes 1".split()
    status, _, err = finish(start(SCRIPT, "--resume", "my run", *words, cwd=workdir))
    assert status == 0, err  # a dead one holds nothing


def test_two_runs_at_the_same_time_get_two_folders(workdir):
    words = "--total-timesteps 100 --num-envs 2 --eval-episodes 1".split()
    processes = [start(SCRIPT, *words, cwd=workdir) for _ in range(2)]
    for process in processes:
        status, _, err = finish(process)
        assert status == 0, err
    folders = list(Path("runs").iterdir())
    assert len(folders) == 2 and all((folder / "results.json").exists() for folder in folders)
    assert metrics(folders[0]) == metrics(folders[1])


def test_of_two_runs_that_want_one_folder_one_gets_it(workdir):
    processes = [start(SCRIPT, *SLOW, "--num-envs", "1", cwd=workdir) for _ in range(2)]
    try:
        wait_for(lambda: any(process.poll() is not None for process in processes))
        loser, winner = sorted(processes, key=lambda process: process.poll() is None)
        status, _, err = finish(loser)
        assert status == 1 and "in use" in err and err.count("\n") == 1
        wait_for(has_trained)
        assert winner.poll() is None
    finally:
        for process in processes:
            process.kill()


# --- Numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id, name, steps",
    [("toy_envs:Broken-v0", "reward", 400), ("toy_envs:BrokenObsBox-v0", "observation", 140)],
    ids=["reward", "observation"],
)
@pytest.mark.parametrize("network", ["separate", "shared"])
def test_what_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(workdir, env_id, name, steps, network):
    flags = {"num_envs": 2, "total_timesteps": 2_000, "checkpoint_every": 50, "network": network}
    with pytest.raises(UserError) as error:
        train(Args(run_dir="run", env_id=env_id, **flags))
    found = re.fullmatch(
        rf"{name} is not finite at environment step ([\d,]+); the last good checkpoint is in 'run'.", str(error.value)
    )
    saved = checkpoint("run")
    assert steps - 20 <= int(found[1].replace(",", "")) <= steps + 2
    assert steps - 80 <= saved["env_steps"] <= steps
    assert all(value.isfinite().all() for value in saved["parts"]["agent"].values())
    assert not Path("run/results.json").exists()


def test_an_infinite_reward_is_not_finite_either(workdir, monkeypatch):
    import toy_envs

    monkeypatch.setattr(toy_envs.np, "nan", -np.inf)
    with pytest.raises(UserError, match="^reward is not finite"):
        train(Args(run_dir="run", env_id="toy_envs:Broken-v0", num_envs=2, total_timesteps=2_000))


def test_broken_weights_are_not_saved(workdir, monkeypatch):
    save = a2c_sync.Run.save

    def poison(run):
        if run.env_steps > 300:
            next(run._parts["agent"].parameters()).data[0] = np.nan
        save(run)

    monkeypatch.setattr(a2c_sync.Run, "save", poison)
    with pytest.raises(UserError, match="^agent's weights is not finite at environment step [345]"):
        train(
            Args(run_dir="run", env_id="toy_envs:Constant-v0", total_timesteps=1_000, checkpoint_every=200, num_envs=2)
        )
    saved = checkpoint("run")
    assert saved["env_steps"] > 0 and all(weight.isfinite().all() for weight in saved["parts"]["agent"].values())


@pytest.mark.parametrize("env_id, name", [("CartPole-v1", "(actor|critic)_loss"), ("Pendulum-v1", "action")])
def test_exploding_weights_stop_the_run_with_a_sentence(workdir, env_id, name):
    with pytest.raises(UserError, match=rf"^{name} is not finite at environment step"):
        train(Args(run_dir="run", env_id=env_id, total_timesteps=5_000, actor_lr=1e38, lr_decay=False))


# --- Importing --------------------------------------------------------------------------------------------------------


def test_importing_a_script_has_no_side_effect(workdir):
    scripts = "a2c_sync, a3c_async, off_policy_ac, sac, evaluate"
    code = f"""
import random, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy, torch
torch.set_num_threads(2), torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
import {scripts}
assert torch.get_num_threads() == 2 and torch.initial_seed() == 5
states = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
assert (states[0] == torch.get_rng_state()).all() and states[1] == numpy.random.get_state()[1].tolist()
assert states[2] == random.getstate() and torch.tensor(1e-30) * 1e-10 > 0
"""
    status, out, err = finish(start("-c", code, cwd=workdir))
    assert (status, out, err) == (0, "", "") and list(Path(".").iterdir()) == []
