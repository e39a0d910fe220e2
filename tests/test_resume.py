"""A run that is killed and resumed is the run that never was; and nobody loses what a run folder holds."""

import dataclasses
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, finish, start
from helpers import checkpoint, events, metrics, results, same, wait_for
from tensorboard.summary.writer.record_writer import RecordWriter

import a2c_sync
import off_policy_ac
import sac
from a2c_sync import Args, train
from common import checkpoint as checkpoint_module
from common.checkpoint import env_seed, load_checkpoint, save_checkpoint
from common.envs import make_envs
from common.flags import UserError
from common.logger import Logger
from common.run import run_cli
from evaluate import load_agent, load_args

SHORT = {"total_timesteps": 100, "num_envs": 2, "eval_episodes": 1}


def resume(run_dir="run", **flags):
    return train(dataclasses.replace(load_args(run_dir), **flags))


def content(folder):
    """Every file of a folder and its bytes."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def command_line(monkeypatch, *words, script=a2c_sync):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    return run_cli(script.train, script.Args)


def until_next_second(run_dir="."):
    """TensorBoard reads event files in the order of their names: by the second of their start, then by process id."""
    last = max(int(path.name.split(".")[3]) for path in Path(run_dir).glob("events.*"))
    wait_for(lambda: time.time() >= last + 1)


# --- Bit-identical ----------------------------------------------------------------------------------------------------

RESUMED = {"num_envs": 4, "total_timesteps": 6_000, "checkpoint_every": 300, "eval_episodes": 3}
SLOWER = {"num_envs": 2, "total_timesteps": 600, "checkpoint_every": 60, "learning_starts": 50, "batch_size": 16}
KILLED = {
    "default": (a2c_sync, {}),
    "continuous": (a2c_sync, {"env_id": "Pendulum-v1", "network": "shared", "normalize_obs": True}),
    "replay": (off_policy_ac, SLOWER | {"env_id": "Pendulum-v1", "buffer_size": 250}),  # which wraps around
    "sac": (sac, SLOWER),
}


@pytest.mark.parametrize("script, flags", KILLED.values(), ids=KILLED)
def test_killed_and_resumed_is_bit_identical(workdir, script, flags):
    """SIGKILL at three random moments; then the same weights, optimizers, statistics, metrics and evaluation."""
    flags = RESUMED | flags
    words = []
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}"] + [str(value)] * (value is not True)
    seed = random.SystemRandom().randrange(10**6)
    print("delays drawn with seed", seed)
    delays, killed = random.Random(seed), 0
    for attempt in range(3):
        continued = ["--resume", "killed"] if attempt else ["--run-dir", "killed", *words]
        before = checkpoint("killed")["env_steps"] if attempt else -1
        process = start(script.__file__, *continued, cwd=workdir)
        # Not before it has got further than the checkpoint it began with, nor after its end
        wait_for(
            lambda: (
                process.poll() is not None
                or (os.path.exists("killed/checkpoint.pt") and checkpoint("killed")["env_steps"] > before)
            )
        )
        reached = checkpoint("killed")
        between = flags["checkpoint_every"] * reached["logger"]["seconds"] / max(reached["env_steps"], 1)  # two of them
        time.sleep(delays.uniform(0, 1.5) * between if reached["env_steps"] > 0 else delays.uniform(0, 0.1))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        until_next_second("killed")
    # The last one as a user starts it, each script once: with another order of Python's sets, for example
    real = "normalize_obs" not in flags
    status, out, err = finish(start(script.__file__, "--resume", "killed", cwd=workdir, real=real))
    assert status == 0 and killed >= 2, err
    script.train(script.Args(run_dir="undisturbed", **flags))
    a, b = checkpoint("killed"), checkpoint("undisturbed")
    assert same(a["parts"], b["parts"]) and same(a["random"], b["random"])
    assert all(a[name] == b[name] for name in ("env_steps", "updates", "next_log"))
    assert metrics("killed") == metrics("undisturbed") and results("killed") == results("undisturbed")
    ours, theirs = events("killed"), events("undisturbed")
    assert ours.keys() == theirs.keys() and all(ours[tag] == theirs[tag] for tag in theirs if tag != "charts/SPS")
    for tag, rows in ours.items():
        steps = [step for step, _ in rows]
        assert steps == sorted(set(steps)), f"{tag} twice at one step"
    with open("killed/metrics.csv") as file:
        seconds = [float(line.split(",")[1]) for line in list(file)[1:]]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("env_id, normalize_obs", [("toy_envs:Drawing-v0", False), ("Pendulum-v1", True)])
def test_every_generator_and_statistic_goes_on_where_it_was(workdir, env_id, normalize_obs):
    """toy_envs:Drawing takes its observations from Python's and NumPy's generators; actions are torch's."""
    flags = {"env_id": env_id, "num_envs": 2, "num_steps": 4, "checkpoint_every": 64, "lr_decay": False}
    flags["normalize_obs"] = normalize_obs
    train(Args(run_dir="whole", total_timesteps=200, **flags))
    train(Args(run_dir="parts", total_timesteps=128, **flags))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    end = resume("parts", total_timesteps=200)
    a, b = checkpoint("whole"), checkpoint("parts")
    assert same(a["parts"], b["parts"]) and same(a["random"], b["random"])
    assert end["updates"] == b["updates"] == a["updates"] == results("whole")["updates"]
    assert metrics("whole") == metrics("parts")


