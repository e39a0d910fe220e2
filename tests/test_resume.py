"""A run that is killed and resumed is the run that never was; and nobody loses what a run folder holds."""

import contextlib
import dataclasses
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_envs
from conftest import ROOT, finish, start
from helpers import checkpoint, command_line, content, events, metrics, results, resume, same, short_run, wait_for
from tensorboard.summary.writer.record_writer import RecordWriter

import a2c_sync
import off_policy_ac
import sac
from common import checkpoint as checkpoint_module
from common.checkpoint import env_seed, load_checkpoint, save_checkpoint
from common.flags import UserError
from common.logger import Logger
from evaluate import load_agent, load_args


def until_next_second(run_dir="."):
    """TensorBoard reads event files in the order of their names: by the second of their start, then by process id."""
    last = max(int(path.name.split(".")[3]) for path in Path(run_dir).glob("events.*"))
    wait_for(lambda: time.time() >= last + 1)


def assert_same_run(a, b):
    """Weights, optimizer, buffer, statistics, generators, counters, and logs but for the clock."""
    ours, theirs = checkpoint(a), checkpoint(b)
    assert same(ours["parts"], theirs["parts"]) and same(ours["random"], theirs["random"])
    assert all(ours[name] == theirs[name] for name in ("env_steps", "updates", "next_log"))
    assert metrics(a) == metrics(b) and results(a) == results(b)
    ours, theirs = events(a), events(b)
    assert ours.keys() == theirs.keys() and all(ours[tag] == theirs[tag] for tag in theirs if tag != "charts/SPS")
    for tag, rows in ours.items():
        steps = [step for step, _ in rows]
        assert steps == sorted(set(steps)), f"{tag} twice at one step"
    seconds = [float(line.split(",")[1]) for line in (Path(a) / "metrics.csv").read_text().splitlines()[1:]]
    assert seconds == sorted(seconds)


# --- Bit-identical ----------------------------------------------------------------------------------------------------

FLAGS = {"num_envs": 4, "total_timesteps": 6_000, "checkpoint_every": 300, "eval_episodes": 3}
SLOWER = {"num_envs": 2, "total_timesteps": 400, "checkpoint_every": 40, "learning_starts": 50, "batch_size": 16}
KILLED = {
    "a2c": (a2c_sync, FLAGS),
    "continuous": (a2c_sync, FLAGS | {"env_id": "Pendulum-v1", "network": "shared", "normalize_obs": True}),
    "off_policy": (off_policy_ac, FLAGS | SLOWER | {"env_id": "Pendulum-v1", "buffer_size": 250}),  # it wraps around
    "sac": (sac, FLAGS | SLOWER),
}


@pytest.mark.parametrize("script, flags", KILLED.values(), ids=KILLED)
def test_killed_and_resumed_is_bit_identical(workdir, request, script, flags):
    """SIGKILL at three random moments; then the same weights, optimizers, statistics, metrics and evaluation."""
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
        saved = Path("killed/checkpoint.pt")
        wait_for(lambda: process.poll() is not None or saved.exists() and checkpoint("killed")["env_steps"] > before)
        reached = checkpoint("killed")
        between = flags["checkpoint_every"] * reached["logger"]["seconds"] / max(reached["env_steps"], 1)  # two of them
        time.sleep(delays.uniform(0, 1.5) * between if reached["env_steps"] > 0 else delays.uniform(0, 0.1))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        until_next_second("killed")
    # Once as a user starts it: with another order of Python's sets, for example
    status, out, err = finish(
        start(script.__file__, "--resume", "killed", cwd=workdir, real="[a2c]" in request.node.name)
    )
    assert status == 0 and killed >= 2, err
    script.train(script.Args(run_dir="undisturbed", **flags))
    assert_same_run("killed", "undisturbed")


RESUMED = {
    "generators": (a2c_sync, {"env_id": "toy_envs:Dice-v0"}),  # shows numbers of Python's, NumPy's and torch's
    "statistics": (a2c_sync, {"env_id": "Pendulum-v1", "normalize_obs": True}),
    "sac": (sac, {"num_envs": 1, "updates_per_step": 0.2}),
}


