"""No fault of an environment, a disk or a caller costs a result. One test for what each protects."""

import dataclasses
import errno
import gc
import json
import os
import random
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy_envs
from conftest import ROOT, finish, start
from helpers import checkpoint, children, metrics

import a2c_sync
import a3c_async
import evaluate as evaluate_command
import off_policy_ac
import sac
from common import checkpoint as checkpoint_module
from common.checkpoint import load_checkpoint, save_checkpoint
from common.envs import make_envs
from common.evaluate import evaluate
from common.flags import UserError
from common.logger import Logger
from common.run import run_cli
from common.workers import Workers
from evaluate import load_agent, load_args, write_video

SCRIPTS = {"a2c_sync": a2c_sync, "a3c_async": a3c_async, "off_policy_ac": off_policy_ac, "sac": sac}
SHORT = {
    a2c_sync: {"total_timesteps": 120, "num_envs": 2, "num_steps": 3},
    a3c_async: {"total_timesteps": 120, "num_workers": 1, "envs_per_worker": 2, "num_steps": 3},
    off_policy_ac: {"total_timesteps": 120, "learning_starts": 60, "batch_size": 16, "buffer_size": 200},
    sac: {"total_timesteps": 120, "learning_starts": 60, "batch_size": 16, "buffer_size": 200},
}
EVERY = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)


def run(script=a2c_sync, **flags):
    return script.train(script.Args(**({"run_dir": "run", "eval_episodes": 1} | SHORT[script] | flags)))


def box(script, name):
    """The variant of a toy environment with actions that the script takes."""
    return f"toy_envs:{name}{'Box' if script is sac else ''}-v0"


def rollouts(monkeypatch, script):
    """What every update of this process learns from."""
    found, original = [], script.update

    def record(agent, optimizer, batch, *rest):
        found.append(script.Rollout(*(x.clone() for x in batch)))
        return original(agent, optimizer, batch, *rest)

    monkeypatch.setattr(script, "update", record)
    return found


# --- 1 Memory of the environment's ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [off_policy_ac, sac], ids=["off_policy_ac", "sac"])
def test_an_environment_may_return_the_same_arrays_at_every_step(workdir, script):
    """Else obs and next_obs of every stored transition would be equal."""
    run(script, env_id=box(script, "Reusing"), num_envs=3, total_timesteps=200)
    stored = checkpoint("run")["parts"]["buffer"]["fields"]
    (episode, t), (next_episode, next_t) = stored["obs"].T, stored["next_obs"].T
    assert len(t) > 150 and torch.equal(episode, next_episode) and torch.equal(t + 1, next_t)
    assert torch.equal(stored["rewards"], next_t) and stored["terminated"].sum() > 30


@pytest.mark.parametrize("script", [a2c_sync, a3c_async], ids=["a2c_sync", "a3c_async"])
def test_rollouts_of_such_an_environment_are_consecutive(workdir, monkeypatch, script):
    batches = rollouts(monkeypatch, script)
    flags = {"update": "pooled", "batch_size": 6} if script is a3c_async else {}
    run(script, env_id="toy_envs:Reusing-v0", **flags)
    assert len(batches) > 10
    for obs, _, rewards, _, done in batches:
        valid = done[:-1] == 0
        assert (obs[1:, :, 1] == obs[:-1, :, 1] + 1)[valid].all() and (rewards == obs[1:, :, 1])[valid].all()
        assert (obs[1:, :, 1] == 0)[~valid].all()


# --- 2 Data that nobody reads -----------------------------------------------------------------------------------------


@EVERY
def test_infos_need_not_fit_together(workdir, script):
    """Differing in keys, shapes and types between environments and steps; in training, workers and evaluation."""
    monster = "toy_envs:Chatty-v0"
    if script is sac:
        gym.register("ChattyBox-v0", lambda: gym.wrappers.TransformAction(
            toy_envs.Chatty(), lambda a: 0, gym.spaces.Box(-1.0, 1.0, (1,), np.float32)))  # fmt: skip
        monster = "ChattyBox-v0"
    assert run(script, env_id=monster, eval_episodes=3)["eval_return_mean"] == 10


def test_infos_do_not_travel_between_processes(workdir):
    envs = make_envs(a2c_sync.Args(env_id="toy_envs:Chatty-v0", num_envs=2, vectorization="async"))
    envs.reset(seed=1)
    for _ in range(15):
        envs.step(np.zeros(2, int))
    envs.close()


# --- 3 Intent ---------------------------------------------------------------------------------------------------------


def test_arguments_changed_after_they_were_made_are_obeyed_or_refused(workdir):
    run(gamma=0.9)
    args = load_args("run")
    args.gamma, args.total_timesteps = 0.8, 200
    a2c_sync.train(args)
    saved = json.loads(Path("run/args.json").read_text())
    assert (saved["gamma"], saved["total_timesteps"]) == (0.8, 200)
    with pytest.raises(UserError, match="differs from that run in .*total_timesteps"):
        a2c_sync.train(a2c_sync.Args(resume="run", total_timesteps=300))