def test_the_next_log_comes_when_it_would_have(workdir):
    """And not at once: losses are logged every 500 steps."""
    flags = {"env_id": "toy_envs:Constant-v0", "num_envs": 2, "num_steps": 4, "checkpoint_every": 64}
    train(Args(run_dir="run", total_timesteps=128, lr_decay=False, **flags))
    first = [step for step, tag, _ in metrics("run") if tag == "losses/actor_loss"]
    assert len(first) == 1 and checkpoint("run")["next_log"] == first[0] + 500
    resume(total_timesteps=600)
    steps = [step for step, tag, _ in metrics("run") if tag == "losses/actor_loss"]
    assert len(steps) == 2 and steps[0] == first[0] and 500 <= steps[1] - steps[0] <= 508


def test_seconds_go_on(workdir):
    """Those of the earlier stretch count, in results.json, in metrics.csv and in the steps per second."""
    train(Args(run_dir="run", env_id="toy_envs:Constant-v0", **SHORT))
    saved = checkpoint("run")
    assert 0 < saved["logger"]["seconds"] < 100
    saved["logger"]["seconds"] += 1000
    torch.save(saved, "run/checkpoint.pt")
    end = resume(total_timesteps=1_200)
    assert 1000 < end["seconds"] < 1100 and end["sps"] == end["env_steps"] / end["seconds"]
    assert 1000 < checkpoint("run")["logger"]["seconds"] <= end["seconds"] + 1
    rows = [line.split(",") for line in Path("run/metrics.csv").read_text().splitlines()[1:]]
    assert all((float(seconds) > 1000) == (int(steps) > saved["env_steps"]) for steps, seconds, *_ in rows)


def test_every_checkpoint_resets_the_environments_each_time_with_another_seed(workdir, monkeypatch):
    """Which the step gives, so that a resumed run sees what it would have seen."""
    seeds = []

    def spy(*args, **options):
        envs = make_envs(*args, **options)
        reset = envs.reset
        envs.reset = lambda seed: seeds.append(seed) or reset(seed=seed)
        return envs

    monkeypatch.setattr(a2c_sync, "make_envs", spy)
    flags = {"env_id": "Pendulum-v1", "num_steps": 4, "num_envs": 2, "checkpoint_every": 16, "eval_episodes": 1}
    train(Args(run_dir="run", total_timesteps=48, **flags))
    assert seeds == [env_seed(1, steps) for steps in (0, 16, 32)] and len(set(seeds)) == 3
    resume(total_timesteps=80)
    assert seeds[3:] == [env_seed(1, steps) for steps in (48, 64)]
    train(Args(run_dir="other", total_timesteps=16, seed=2, **flags))
    assert seeds[5:] == [env_seed(2, 0)] != [env_seed(1, 0)]


# --- The log ----------------------------------------------------------------------------------------------------------


def test_the_log_is_cut_back_to_its_checkpoint(workdir):
    logger = Logger(Path("."), 100)
    logger.log(10, {"actor_loss": 1.0})
    state = logger.state_dict()
    logger.log(20, {"actor_loss": 2.0})
    logger.episodes(20, [(0, 5.0, 5)])
    logger.histogram(20, "lag/histogram", {1: 2})
    logger.close()
    until_next_second()
    again = Logger(Path("."), 100, 10, state)
    again.log(20, {"actor_loss": 3.0})
    again.close()
    assert [row[2] for row in metrics(".")] == ["1.0", "3.0"]
    assert events(".")["losses/actor_loss"] == [(10, 1.0), (20, 3.0)]
    assert Path("metrics.csv").read_text().count("env_steps,seconds,tag,value") == 1