@pytest.mark.parametrize("script, flags", RESUMED.values(), ids=RESUMED)
def test_train_with_load_args_goes_on_as_the_command_line_does(workdir, monkeypatch, script, flags):
    """And both as the run that was never interrupted, whatever state the caller's generators have."""
    flags = {"checkpoint_every": 300} | flags | ({"lr_decay": False} if script is a2c_sync else {})
    short_run(script, run_dir="whole", total_timesteps=1_200, **flags)
    short_run(script, run_dir="python", total_timesteps=600, **flags)
    saved = checkpoint("python")
    assert saved["env_steps"] in range(600, 610) and (saved["logger"]["episodes"] or "Dice" not in str(flags))
    shutil.copytree("python", "shell")
    until_next_second("python")
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert resume("python", total_timesteps=1_200) == json.loads(Path("python/results.json").read_text())
    command_line(monkeypatch, "--resume", "shell", "--total-timesteps", "1200", script=script)
    assert_same_run("python", "whole")
    assert_same_run("shell", "whole")


def test_seconds_go_on(workdir):
    """Those of the earlier stretch count, in results.json, in metrics.csv and in the steps per second."""
    short_run(env_id="toy_envs:Constant-v0")
    saved = checkpoint("run")
    assert 0 < saved["logger"]["seconds"] < 1_000
    saved["logger"]["seconds"] += 10_000
    torch.save(saved, "run/checkpoint.pt")
    end = resume(total_timesteps=1_200)
    assert 10_000 < end["seconds"] < 11_000 and end["sps"] == end["env_steps"] / end["seconds"]
    assert 10_000 < checkpoint("run")["logger"]["seconds"] < 11_000
    rows = [line.split(",") for line in Path("run/metrics.csv").read_text().splitlines()[1:]]
    assert all((float(seconds) > 10_000) == (int(steps) > saved["env_steps"]) for steps, seconds, *_ in rows)
    speeds = [(int(steps), float(value)) for steps, _, tag, value in rows if tag == "charts/SPS"]
    assert len(speeds) >= 2 and all((speed < 1) == (steps > saved["env_steps"]) for steps, speed in speeds)


def test_every_checkpoint_resets_the_environments_each_time_with_another_seed(workdir, monkeypatch):
    """Which the step gives, so that a resumed run sees what it would have seen. toy_envs:Single remembers them."""

    def seeds(script, *args, **flags):
        monkeypatch.setattr(toy_envs.Single, "seeds", [])
        script(*args, **flags)
        return toy_envs.Single.seeds[:-1]  # the last one is the evaluation's

    flags = {"env_id": "toy_envs:Single-v0", "num_envs": 1, "num_steps": 1, "checkpoint_every": 16}
    assert seeds(short_run, total_timesteps=48, **flags) == [env_seed(1, steps, 0) for steps in (0, 16, 32)]
    assert seeds(resume, total_timesteps=80) == [env_seed(1, steps, 0) for steps in (48, 64)]
    assert len({env_seed(seed, steps, 0) for seed in (1, 2, 3) for steps in range(1_000)}) == 3_000


def test_a_run_killed_in_its_evaluation_is_evaluated_with_the_same_statistics(workdir):
    """The reset before the first step counts in the running mean of --normalize-obs, but no step comes."""
    short_run(num_envs=3, num_steps=4, total_timesteps=200, normalize_obs=True, eval_episodes=3)
    before, wanted = content("run")[Path("run/checkpoint.pt")], results("run")
    Path("run/results.json").unlink()
    resume()
    assert content("run")[Path("run/checkpoint.pt")] == before and results("run") == wanted


# --- The log ----------------------------------------------------------------------------------------------------------


def test_the_log_is_cut_back_to_its_checkpoint(workdir, monkeypatch):
    """What was logged before it is in the files, however slow the disk; what came later is gone, from TensorBoard, too.
    What was logged at the checkpoint's own step stays."""
    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda writer, data: time.sleep(0.05) or write(writer, data))
    logger = Logger(Path("."), 100)
    logger.log(10, {"actor_loss": 1.0})
    state = logger.state_dict()
    shutil.copytree(".", "killed", ignore=shutil.ignore_patterns("killed"))
    assert events("killed")["losses/actor_loss"] == [(10, 1.0)] and len(metrics("killed")) == 1
    for step in (11, 20):
        logger.log(step, {"actor_loss": 2.0})
        logger.episodes(step, [(0, 5.0, 5)])
    logger.close()
    until_next_second()
    again = Logger(Path("."), 100, 10, state)
    again.log(20, {"actor_loss": 3.0})
    again.close()
    assert [row[2] for row in metrics(".")] == ["1.0", "3.0"]
    assert events(".")["losses/actor_loss"] == [(10, 1.0), (20, 3.0)]
    assert Path("metrics.csv").read_text().count("env_steps,seconds,tag,value") == 1