def test_numpys_numbers_and_paths_are_arguments_like_others(workdir):
    """What a sweep passes; args.json is plain JSON."""
    end = run(
        run_dir=Path("run"), seed=np.int64(3), gamma=np.float32(0.5), num_envs=np.int32(2), actor_lr=np.float64(1e-3),
        total_timesteps=np.int64(60),
    )  # fmt: skip
    saved = json.loads(Path("run/args.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert (saved["seed"], saved["gamma"], saved["num_envs"], saved["run_dir"]) == (3, 0.5, 2, "run")
    assert end == json.loads(Path("run/results.json").read_text())
    assert a2c_sync.train(dataclasses.replace(load_args(Path("run")), total_timesteps=120))["env_steps"] >= 120


@EVERY
def test_args_json_is_json(workdir, script):
    """No Infinity, which other languages' parsers refuse."""
    run(script, env_id=box(script, "Constant"), total_timesteps=70)
    json.loads(Path("run/args.json").read_text(), parse_constant=lambda word: pytest.fail(word))


# --- 4 The caller's process -------------------------------------------------------------------------------------------


@EVERY
def test_training_leaves_the_callers_process_as_it_was(workdir, script):
    """A random search around train() would otherwise draw the same numbers in every trial."""
    import signal

    torch.set_flush_denormal(False)
    torch.set_num_threads(2)

    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        denormal = (torch.tensor(1e-30) * 1e-10).item()
        return handlers, denormal, torch.get_num_threads(), get_precision()

    try:
        before = state()
        random.seed(5), np.random.seed(6), torch.manual_seed(7)
        wanted = random.random(), np.random.rand(), torch.rand(1).item()
        random.seed(5), np.random.seed(6), torch.manual_seed(7)
        run(script, env_id=box(script, "Constant"), num_threads=1, matmul_precision="medium")
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == wanted
        with pytest.raises(UserError):
            run(script, run_dir="other", env_id="toy_envs:DictObs-v0")
        assert state() == before and before[1] > 0
    finally:
        torch.set_num_threads(1)


# --- 5 Global generators of environments ------------------------------------------------------------------------------


def dice(seed):
    args = a2c_sync.Args(env_id="toy_envs:Dice-v0", num_envs=3, vectorization="async")
    envs = make_envs(args)
    rows = [envs.reset(seed=seed)[0]] + [envs.step(np.zeros(3, int))[0] for _ in range(3)]
    envs.close()
    return np.stack(rows)  # (4, 3, 3)


def test_environments_in_processes_draw_seeded_and_different_global_numbers():
    first, again, other = dice(1), dice(1), dice(2)
    assert (first == again).all() and (first != other).all()
    assert len(np.unique(first.reshape(-1, 3)[:, 0])) == 12 and (first[:, 0] != first[:, 1]).all()


def test_workers_draw_seeded_and_different_global_numbers(workdir, all_workers_begin, monkeypatch):
    found = []
    for name in ("a", "b"):
        with monkeypatch.context() as patch:
            batches = rollouts(patch, a3c_async)
            run(a3c_async, run_dir=name, env_id="toy_envs:Dice-v0", update="pooled", batch_size=1, num_workers=2)
        found.append([tuple(batch.obs[0, 0].tolist()) for batch in batches])
    for rows in found:
        assert all(len({row[i] for row in rows}) == len(rows) > 10 for i in range(3))  # no two workers' alike
    assert set(found[0]) & set(found[1])  # the same seed, the same numbers, as far as both runs got with a worker


# --- 6 A log that is shorter than its checkpoint says -----------------------------------------------------------------


def test_a_log_that_lost_its_end_is_cut_to_what_is_whole(workdir):
    run(total_timesteps=1_000)
    path = Path("run/metrics.csv")
    path.write_bytes(path.read_bytes()[:-37])  # in the middle of a line
    a2c_sync.train(dataclasses.replace(load_args("run"), total_timesteps=1_500))
    assert b"\0" not in path.read_bytes()
    assert all(re.fullmatch(r"\d+,\d+\.\d+,[\w/]+,\S+", line) for line in path.read_text().splitlines()[1:])
    assert metrics("run")[-1][0] >= 1_490


def test_a_log_that_is_gone_begins_again(workdir):
    run()
    Path("run/metrics.csv").unlink()
    a2c_sync.train(dataclasses.replace(load_args("run"), total_timesteps=200))
    assert Path("run/metrics.csv").read_text().startswith("env_steps,seconds,tag,value\n")


# --- 7 Evaluation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def single():
    toy_envs.Single.alive = toy_envs.Single.most = 0
    toy_envs.Single.allowed, toy_envs.Single.seeds = 10**9, []
    yield toy_envs.Single
    toy_envs.Single.allowed = 10**9


@pytest.mark.parametrize("num_envs", [1, 3])
def test_there_are_never_more_environments_than_num_envs(workdir, single, num_envs):
    """Those of training are closed before those of the evaluation open."""
    single.allowed = num_envs
    end = run(env_id="toy_envs:Single-v0", num_envs=num_envs, eval_episodes=7)
    assert end["eval_episodes"] == 7 and single.most == num_envs and single.alive == 0


def test_evaluation_starts_depend_neither_on_the_seed_nor_on_the_number_of_environments(workdir, single):
    starts = []
    for seed, num_envs in ((1, 2), (2, 3), (3, 7)):
        single.seeds = []
        run(run_dir=f"{seed}", env_id="toy_envs:Single-v0", seed=seed, num_envs=num_envs, eval_episodes=5)
        training = {s for s in single.seeds[:num_envs]}
        starts.append(single.seeds[num_envs : num_envs + 5])
        assert not training & set(starts[-1])
    assert starts[0] == starts[1] == starts[2] and len(set(starts[0])) == 5


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_one_policy_has_one_evaluation_whatever_the_number_of_environments(workdir, env_id):
    """CartPole's native vector environment draws its starts together, so evaluation does not use it."""
    run(env_id=env_id)
    agent, args, env_state, _ = load_agent("run")
    one, several = (evaluate(agent, dataclasses.replace(args, num_envs=n), env_state, 5) for n in (1, 3))
    assert one[1] == several[1] and len(set(one[0])) > 1
    np.testing.assert_allclose(one[0], several[0], rtol=1e-6)  # products of other sizes round differently


def test_a_failing_evaluation_does_not_cost_the_trainings_result(workdir, single):
    def broken(self, **_):
        raise RuntimeError("the licence has run out")

    original, seen = toy_envs.Single.reset, []

    def reset(self, **kwargs):
        seen.append(kwargs)
        return broken(self) if len(seen) > 2 else original(self, **kwargs)

    toy_envs.Single.reset = reset
    try:
        with pytest.raises(UserError, match="not its evaluation. RuntimeError: the licence has run out"):
            run(env_id="toy_envs:Single-v0", num_envs=1, total_timesteps=15, num_steps=1)
    finally:
        toy_envs.Single.reset = original
    saved = json.loads(Path("run/results.json").read_text())
    assert saved["env_steps"] >= 15 and saved["eval_return_mean"] is None and saved["eval_episodes"] == 0
    assert checkpoint("run")["env_steps"] == saved["env_steps"]


def test_a_close_that_fails_does_not_cost_the_result(workdir, monkeypatch):
    class Stuck(toy_envs.Constant):
        def close(self):
            raise RuntimeError("the port does not close")

    gym.register("Stuck-v0", Stuck)
    with pytest.raises(Exception, match="the port does not close"):
        run(env_id="Stuck-v0")
    assert json.loads(Path("run/results.json").read_text())["env_steps"] >= 120


def test_flipped_bytes_in_a_checkpoint_are_found(workdir):
    run()
    data = bytearray(Path("run/checkpoint.pt").read_bytes())
    weights = checkpoint("run")["parts"]["agent"]["actor.body.2.weight"].numpy().tobytes()
    place = bytes(data).find(weights)
    assert place > 0
    data[place + 100] ^= 0x40
    Path("run/checkpoint.pt").write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        load_agent("run")
    with pytest.raises(UserError, match="is damaged"):
        a2c_sync.train(dataclasses.replace(load_args("run"), total_timesteps=200))


# --- 8 Finished runs that are reused: tests/test_laboratory.py --------------------------------------------------------


# --- 9 Numbers that are not finite ------------------------------------------------------------------------------------

NOT_FINITE = {
    "toy_envs:Broken-v0": "reward",
    "toy_envs:NanReset-v0": "observation",
    "toy_envs:Huge-v0": "observation",  # finite as float64, infinite as the float32 that networks see
}


@pytest.mark.parametrize("env_id", NOT_FINITE)
@pytest.mark.parametrize("script", [a2c_sync, off_policy_ac], ids=["a2c_sync", "off_policy_ac"])
def test_what_is_not_finite_is_named_where_it_is_made(workdir, script, env_id):
    sentence = rf"^{NOT_FINITE[env_id]} is not finite at environment step \d+; the last good checkpoint is in 'run'\.$"
    with np.errstate(over="ignore"), pytest.raises(UserError, match=sentence):
        run(script, env_id=env_id, total_timesteps=2_000, checkpoint_every=20, learning_starts=1_900) if (
            script is off_policy_ac
        ) else run(script, env_id=env_id, total_timesteps=2_000, checkpoint_every=20)
    parts = checkpoint("run")["parts"]
    assert all(value.isfinite().all() for value in parts["agent"].values())
    if script is off_policy_ac:
        assert all(field.isfinite().all() for field in parts["buffer"]["fields"].values())


def test_workers_name_it_too(workdir, monkeypatch):
    monkeypatch.setattr("common.workers.MAX_REPLACED", 2)
    with pytest.raises(UserError, match="(?s)NotFinite: observation"):
        run(a3c_async, env_id="toy_envs:NanReset-v0", total_timesteps=10**6)


@pytest.mark.parametrize("script", [a2c_sync, off_policy_ac, sac], ids=["a2c_sync", "off_policy_ac", "sac"])
def test_no_action_that_is_not_finite_reaches_an_environment(workdir, monkeypatch, script):
    act = script.ActorCritic.act if script is not off_policy_ac else None
    if act:
        monkeypatch.setattr(script.ActorCritic, "act", lambda *args, **kwargs: act(*args, **kwargs) * np.nan)
    else:
        sample = script.Gaussian.sample
        monkeypatch.setattr(script.Gaussian, "sample", lambda *args: sample(*args) * np.nan)
    with pytest.raises(UserError, match=r"^action is not finite at environment step"):
        run(script, env_id="toy_envs:NanAction-v0")


def test_a_loss_that_is_not_finite_is_named(workdir, monkeypatch):
    monkeypatch.setattr(a2c_sync, "critic_loss_fn", lambda values, returns, valid: (values * np.inf).sum())
    with pytest.raises(UserError, match=r"^critic_loss is not finite at environment step"):
        run()


# --- 10 Environments that cannot be built -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id, words",
    {
        "toy_envs:Unbuildable-v0": "OSError: no licence server at port 7",
        "toy_envs:Needy-v0": "missing 1 required positional argument: 'size'",
        "PongNoFrameskip-v4": "Did you mean ALE/Pong-v5?",
        "Pong-v5": "Did you mean ALE/Pong-v5?",
        "HalfCheetah-v3": "Did you mean HalfCheetah-v5?",
        "LunarLander-v2": "LunarLander-v3",
    }.items(),
)
def test_an_environment_that_cannot_be_built_says_why_and_leads_to_the_right_one(workdir, env_id, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        run(env_id=env_id)
    assert "\n" not in str(error.value) and not list(Path(".").iterdir())


def test_arguments_of_the_environment(workdir, monkeypatch):
    """A JSON object on the command line, a dict in Python, plain JSON in args.json; evaluation and resume know them."""
    end = run(env_id="toy_envs:Needy-v0", env_kwargs={"size": 7})
    assert end["eval_return_mean"] == 7 and json.loads(Path("run/args.json").read_text())["env_kwargs"] == {"size": 7}
    assert a2c_sync.train(dataclasses.replace(load_args("run"), total_timesteps=200))["eval_return_mean"] == 7
    words = ["a2c_sync.py", "--env-id", "toy_envs:Needy-v0", "--env-kwargs", '{"size": 4}', "--run-dir", "cli"]
    monkeypatch.setattr(sys, "argv", words + ["--total-timesteps", "60", "--eval-episodes", "1"])
    run_cli(a2c_sync.train, a2c_sync.Args)
    assert json.loads(Path("cli/results.json").read_text())["eval_return_mean"] == 4
    monkeypatch.setattr(sys, "argv", ["a2c_sync.py", "--resume", "cli", "--total-timesteps", "90"])
    run_cli(a2c_sync.train, a2c_sync.Args)
    assert json.loads(Path("cli/args.json").read_text())["env_kwargs"] == {"size": 4}


@pytest.mark.parametrize("value", ["{", "[1]", "3"])
def test_arguments_of_the_environment_that_are_no_json_object(workdir, monkeypatch, capsys, value):
    monkeypatch.setattr(sys, "argv", ["a2c_sync.py", "--env-kwargs", value])
    with pytest.raises(SystemExit) as exit:
        run_cli(a2c_sync.train, a2c_sync.Args)
    assert exit.value.code not in (0, None) and not list(Path(".").iterdir())


# --- 11 Images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id, words",
    {
        "toy_envs:GreyImage-v0": "ReshapeObservation adds the channel",
        "toy_envs:ChannelsLast-v0": r"TransformObservation with x.transpose\(2, 0, 1\)",
        "toy_envs:StackedImages-v0": "ReshapeObservation turns stacked frames into channels",
    }.items(),
)
def test_an_image_of_another_shape_is_told_its_wrapper(env_id, words):
    with pytest.raises(UserError, match=rf"\(channels, height, width\).*{words}"):
        make_envs(a2c_sync.Args(env_id=env_id), 1)


def test_six_frames_of_three_channels_are_an_image():
    assert make_envs(a2c_sync.Args(env_id="toy_envs:SixFrames-v0"), 1).obs_spec[0] == (18, 84, 84)


# --- 12 Video ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, words",
    {
        "good": None,
        "raises": "RuntimeError: no display",
        "none": "No video",
        "grey": r"\(32, 48\)",
        "sizes": "of one size, not",
    }.items(),
)
def test_a_video_that_cannot_be_made_is_one_sentence_and_the_numbers_are_printed(
    workdir, monkeypatch, capsys, kind, words
):
    run(env_id="toy_envs:Frames-v0", env_kwargs={"kind": kind})
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "run", "--video", "--episodes", "2"])
    with pytest.raises(SystemExit) as exit:
        evaluate_command.main()
    assert "greedy return 10.0 ± 0.0 over 2 episodes" in capsys.readouterr().out
    if words is None:
        assert exit.value.code is None and Path("run/video.mp4").stat().st_size > 500
    else:
        assert re.search(words, exit.value.code) and "\n" not in exit.value.code