def test_what_was_logged_at_the_checkpoints_own_step_stays(workdir):
    logger = Logger(Path("."), 100)
    logger.log(10, {"actor_loss": 1.0})
    state = logger.state_dict()
    logger.log(11, {"actor_loss": 2.0})
    logger.close()
    until_next_second()
    Logger(Path("."), 100, 10, state).close()
    assert events(".")["losses/actor_loss"] == [(10, 1.0)] and len(metrics(".")) == 1


def test_episodes_since_the_last_log_are_not_lost(workdir):
    """TensorBoard's means and the return of the last 100 episodes know of those before the checkpoint."""
    logger = Logger(Path("."), 100)
    logger.episodes(10, [(0, 1.0, 4), (1, 2.0, 5)])
    state = logger.state_dict()
    logger.episodes(15, [(0, 100.0, 100)])  # after the checkpoint: this never was
    logger.close()
    until_next_second()
    again = Logger(Path("."), 100, 10, state)
    again.episodes(20, [(1, 6.0, 9)])
    again.log(20, {})
    assert again.recent_return() == 3.0
    again.log(30, {})
    again.close()
    logged = events(".")
    assert logged["charts/episodic_return"] == [(20, 3.0)] and logged["charts/episodic_length"] == [(20, 6.0)]
    returns = [(steps, float(value)) for steps, tag, value in metrics(".") if tag == "charts/episodic_return"]
    assert returns == [(10, 1.0), (10, 2.0), (20, 6.0)]


def test_a_checkpoint_comes_after_the_events_before_it(workdir, monkeypatch):
    """They are in the file, however slow the disk, so that a kill right after it loses none of them."""
    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda writer, data: time.sleep(0.01) or write(writer, data))
    logger = Logger(Path("."), 100)
    for step in range(5):
        logger.log(step, {"actor_loss": 1.0})
    logger.state_dict()
    shutil.copytree(".", "killed", ignore=shutil.ignore_patterns("killed"))
    logger.close()
    assert len(events("killed")["losses/actor_loss"]) == len(metrics("killed")) == 5


def test_results_are_gone_while_a_longer_run_trains(workdir, monkeypatch):
    train(Args(run_dir="run", **SHORT))
    assert Path("run/results.json").exists()
    seen, update = [], a2c_sync.update
    monkeypatch.setattr(a2c_sync, "update", lambda *args: seen.append(os.listdir("run")) or update(*args))
    resume(total_timesteps=200)
    assert seen and "results.json" not in seen[0] and results("run")["env_steps"] >= 200


# --- Flags of a resumed run -------------------------------------------------------------------------------------------


def test_resume_takes_every_flag_and_trains_on(workdir):
    train(Args(run_dir="run", num_steps=3, gamma=0.9, seed=7, **SHORT))
    end = train(dataclasses.replace(load_args("run"), total_timesteps=300))
    assert end["env_steps"] >= 300 and end["seed"] == 7
    saved = json.loads(Path("run/args.json").read_text())
    assert (saved["gamma"], saved["num_envs"], saved["total_timesteps"]) == (0.9, 2, 300)
    assert load_args("run") == dataclasses.replace(
        Args(num_steps=3, gamma=0.9, seed=7, **SHORT | {"total_timesteps": 300}), resume="run"
    )


def test_args_that_differ_from_the_run_are_refused_and_equal_ones_are_not(workdir):
    flags = SHORT | {"gamma": 0.9}
    train(Args(run_dir="run", **flags))
    before = content("run")
    with pytest.raises(UserError, match=r"differs from that run in total_timesteps, gamma; write .*load_args"):
        train(Args(resume="run", **flags | {"total_timesteps": 300, "gamma": 0.99}))
    with pytest.raises(UserError, match="differs .* gamma"):  # one that was left away: nobody can know what was meant
        train(Args(resume="run", **SHORT))
    with pytest.raises(UserError, match="leave --run-dir away"):
        train(Args(resume="run", run_dir="run", **flags))
    assert content("run") == before
    assert train(Args(resume="run", **flags))["env_steps"] == checkpoint("run")["env_steps"]