@pytest.mark.parametrize("size", [0, 500])
def test_a_log_that_is_shorter_than_its_checkpoint_says_goes_on_at_its_end(workdir, size):
    """After a loss of power, say: no gap of zeros is written, and an empty one gets its header again."""
    short_run(total_timesteps=600)
    os.truncate("run/metrics.csv", size)
    resume(total_timesteps=1_500)
    data = Path("run/metrics.csv").read_bytes()
    assert data.startswith(b"env_steps,seconds,tag,value\n") and b"\0" not in data and b"charts/SPS" in data[size:]


def test_results_are_gone_while_a_longer_run_trains(workdir, monkeypatch):
    short_run()
    assert Path("run/results.json").exists()
    seen, update = [], a2c_sync.update
    monkeypatch.setattr(a2c_sync, "update", lambda *args: seen.append(os.listdir("run")) or update(*args))
    resume(total_timesteps=200)
    assert seen and "results.json" not in seen[0] and results("run")["env_steps"] >= 200


# --- Flags of a resumed run -------------------------------------------------------------------------------------------


def test_resume_takes_every_flag_except_those_given(workdir, monkeypatch):
    """From Python and on the command line, where one given counts even if it is the script's default."""
    given = {"num_steps": 5, "gamma": 0.9, "seed": 7, "max_grad_norm": 0.5, "critic_lr": 0.01, "lr_decay": False}
    short_run(**given)
    flags = {"total_timesteps": 120, "num_envs": 2, "eval_episodes": 1}
    assert load_args("run") == a2c_sync.Args(resume="run", **flags | given)

    def saved():
        return json.loads(Path("run/args.json").read_text())

    before = saved()
    assert before["run_dir"] == "run" and before["script"] == "a2c_sync"
    assert resume(total_timesteps=150)["seed"] == 7
    assert saved() == before | {"total_timesteps": 150, "run_dir": None}  # the folder may have moved
    before, seen = saved(), []
    update = a2c_sync.update
    monkeypatch.setattr(a2c_sync, "update", lambda *args: seen.append(args[3].gamma) or update(*args))
    command_line(monkeypatch, "--resume", "run", "--gamma", "0.99", "--total-timesteps", "200")
    assert saved() == before | {"gamma": 0.99, "total_timesteps": 200} and set(seen) == {0.99}
    command_line(monkeypatch, "--num-envs", "3", "--resume=run", "--critic-lr", "None", "--lr-decay")
    assert saved() == before | {
        "gamma": 0.99,
        "total_timesteps": 200,
        "num_envs": 3,
        "critic_lr": None,
        "lr_decay": True,
    }
    with pytest.raises(UserError, match="leave --run-dir away"):
        a2c_sync.train(dataclasses.replace(load_args("run"), run_dir="run"))


def test_settings_of_the_optimizer_are_the_flags(workdir):
    short_run(lr_decay=False)
    resume(total_timesteps=150, actor_lr=0.5, critic_lr=0.25)
    groups = checkpoint("run")["parts"]["optimizer"]["param_groups"]
    assert [(group["lr"], group["initial_lr"]) for group in groups] == [(0.5, 0.5), (0.25, 0.25)]


def test_fewer_steps_than_the_run_has_are_refused(workdir):
    """400 were asked for; rollouts are whole, so it has more. One that was interrupted may end earlier than planned."""
    short_run(env_id="toy_envs:Constant-v0", total_timesteps=400, num_envs=1)
    steps, before = checkpoint("run")["env_steps"], content("run")
    with pytest.raises(UserError, match=f"^'run' has {steps} environment steps already; give more --total-timesteps.$"):
        resume(total_timesteps=399)
    assert content("run") == before
    assert resume(total_timesteps=400)["env_steps"] == steps > 400
    planned = json.loads(Path("run/args.json").read_text()) | {"total_timesteps": 10**6}
    Path("run/args.json").write_text(json.dumps(planned))
    with pytest.raises(UserError, match=f"has {steps} environment steps already"):
        resume(total_timesteps=steps - 1)
    assert resume(total_timesteps=steps)["env_steps"] == steps