def test_frames_are_written_as_they_come(workdir, monkeypatch):
    """Two frames in memory at most, however long the episode."""
    run(env_id="toy_envs:Frames-v0")
    kept = []
    original = evaluate_command.frame

    def frame(envs, obs):
        gc.collect()
        picture = original(envs, obs)
        kept.append(sys.getrefcount(picture))
        return picture

    monkeypatch.setattr(evaluate_command, "frame", frame)
    write_video(*load_agent("run")[:3], Path("run"))
    assert len(kept) == 10 and len(set(kept)) == 1


def test_the_printed_command_needs_nothing_that_is_not_installed(workdir, monkeypatch, capsys):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "imageio_ffmpeg" else find_spec(name))
    run()
    assert "--video" not in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(workdir)
    run(run_dir="other")
    assert "--video" in capsys.readouterr().out


# --- 13 Terminals and file systems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_help_and_output_on_terminals_without_utf8(workdir, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['a2c_sync.py', '--help']\n"
    code += "import runpy; runpy.run_path(" + repr(str(ROOT / "a2c_sync.py")) + ", run_name='__main__')"
    process = start("-c", code, cwd=workdir)
    status, out, err = finish(process)
    assert status == 0 and "--gae-lambda" in out and "Traceback" not in err, err


def test_stderr_may_be_any_object(workdir, monkeypatch):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=lambda text: len(text), flush=lambda: None))
    assert run()["env_steps"] >= 120