def test_a_command_lines_flags_override_and_no_other_changes(workdir, monkeypatch):
    """Even one that is the script's default."""
    train(Args(run_dir="run", gamma=0.9, max_grad_norm=0.5, critic_lr=0.01, lr_decay=False, **SHORT))
    before = json.loads(Path("run/args.json").read_text())
    command_line(monkeypatch, "--resume", "run", "--gamma", "0.99", "--total-timesteps", "150")
    after = json.loads(Path("run/args.json").read_text())
    assert after == before | {"gamma": 0.99, "total_timesteps": 150, "run_dir": None}  # the folder may have moved
    command_line(monkeypatch, "--num-envs", "3", "--resume=run", "--critic-lr", "None", "--lr-decay")
    changed = {"num_envs": 3, "critic_lr": None, "lr_decay": True}
    assert json.loads(Path("run/args.json").read_text()) == after | changed


def test_a_command_lines_flags_reach_the_run(workdir, monkeypatch):
    train(Args(run_dir="run", gamma=0.9, **SHORT))
    seen = []
    monkeypatch.setattr(a2c_sync.Run, "open", lambda run, **parts: seen.append(run.args) or sys.exit(0))
    with pytest.raises(SystemExit):
        command_line(monkeypatch, "--resume", "run", "--gamma", "0.99")
    assert seen[0].gamma == 0.99 and seen[0].num_envs == 2


def test_settings_of_the_optimizer_are_the_flags(workdir):
    """Statistics are the checkpoint's."""
    train(Args(run_dir="run", lr_decay=False, **SHORT))
    before = checkpoint("run")["parts"]["optimizer"]
    resume(actor_lr=0.5, critic_lr=0.25)  # not a step more
    after = checkpoint("run")["parts"]["optimizer"]
    assert [(group["lr"], group["initial_lr"]) for group in after["param_groups"]] == [(0.5, 0.5), (0.25, 0.25)]
    assert same(before["state"], after["state"])


@pytest.mark.parametrize("total, fits", [(300, False), (400, False), (401, True), (1_000, True)])
def test_fewer_steps_than_the_run_has_are_refused(workdir, monkeypatch, total, fits):
    """401 were asked for; rollouts are whole, so it has 408."""
    train(Args(run_dir="run", env_id="toy_envs:Constant-v0", **SHORT | {"total_timesteps": 401, "num_envs": 1}))
    steps = checkpoint("run")["env_steps"]
    assert steps > 401
    before = content("run")
    if fits:
        assert resume(total_timesteps=total)["env_steps"] == max(steps, results("run")["env_steps"])
        return
    for attempt in (
        lambda: resume(total_timesteps=total),
        lambda: command_line(monkeypatch, "--resume", "run", "--total-timesteps", str(total)),
    ):
        with pytest.raises((UserError, SystemExit)) as error:
            attempt()
        message = str(error.value).removeprefix("error: ")
        assert (
            message == f"'run' has {steps} environment steps already; give more --total-timesteps."
            and content("run") == before
        )


def test_an_interrupted_run_may_end_earlier_than_planned(workdir):
    train(Args(run_dir="run", env_id="toy_envs:Constant-v0", **SHORT))
    flags = json.loads(Path("run/args.json").read_text())
    Path("run/args.json").write_text(json.dumps(flags | {"total_timesteps": 10**6}))
    steps = checkpoint("run")["env_steps"]
    with pytest.raises(UserError, match=f"has {steps} environment steps already"):
        resume(total_timesteps=steps - 1)
    assert resume(total_timesteps=steps)["env_steps"] == steps


# --- Refused folders --------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_place_of_the_last(workdir, monkeypatch):
    calls, replace = [], Path.replace
    monkeypatch.setattr(checkpoint_module.os, "fsync", lambda file: calls.append(os.fstat(file).st_size))
    monkeypatch.setattr(Path, "replace", lambda path, to: calls.append(path.stat().st_size) or replace(path, to))
    save_checkpoint(Path("."), {"script": "x", "weight": torch.zeros(1000)})
    assert calls == [Path("checkpoint.pt").stat().st_size] * 2 and calls[0] > 4000


def test_a_checkpoint_that_would_execute_code_is_refused(workdir):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch executed",)

    torch.save({"format": checkpoint_module.FORMAT, "script": "a2c_sync", "evil": Evil()}, "checkpoint.pt")
    with pytest.raises(UserError, match="damaged or was not written"):
        load_checkpoint(".", "a2c_sync")
    assert not Path("executed").exists()