# --- A full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(workdir):
    """A file system of 2 MB and 20 files."""
    path = workdir / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=20", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk, left):
    """Up to `left` bytes; None: to the last file."""
    if left is None:
        with contextlib.suppress(OSError):
            for i in range(100):
                (disk / f"filler {i}").touch()
    else:
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - left))


NO_SPACE, HALF = "No space left on device", "The checkpoint cannot be written, the disk may be full"
FULL = {  # what hits the full disk -> bytes left, of a checkpoint's size; the sentence
    "torch": (lambda size: 4096, HALF),  # a RuntimeError, with room for what the file has buffered
    "write": (lambda size: size - 10_000, f"({NO_SPACE}|{HALF})"),
    "open": (lambda size: None, NO_SPACE),
    "metrics.csv": (lambda size: 0, NO_SPACE),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_one_sentence_and_resume_goes_on_when_there_is_room(workdir, monkeypatch, disk, name):
    """The last checkpoint stays, whole, and nothing of the next one; later it is the run that had room all the time."""
    left, sentence = FULL[name]
    module, function, flags = checkpoint_module, "save_checkpoint", {"checkpoint_every": 300}
    if name == "metrics.csv":  # which overflows its buffer when many episodes have ended, long before a checkpoint
        module, function, flags = a2c_sync, "update", {"checkpoint_every": 10**6, "env_id": "toy_envs:OneStep-v0"}
    short_run(total_timesteps=900, **flags)
    original, calls = getattr(module, function), []

    def then_full(*args):
        calls.append(args)
        if len(calls) == 3:  # with a checkpoint of 300 steps on it, or that of the beginning
            fill(disk, left(os.path.getsize("disk/run/checkpoint.pt")))
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(module, function, then_full)
        short_run(run_dir="disk/run", total_timesteps=900, **flags)
    ending = r"\nGo on from environment step (0|3\d\d) with\n  python .*a2c_sync.py --resume disk/run"
    assert re.fullmatch(rf"\[Errno 28\] {sentence}(: '.*')?{ending}", str(error.value))
    assert error.value.__suppress_context__ and not list(disk.glob("run/*.tmp"))
    assert name != "torch" or type(error.value.__context__.__cause__) is RuntimeError
    assert load_checkpoint("disk/run", "a2c_sync")["env_steps"] in ([0] if name == "metrics.csv" else range(300, 310))
    for filler in disk.glob("filler*"):
        filler.unlink()
    until_next_second("disk/run")
    resume("disk/run")
    assert_same_run("disk/run", "run")


@pytest.mark.parametrize("left", [0, 4096])
def test_a_disk_that_is_full_from_the_start_is_one_sentence(disk, left):
    fill(disk, left)
    with pytest.raises(UserError, match=r"^The run folder 'disk/run' cannot be used: No space left on device\.$"):
        short_run(run_dir="disk/run")


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


def flip_a_bit(run):
    """Of a weight, which then is another finite number."""
    data = bytearray((run / "checkpoint.pt").read_bytes())
    place = bytes(data).find(checkpoint(run)["parts"]["agent"]["actor.body.2.weight"].numpy().tobytes())
    assert place > 0
    data[place + 100] ^= 0x40
    (run / "checkpoint.pt").write_bytes(data)


def change(**changes):
    return lambda run: torch.save(checkpoint(run) | changes, run / "checkpoint.pt")


DAMAGES = {
    "args": lambda run: (run / "args.json").write_text("{"),
    "foreign args": lambda run: (run / "args.json").write_text("[1]"),
    "args of no script": lambda run: (run / "args.json").write_text('{"script": "conftest"}'),
    "no checkpoint": lambda run: (run / "checkpoint.pt").unlink(),
    "cut checkpoint": lambda run: os.truncate(run / "checkpoint.pt", 1000),
    "empty checkpoint": lambda run: (run / "checkpoint.pt").write_bytes(b""),
    "a flipped bit": flip_a_bit,
    "foreign pickle": lambda run: (run / "checkpoint.pt").write_bytes(pickle.dumps({"a": 1})),
    "foreign weights": lambda run: torch.save({"weight": torch.zeros(3)}, run / "checkpoint.pt"),
    "format 2": change(format="actor-critic checkpoint 2"),
    "other script": change(script="sac"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, to be copied."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    short_run(run_dir=str(folder))
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_and_foreign_run_folders_are_refused(workdir, monkeypatch, trained, name):
    """In one sentence, by training and by the evaluation; and nothing is changed."""
    shutil.copytree(trained, "run")
    DAMAGES[name](Path("run"))
    before = content("run")
    for attempt in (
        lambda: resume(total_timesteps=200),
        lambda: a2c_sync.train(a2c_sync.Args(resume="run")),
        lambda: command_line(monkeypatch, "--resume", "run"),
        lambda: load_agent("run"),
    ):
        with pytest.raises((UserError, SystemExit)) as error:
            attempt()
        assert "'run" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert content("run") == before


UNFIT = {  # flags of the run -> others, to which its checkpoint does not fit
    "optimizer": (a2c_sync, {"optimizer": "rmsprop"}, {"optimizer": "adam"}),
    "normalize_obs": (a2c_sync, {"normalize_obs": False}, {"normalize_obs": True}),
    "network": (a2c_sync, {"network": "separate"}, {"network": "shared"}),
    "environment": (a2c_sync, {"env_id": "CartPole-v1"}, {"env_id": "Pendulum-v1"}),
    "critic": (off_policy_ac, {"actor_actions": "buffer", "critic": "q"}, {"actor_actions": "buffer", "critic": "v"}),
    "critics": (sac, {"num_critics": 2}, {"num_critics": 3}),
    "buffer": (sac, {"buffer_size": 200}, {"buffer_size": 300}),
}


@pytest.mark.parametrize("script, one, other", UNFIT.values(), ids=UNFIT)
def test_flags_that_do_not_fit_the_checkpoint_are_refused_and_change_nothing(workdir, script, one, other):
    """There and back; and the folder does not stay locked."""
    for first, second in ((one, other), (other, one)):
        shutil.rmtree("run", ignore_errors=True)
        short_run(script, total_timesteps=70, **first)
        before = content("run")
        with pytest.raises(UserError, match="^The checkpoint in 'run' does not fit these flags: ") as error:
            resume(total_timesteps=100, **second)
        assert "\n" not in str(error.value) and content("run") == before
        assert resume(total_timesteps=100)["env_steps"] >= 100


def test_the_folder_of_another_machine_can_be_resumed(workdir, monkeypatch, trained):
    """Moved, and from another working directory. But not by another script."""
    shutil.copytree(trained, "moved")
    with pytest.raises(SystemExit, match="'moved' was made by a2c_sync.py; resume it with that script"):
        command_line(monkeypatch, "--resume", "moved", script=off_policy_ac)
    monkeypatch.chdir(ROOT)
    assert resume(workdir / "moved", total_timesteps=200)["env_steps"] >= 200
    assert not (ROOT / "run").exists() and not (workdir / "run").exists()


@pytest.mark.parametrize("command", ["evaluate.py", "a2c_sync.py"])
def test_a_foreign_run_folder_imports_nothing_from_itself(workdir, trained, command):
    """Its env_id may name a package, but only one that is installed or in the working directory is imported."""
    shutil.copytree(trained, "theirs")
    path = Path("theirs/args.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"env_id": "evil:Env-v0"}))
    Path("theirs/evil.py").write_text("open('executed', 'w')")
    words = ["theirs"] if command == "evaluate.py" else ["--resume", "theirs", "--total-timesteps", "200"]
    status, _, err = finish(start(ROOT / command, *words, cwd=workdir))
    assert status != 0 and "no package 'evil'" in err and not Path("executed").exists() and "Traceback" not in err


def test_a_disk_that_is_full_at_the_first_checkpoint_has_nothing_to_go_on_with(workdir, monkeypatch):
    def full(*_):
        raise RuntimeError("torch's own")

    monkeypatch.setattr(checkpoint_module.torch, "save", full)
    with pytest.raises(UserError, match=r"^\[Errno 28\] The checkpoint cannot be written, the disk may be full$"):
        short_run()