def test_a_file_system_without_locks_is_good_enough(workdir, monkeypatch):
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert run()["env_steps"] >= 120


# --- 14 A full disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter")]
)
def test_a_full_disk_is_one_sentence_and_leaves_no_temporary_file(workdir, monkeypatch, error):
    save_checkpoint(Path("."), {"script": "x", "env_steps": 1})

    def half(content, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(checkpoint_module.torch, "save", half)
    with pytest.raises(UserError, match="cannot be written .*; the last checkpoint stays") as caught:
        save_checkpoint(Path("."), {"script": "x", "env_steps": 2})
    assert caught.value.__suppress_context__
    assert load_checkpoint(".", "x")["env_steps"] == 1 and [p.name for p in Path(".").iterdir()] == ["checkpoint.pt"]


def test_a_log_on_a_full_disk_is_one_sentence_and_resume_works_once_there_is_room(workdir, monkeypatch):
    log = Logger.log

    def full(logger, env_steps, metrics):
        if env_steps > 1_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        log(logger, env_steps, metrics)

    monkeypatch.setattr(Logger, "log", full)
    with pytest.raises(UserError, match="No space left on device: make room, then go on with --resume 'run'") as caught:
        run(total_timesteps=3_000, checkpoint_every=400)
    assert caught.value.__suppress_context__
    monkeypatch.undo()
    monkeypatch.chdir(workdir)
    assert a2c_sync.train(load_args("run"))["env_steps"] >= 3_000


# --- 15 Nothing stays open --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_of_fifty_trials_leaves_no_process_and_no_file_open(workdir, single):
    def opened():
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(children(os.getpid()))

    def trial(k):
        kinds = [
            {"env_id": "toy_envs:Single-v0", "eval_episodes": 1},
            {"env_id": "toy_envs:Single-v0", "network": "shared", "critic_lr": 1.0},  # refused
            {"env_id": "toy_envs:DictObs-v0"},  # refused after the environments were built
            {"env_id": "toy_envs:Broken-v0", "total_timesteps": 2_000},  # fails in the middle
            {"env_id": "toy_envs:Single-v0", "run_dir": "0"},  # a folder in use
        ]
        try:
            run(**({"run_dir": str(k)} | kinds[k % 5]))
        except UserError:
            return 1
        return 0

    def refuse_memory(k):  # after the environments were built, in processes of their own
        with pytest.raises(UserError, match="would fit"):
            flags = {"vectorization": "async", "num_envs": 2, "buffer_size": 10**13}
            off_policy_ac.train(off_policy_ac.Args(run_dir=f"memory {k}", **flags))

    trial(0), refuse_memory(0)  # starts the fork server, which stays
    before = opened()
    failed = sum(trial(k) for k in range(5, 55))
    refuse_memory(1)
    gc.collect()
    assert failed == 40 and opened() == before and single.alive == 0


# --- 16 Long episodes -------------------------------------------------------------------------------------------------


def test_episodes_that_checkpoints_cut_are_warned_of_once(workdir, capsys):
    run(env_id="toy_envs:Endless-v0", total_timesteps=1_000, checkpoint_every=100)
    err = capsys.readouterr().err
    assert err.count("No episode has ended in") == 1 and "--checkpoint-every" in err
    run(run_dir="short", total_timesteps=1_000, checkpoint_every=100)
    assert "No episode has ended" not in capsys.readouterr().err


def test_evaluations_limit_follows_what_training_saw(workdir, monkeypatch):
    limits = []

    def record(agent, args, env_state, episodes, seed, max_steps, on_step):
        limits.append(max_steps)
        return [0.0], [1]

    monkeypatch.setattr("common.run.evaluate", record)
    run(run_dir="short")
    run(
        run_dir="long",
        env_id="toy_envs:Endless-v0",
        env_kwargs={"length": 4_000},
        num_envs=1,
        num_steps=100,
        total_timesteps=4_100,
        checkpoint_every=10**6,
    )
    assert limits == [30_000, 40_000]


def test_an_episode_without_end_is_given_up_with_a_sentence(workdir):
    run(env_id="toy_envs:Constant-v0")
    agent, args, env_state, _ = load_agent("run")
    with pytest.raises(UserError, match="does not end within 8 steps"):
        evaluate(agent, args, env_state, 1, max_steps=8)


# --- 17 Worker processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["class", "string"])
def test_an_environment_of_the_calling_program_reaches_workers_and_evaluation(workdir, how):
    entry = "Mine" if how == "class" else "'__main__:Mine'"
    Path("program.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import gymnasium, numpy, a3c_async\n"
        "class Mine(gymnasium.Env):\n"
        "    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), numpy.float32)\n"
        "    action_space = gymnasium.spaces.Discrete(2)\n"
        "    def reset(self, seed=None, options=None):\n"
        "        self.t = 0\n"
        "        return numpy.zeros(2, numpy.float32), {}\n"
        "    def step(self, action):\n"
        "        self.t += 1\n"
        "        return numpy.zeros(2, numpy.float32), 2.0, self.t == 4, False, {}\n"
        f"gymnasium.register('Mine-v0', {entry})\n"
        "if __name__ == '__main__':\n"
        "    flags = {'total_timesteps': 200, 'num_workers': 2, 'eval_episodes': 1, 'run_dir': 'run'}\n"
        "    args = a3c_async.Args(env_id='Mine-v0', **flags)\n"
        "    print('return', a3c_async.train(args)['eval_return_mean'])\n"
    )
    status, out, err = finish(start("program.py", cwd=workdir))
    if how == "class":
        assert status == 0 and "return 8.0" in out, err
    else:
        assert status != 0 and "give gymnasium.register the class itself" in err, err


def test_an_environment_registered_with_its_class_reaches_processes_of_its_own():
    class Local(toy_envs.Constant):
        pass

    gym.register("Local-v0", Local)
    envs = make_envs(a2c_sync.Args(env_id="Local-v0", vectorization="async"), 2)
    assert envs.reset(seed=0)[0].shape == (2, 1)
    envs.close()


@pytest.mark.parametrize("flags", [{"vectorization": "async", "num_envs": 1}, {}], ids=["async", "worker"])
def test_environments_may_start_processes_of_their_own(workdir, flags):
    if flags:
        envs = make_envs(a2c_sync.Args(env_id="toy_envs:Family-v0", **flags))
        envs.reset(seed=0)
        envs.close()
    else:
        flags = {"envs_per_worker": 1, "total_timesteps": 20}
        assert run(a3c_async, env_id="toy_envs:Family-v0", **flags)["workers_replaced"] == 0


def test_a_slow_step_is_told_the_flag_before_anything_is_replaced(monkeypatch, capsys):
    workers, clock = Workers(print, 1, {"number": ((), np.int64)}, 60.0), [0.0]
    workers._processes = [SimpleNamespace(exitcode=None, pid=7)]
    workers._last_watch, workers._beats[0] = 0.0, 1.0
    monkeypatch.setattr("common.workers.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(workers, "_replace", lambda index, cause: pytest.fail(cause))
    for _ in range(200):
        clock[0] += 0.25
        workers.watch()
    err = capsys.readouterr().err
    assert err.count("--worker-timeout") == 1 and "30 seconds" in err


def test_workers_killed_while_they_start_are_not_told_of_another_cause():
    workers = Workers(print, 1, {"number": ((), np.int64)}, 60.0)
    for exitcode, has_hint in ((-9, False), (1, True)):
        workers._processes = [SimpleNamespace(exitcode=exitcode)]
        assert ("__name__" in workers._look(0)) == has_hint


# --- 18 Sentences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [off_policy_ac, sac], ids=["off_policy_ac", "sac"])
def test_a_buffer_smaller_than_a_batch_is_refused(workdir, script):
    with pytest.raises(UserError, match="--buffer-size must be at least"):
        run(script, env_id=box(script, "Constant"), buffer_size=15, batch_size=16)


def test_flags_that_count_only_with_others_say_so():
    assert (
        "--actor-actions policy" in (ROOT / "off_policy_ac.py").read_text().split("num_action_samples: Count")[1][:250]
    )
    assert "--estimator score" in (ROOT / "sac.py").read_text().split("num_action_samples: Count")[1][:250]


@pytest.mark.parametrize(
    "edit", [{"num_envs": "sixteen"}, {"env_id": 5}, {"actor_lr": None}, {"env_kwargs": 3}], ids=str
)
def test_an_args_json_edited_to_a_wrong_type_is_one_sentence(workdir, monkeypatch, edit):
    run()
    path = Path("run/args.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    name = f"--{next(iter(edit)).replace('_', '-')}"
    monkeypatch.setattr(sys, "argv", ["a2c_sync.py", "--resume", "run"])
    with pytest.raises(SystemExit, match=f"error: {name} must"):
        run_cli(a2c_sync.train, a2c_sync.Args)
    with pytest.raises(UserError, match=f"{name} must"):
        load_agent("run")


def test_folders_and_files_without_permission_are_one_sentence(workdir, monkeypatch):
    run()
    original, denied = open, "nothing"

    def deny(path, *args, **kwargs):
        if str(path).endswith(denied):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", deny)
    monkeypatch.setattr("io.open", deny)
    for denied in ("args.json", "checkpoint.pt", "metrics.csv"):
        with pytest.raises(UserError, match="Permission denied") as error:
            a2c_sync.train(dataclasses.replace(load_args("run"), total_timesteps=200))
        assert "\n" not in str(error.value) and "damaged" not in str(error.value)
    monkeypatch.undo()
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(
        Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied"))
    )
    with pytest.raises(UserError, match="cannot be used: Permission denied"):
        run(run_dir="new")


def test_an_empty_run_dir_is_refused(workdir):
    with pytest.raises(UserError, match="--run-dir must not be empty"):
        run(run_dir="")


def test_resuming_a_finished_run_shows_no_negative_speed(workdir, capsys):
    run()
    capsys.readouterr()
    a2c_sync.train(load_args("run"))
    assert not re.search(r"-\d", capsys.readouterr().err.replace("a2c_sync.py on CartPole-v1", ""))


# --- 19 Other systems -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_importing_and_training_need_no_module_of_unix(workdir):
    """As on Windows: no resource, no fcntl, no setpgrp, no sysconf."""
    code = (
        f"import sys, os; sys.path[:0] = [{str(ROOT)!r}]\n"
        "sys.modules['resource'] = sys.modules['fcntl'] = None\n"
        "del os.setpgrp, os.sysconf\n"
        "import a2c_sync, sac, off_policy_ac, a3c_async, common.ring_buffer\n"
        "common.ring_buffer.Path = lambda path: (_ for _ in ()).throw(OSError('no /proc'))\n"
        "a2c_sync.train(a2c_sync.Args(total_timesteps=60, eval_episodes=1, run_dir='a'))\n"
        "sac.train(sac.Args(total_timesteps=60, learning_starts=50, batch_size=8, eval_episodes=1, run_dir='s'))\n"
    )
    status, _, err = finish(start("-c", code, cwd=workdir))
    assert status == 0, err


# --- 20 Somebody else's run folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate.py", "a2c_sync.py"])
def test_a_foreign_run_folder_imports_nothing_from_itself(workdir, command):
    """Its env_id may name a package, but only one that is installed or in the working directory is imported."""
    run(run_dir="theirs")
    path = Path("theirs/args.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"env_id": "evil:Env-v0"}))
    Path("theirs/evil.py").write_text("open('executed', 'w')")
    words = ["theirs"] if command == "evaluate.py" else ["--resume", "theirs", "--total-timesteps", "200"]
    status, _, err = finish(start(ROOT / command, *words, cwd=workdir))
    assert status != 0 and "no package 'evil'" in err and not Path("executed").exists() and "Traceback" not in err


# --- Faults that a second look found ----------------------------------------------------------------------------------


def test_a_folder_that_another_process_has_trained_on_in_the_meantime_is_read_anew(workdir, monkeypatch):
    """It may end while this one builds its environments: an older checkpoint must not overwrite its newer one."""
    run(total_timesteps=60)
    original = a2c_sync.make_envs

    def slow(args, *rest, **options):
        monkeypatch.setattr(a2c_sync, "make_envs", original)
        a2c_sync.train(dataclasses.replace(load_args("run"), total_timesteps=300))  # the other process
        return original(args, *rest, **options)

    args = dataclasses.replace(load_args("run"), total_timesteps=400)
    monkeypatch.setattr(a2c_sync, "make_envs", slow)
    end = a2c_sync.train(args)
    assert end["env_steps"] >= 400 and end["updates"] > 400 // 6 - 5
    steps = [row[0] for row in metrics("run")]
    assert steps == sorted(steps)


@pytest.mark.parametrize("value", [np.False_, np.int64(3), float("nan"), {1: 2}, (1, 2)], ids=repr)
def test_arguments_of_the_environment_that_json_would_change_are_refused(workdir, value):
    """Else evaluation and resume would build another environment."""
    with pytest.raises(UserError, match="--env-kwargs must be plain JSON"):
        run(env_id="toy_envs:Needy-v0", env_kwargs={"size": value})
    assert not list(Path(".").iterdir())


def test_workers_have_the_callers_version_of_an_environment(workdir):
    """And an unrelated one that cannot be pickled does not matter."""
    gym.register("Locked-v0", lambda: threading.Lock())
    limit, gym.spec("CartPole-v1").max_episode_steps = gym.spec("CartPole-v1").max_episode_steps, 12
    try:
        run(a3c_async, total_timesteps=600)
    finally:
        gym.spec("CartPole-v1").max_episode_steps = limit
        del gym.registry["Locked-v0"]
    assert max(float(value) for _, tag, value in metrics("run") if tag == "charts/episodic_length") <= 12


def test_an_environment_that_cannot_be_sent_to_workers_is_named(workdir):
    lock = threading.Lock()
    gym.register("Local-v1", lambda: (lock, toy_envs.Constant())[1])
    with pytest.raises(UserError, match="Local-v1 cannot be sent to worker processes"):
        run(a3c_async, env_id="Local-v1")
    del gym.registry["Local-v1"]


def test_a_close_that_fails_does_not_hide_the_fault_that_came_first(workdir, capsys):
    class Broken(toy_envs.Broken):
        def close(self):
            raise RuntimeError("close failed")

    gym.register("BadClose-v0", Broken)
    with pytest.raises(UserError, match="reward is not finite at environment step"):
        run(env_id="BadClose-v0", total_timesteps=2_000)
    assert "closing failed, too: RuntimeError: close failed" in capsys.readouterr().err


def test_evaluation_is_the_same_for_environments_that_draw_from_global_generators(workdir):
    run(env_id="toy_envs:Dice-v0")
    agent, args, env_state, _ = load_agent("run")
    seen = []
    for _ in range(2):
        rows = []
        evaluate(agent, args, env_state, 3, on_step=lambda envs, obs, rows=rows: rows.append(obs.copy()))
        seen.append(np.concatenate(rows))
        random.random(), np.random.rand(), torch.rand(1)
    assert (seen[0] == seen[1]).all() and len(np.unique(seen[0])) > 50


def test_ctrl_c_in_the_first_save_leaves_a_folder_to_go_on_with(workdir, monkeypatch):
    import signal

    save = checkpoint_module.torch.save

    def interrupted(*args):
        save(*args)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(checkpoint_module.torch, "save", interrupted)
    with pytest.raises(SystemExit) as exit:
        run()
    assert exit.value.code == 130 and not list(Path("run").glob("*.tmp"))
    monkeypatch.undo()
    monkeypatch.chdir(workdir)
    assert a2c_sync.train(load_args("run"))["env_steps"] >= 120


def test_a_dead_process_of_an_environment_is_a_sentence():
    envs = make_envs(a2c_sync.Args(vectorization="async", num_envs=2))
    envs.reset(seed=0)
    envs.unwrapped.processes[1].kill()
    envs.unwrapped.processes[1].join()
    with pytest.raises(UserError, match=r"A process of an environment has died; exit codes \[None, -9\]"):
        for _ in range(3):
            envs.step(np.zeros(2, int))
    envs.close(terminate=True)


def test_the_evaluate_commands_limit_follows_training_too(workdir, monkeypatch):
    run(
        env_id="toy_envs:Endless-v0",
        env_kwargs={"length": 4_000},
        num_envs=1,
        num_steps=100,
        total_timesteps=4_100,
        checkpoint_every=10**6,
    )
    limits = []
    monkeypatch.setattr(evaluate_command, "evaluate", lambda *args, **_: limits.append(args[5]) or ([0.0], [1]))
    for words in ([], ["--max-steps", "7"]):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "run", *words])
        with pytest.raises(SystemExit):
            evaluate_command.main()
    assert limits == [40_000, 7]


def test_an_environment_may_change_the_working_directory(workdir):
    class Wanderer(toy_envs.Constant):
        def reset(self, **kwargs):
            Path("elsewhere").mkdir(exist_ok=True)
            os.chdir("elsewhere")
            return super().reset(**kwargs)

    gym.register("Wanderer-v0", Wanderer)
    run(env_id="Wanderer-v0")
    assert (workdir / "run" / "results.json").exists() and (workdir / "run" / "metrics.csv").exists()


def test_a_log_in_which_every_transition_was_too_old_has_no_histogram(workdir):
    """With --max-lag, all that came in since the last log may have been dropped."""
    logger = Logger(Path("."), 10)
    logger.histogram(1, "lag/histogram", a3c_async.Lags().recent)
    logger.close()


# --- Kept right -------------------------------------------------------------------------------------------------------


@EVERY
def test_uneven_float64_bounds_reach_an_environment_that_asserts_its_space(workdir, script):
    run(script, env_id="toy_envs:Picky-v0")


def test_log_probabilities_of_saturated_actions_are_finite_and_have_gradients():
    mean, log_std = torch.full((4, 2), 30.0, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    actions, log_probs = sac.SquashedGaussian(mean, log_std).sample_with_log_prob(3)
    assert (actions.abs() <= 1).all() and log_probs.isfinite().all()
    grads = torch.autograd.grad(log_probs.sum(), [mean, log_std])
    assert all(g.isfinite().all() for g in grads) and grads[0].any()


@pytest.mark.parametrize("num_steps", [1, 4])
def test_observation_statistics_see_every_observation_once(workdir, num_steps):
    run(env_id="Pendulum-v1", normalize_obs=True, num_envs=2, num_steps=num_steps, total_timesteps=100)
    count = checkpoint("run")["parts"]["envs"]["count"].item()
    assert count == pytest.approx(100 + 2, abs=8.1)  # one a step, and those of the reset; gymnasium begins with 1e-4


def test_gamma_is_not_rounded():
    """0.9999 in bfloat16 is 1."""
    target = off_policy_ac.td_target(torch.zeros(1), torch.zeros(1), torch.full((1,), 1e4), 0.9999)
    assert target.item() == pytest.approx(9_999, rel=1e-6)
    values = torch.full((2, 1), 1e4)
    advantages, _ = a2c_sync.gae(values, torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), 0.9999, 1.0)
    assert advantages.item() == pytest.approx(-1.0, rel=1e-2)