DAMAGES = {
    "args": lambda run: (run / "args.json").write_text("{"),
    "foreign args": lambda run: (run / "args.json").write_text("[1]"),
    "args of no script": lambda run: (run / "args.json").write_text('{"script": "conftest"}'),
    "no checkpoint": lambda run: (run / "checkpoint.pt").unlink(),
    "cut checkpoint": lambda run: os.truncate(run / "checkpoint.pt", 1000),
    "empty checkpoint": lambda run: (run / "checkpoint.pt").write_bytes(b""),
    "foreign pickle": lambda run: (run / "checkpoint.pt").write_bytes(pickle.dumps({"a": 1})),
    "foreign weights": lambda run: torch.save({"weight": torch.zeros(3)}, run / "checkpoint.pt"),
    "earlier format": lambda run: save_as(run, format="actor-critic checkpoint 1"),
    "later format": lambda run: save_as(run, format="actor-critic checkpoint 3"),
    "other script": lambda run: save_as(run, script="sac"),
}


def save_as(run, **changes):
    torch.save(checkpoint(run) | changes, run / "checkpoint.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, to be copied."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(Args(run_dir=str(folder), **SHORT))
    return folder


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_and_foreign_run_folders_are_refused(workdir, monkeypatch, trained, damage):
    """In one sentence, by training and by the evaluation; and nothing is changed."""
    shutil.copytree(trained, "run")
    damage(Path("run"))
    before = content("run")
    for attempt in (
        lambda: resume(total_timesteps=200),
        lambda: train(Args(resume="run", **SHORT)),
        lambda: load_agent("run"),
        lambda: command_line(monkeypatch, "--resume", "run"),
    ):
        with pytest.raises((UserError, SystemExit)) as error:
            attempt()
        assert "'run" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert content("run") == before


def test_a_run_of_an_earlier_version_says_so(workdir, trained):
    shutil.copytree(trained, "run")
    save_as(Path("run"), format="actor-critic checkpoint 1")
    for attempt in (resume, load_agent):
        with pytest.raises(UserError, match=r"^'run/checkpoint.pt' was written by an earlier version of this project"):
            attempt("run")


UNFIT = {"optimizer": ("rmsprop", "adam"), "normalize_obs": (False, True), "network": ("separate", "shared")}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
def test_flags_that_do_not_fit_the_checkpoint_are_refused_and_change_nothing(workdir, name, back):
    first, second = reversed(UNFIT[name]) if back else UNFIT[name]
    train(Args(run_dir="run", env_id="Pendulum-v1", **SHORT | {name: first}))
    before = content("run")
    with pytest.raises(UserError, match="'run' does not fit these flags") as error:
        resume(total_timesteps=300, **{name: second})
    assert "\n" not in str(error.value) and content("run") == before
    assert resume(total_timesteps=300)["env_steps"] >= 300  # and nothing stays locked


def test_another_scripts_run_is_refused(workdir, monkeypatch):
    train(Args(run_dir="run", **SHORT))
    with pytest.raises(SystemExit, match="was made by a2c_sync.py; resume it with that script"):
        command_line(monkeypatch, "--resume", "run", script=off_policy_ac)


def test_the_folder_of_another_machine_can_be_resumed(workdir, monkeypatch):
    """Moved, and from another working directory."""
    train(Args(run_dir="run", **SHORT))
    Path("run").rename("moved")
    monkeypatch.chdir(ROOT)
    assert train(dataclasses.replace(load_args(workdir / "moved"), total_timesteps=200))["env_steps"] >= 200
    assert not (ROOT / "run").exists() and not (workdir / "run").exists()


def test_a_run_killed_in_its_evaluation_is_evaluated_with_the_same_statistics(workdir):
    """The reset before the first step counts in the running mean of --normalize-obs, but no step comes."""
    flags = dict(run_dir="run", num_envs=3, num_steps=4, total_timesteps=200, normalize_obs=True, eval_episodes=3)
    a2c_sync.train(a2c_sync.Args(**flags))
    before, wanted = checkpoint("run"), results("run")
    Path("run/results.json").unlink()
    a2c_sync.train(load_args("run"))
    after, before = checkpoint("run")["parts"], before["parts"]
    assert same(after["envs"], before["envs"]) and results("run") == wanted
