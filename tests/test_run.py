"""What common/ promises for every script: exact resume, signals, bad input, safe loading, evaluation."""

import json
import os
import pickle
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, environment, finish, start
from helpers import checkpoint, events, metrics, results, same

import a2c_sync
import off_policy_ac
import sac
from a2c_sync import Args, train
from common import checkpoint as checkpoint_module
from common.checkpoint import load_checkpoint, save_checkpoint
from common.envs import env_seed, make_envs
from common.errors import UserError
from common.evaluate import evaluate, load_agent
from common.logger import Logger
from common.run import run_cli

SCRIPT = ROOT / "a2c_sync.py"


def wait_for(condition, timeout=60):
    end = time.time() + timeout
    while not condition():
        assert time.time() < end, "timed out"
        time.sleep(0.01)


def session_members(session):
    """Ids of the live processes of a session."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            members.append(int(stat.parent.name))
    return members


def test_denormals_are_flushed(workdir):
    """Adam's moments of a dead unit shrink for ever; as denormals they would make every step many times as slow."""
    torch.set_flush_denormal(False)
    assert torch.tensor(1e-30) * 1e-10 > 0
    train(Args(run_dir="run", total_timesteps=100, eval_episodes=1))
    assert torch.tensor(1e-30) * 1e-10 == 0


def test_environments_see_the_same_numbers_in_whatever_process():
    """A simulator may depend on denormals: toy_envs:Halving ends when its state is 0."""
    lengths = {}
    for vectorization in ("sync", "async"):
        envs = make_envs(Args(env_id="toy_envs:Halving-v0", vectorization=vectorization), 1)
        envs.reset(seed=0)
        lengths[vectorization] = next(n for n in range(1, 200) if envs.step(np.zeros(1, int))[2][0])
        envs.close()
    assert lengths["sync"] == lengths["async"]


# --- Exact resume -----------------------------------------------------------------------------------------------------

RESUMED = {"num_envs": 4, "total_timesteps": 30_000, "checkpoint_every": 1_500, "eval_episodes": 3}


SLOWER = {"num_envs": 2, "total_timesteps": 1_500, "checkpoint_every": 150, "learning_starts": 100, "batch_size": 32}


@pytest.mark.parametrize(
    "script, flags",
    [
        (a2c_sync, {}),
        (a2c_sync, {"env_id": "Pendulum-v1", "network": "shared", "normalize_obs": True, "optimizer": "rmsprop"}),
        (off_policy_ac, SLOWER | {"env_id": "Pendulum-v1", "buffer_size": 500}),  # which wraps around
        (sac, SLOWER | {"num_threads": 1}),
    ],
    ids=["default", "continuous", "replay", "sac"],
)
def test_killed_and_resumed_is_bit_identical(workdir, script, flags):
    """SIGKILL at three random moments; then the same weights, optimizers, statistics, metrics and evaluation."""
    flags = RESUMED | flags
    words = [
        w
        for name, value in flags.items()
        for w in ([f"--{name.replace('_', '-')}"] + [str(value)] * (value is not True))
    ]
    seed = random.randrange(10**6)
    print("delays drawn with seed", seed)
    delays = random.Random(seed)
    killed = 0
    for attempt in range(4):
        continued = ["--resume", "killed"] if attempt else ["--run-dir", "killed", *words]
        before = checkpoint("killed")["env_steps"] if attempt else -1
        process = start(script.__file__, *continued, cwd=workdir)
        if attempt < 3:
            # Not before it has got further than the checkpoint it began with, nor after its end
            wait_for(
                lambda: (
                    process.poll() is not None
                    or (os.path.exists("killed/checkpoint.pt") and checkpoint("killed")["env_steps"] > before)
                )
            )
            time.sleep(delays.uniform(0, 0.4))
            process.kill()
            killed += process.wait() == -signal.SIGKILL
    status, out, err = finish(process)
    assert status == 0 and killed >= 2, err
    script.train(script.Args(run_dir="undisturbed", **flags))
    a, b = checkpoint("killed"), checkpoint("undisturbed")
    assert same(a["parts"], b["parts"]) and same(a["random"], b["random"])
    assert (a["env_steps"], a["updates"]) == (b["env_steps"], b["updates"])
    assert metrics("killed") == metrics("undisturbed")
    assert {**results("killed")} == {**results("undisturbed")}
    ours, theirs = events("killed"), events("undisturbed")
    assert all(ours[tag] == theirs[tag] for tag in theirs if tag != "charts/SPS")


def test_resume_takes_every_flag_and_lets_given_ones_override(workdir):
    train(Args(run_dir="run", total_timesteps=500, num_envs=2, num_steps=3, gamma=0.9, seed=7, eval_episodes=1))
    end = train(Args(resume="run", total_timesteps=900))
    assert end["env_steps"] >= 900 and end["seed"] == 7
    saved = json.loads(Path("run/args.json").read_text())
    assert (saved["gamma"], saved["num_envs"], saved["total_timesteps"]) == (0.9, 2, 900)


def test_command_line_overrides_even_with_a_default(workdir, monkeypatch):
    train(Args(run_dir="run", total_timesteps=500, num_envs=2, gamma=0.9, eval_episodes=1))
    seen = []
    monkeypatch.setattr(sys, "argv", ["a2c_sync.py", "--resume", "run", "--gamma", "0.99"])
    monkeypatch.setattr(a2c_sync, "train", a2c_sync.train)
    monkeypatch.setattr(a2c_sync.Run, "open", lambda run, **parts: seen.append(run.args) or sys.exit(0))
    with pytest.raises(SystemExit):
        run_cli(a2c_sync.train, Args)
    assert seen[0].gamma == 0.99 and seen[0].num_envs == 2


def test_a_failed_write_leaves_the_last_checkpoint(workdir, monkeypatch):
    save_checkpoint(Path("."), {"script": "x", "env_steps": 1})

    def half(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", half)
    with pytest.raises(OSError):
        save_checkpoint(Path("."), {"script": "x", "env_steps": 2})
    assert load_checkpoint(".", "x")["env_steps"] == 1


def test_a_checkpoint_that_would_execute_code_is_refused(workdir):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch executed",)

    torch.save({"format": checkpoint_module.FORMAT, "script": "a2c_sync", "evil": Evil()}, "checkpoint.pt")
    with pytest.raises(UserError, match="damaged or was not written"):
        load_checkpoint(".", "a2c_sync")
    assert not Path("executed").exists()


# --- Signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, flags",
    [
        (signal.SIGINT, ["--vectorization", "async", "--num-envs", "2"]),
        (signal.SIGTERM, ["--vectorization", "async", "--num-envs", "2"]),
    ],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_interrupt_checkpoints_and_prints_how_to_go_on(workdir, number, flags):
    process = start(
        SCRIPT, "--env-id", "toy_envs:Slow-v0", "--run-dir", "my run", "--total-timesteps", "400",
        "--eval-episodes", "1", *flags, cwd=workdir, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: os.path.exists("my run/checkpoint.pt") and len(Path("my run/metrics.csv").read_text()) > 0)
    time.sleep(1.5)
    os.killpg(process.pid, number)  # as a terminal and GNU timeout do
    status, out, err = finish(process, timeout=20)
    assert status == 128 + number and "Traceback" not in err, err
    assert 0 < checkpoint("my run")["env_steps"] < 400
    wait_for(lambda: not session_members(process.pid), timeout=5)
    command = re.search(r"^  python (.*--resume.*)$", err, re.MULTILINE).group(1)
    status, out, err = finish(start(*shlex.split(command), cwd=workdir))
    assert status == 0 and results("my run")["env_steps"] >= 400, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_evaluation_says_how_to_go_on(workdir, number):
    process = start(
        SCRIPT, "--env-id", "toy_envs:Slow-v0", "--run-dir", "run", "--num-envs", "4", "--total-timesteps", "100",
        "--eval-episodes", "1000", cwd=workdir,
    )  # fmt: skip
    wait_for(lambda: os.path.exists("run/checkpoint.pt") and checkpoint("run")["env_steps"] >= 100)
    time.sleep(0.5)
    process.send_signal(number)
    status, out, err = finish(process, timeout=20)
    assert status == 128 + number and "--resume run" in err and "Traceback" not in err, err


def start_with_workers(workdir):
    """A run with two environment processes, in a session of its own, once it has begun to train."""
    process = start(
        SCRIPT, "--env-id", "toy_envs:Slow-v0", "--run-dir", "run", "--vectorization", "async", "--num-envs", "2",
        cwd=workdir, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: os.path.exists("run/checkpoint.pt"))
    return process


def test_a_dead_worker_ends_the_run(workdir):
    process = start_with_workers(workdir)
    time.sleep(1)
    worker = next(pid for pid in session_members(process.pid) if os.getpgid(pid) == pid != process.pid)
    os.kill(worker, signal.SIGKILL)
    status, out, err = finish(process, timeout=20)
    assert status not in (0, None)
    wait_for(lambda: not session_members(process.pid), timeout=10)


def test_no_worker_outlives_a_killed_parent(workdir):
    process = start_with_workers(workdir)
    assert len(session_members(process.pid)) >= 3
    process.kill()
    finish(process)
    wait_for(lambda: not session_members(process.pid), timeout=10)


# --- Bad input: one sentence, a non-zero exit, nothing written --------------------------------------------------------

BAD = {
    "--env-id CartPol-v1": "CartPole-v1",
    "--env-id CartPole-v7": "CartPole-v1",
    "--env-id Nothing/Like-this-v0": "There is no environment",
    "--env-id no_such_package:Env-v0": "no_such_package",
    "--env-id toy_envs:NoSuchName-v0": "There is no environment",
    "--env-id toy_envs:Constnt-v0": "did you mean toy_envs:Constant-v0",
    "--env-id toy_envs:DictObs-v0": "FlattenObservation",
    "--env-id toy_envs:DiscreteObs-v0": "FlattenObservation",
    "--env-id toy_envs:MatrixObs-v0": "FlattenObservation",
    "--env-id toy_envs:ChannelsLast-v0": "channels first",
    "--env-id toy_envs:FloatImage-v0": "uint8",
    "--env-id toy_envs:MultiDiscreteActions-v0": "MultiDiscrete",
    "--env-id toy_envs:UnboundedActions-v0": "bounded",
    "--env-id toy_envs:Images-v0 --normalize-obs": "--normalize-obs",
    "--total-timesteps 0": "--total-timesteps must lie in [1, inf)",
    "--num-envs 0": "--num-envs",
    "--num-envs -3": "--num-envs",
    "--num-steps 0": "--num-steps",
    "--gamma 1.01": "--gamma must lie in [0, 1]",
    "--gamma nan": "--gamma",
    "--gae-lambda -0.1": "--gae-lambda",
    "--actor-lr 0": "--actor-lr",
    "--actor-lr inf": "--actor-lr",
    "--critic-lr -1": "--critic-lr",
    "--max-grad-norm 0": "--max-grad-norm",
    "--ent-coef -1": "--ent-coef",
    "--seed -1": "--seed",
    "--seed 18446744073709551616": "--seed",
    "--run-dir full/file/sub": "cannot be made",
    "--checkpoint-every 0": "--checkpoint-every",
    "--eval-episodes 0": "--eval-episodes",
    "--num-threads 0": "--num-threads",
    "--value-coef -0.5": "--value-coef",
    "--network shared --critic-lr 0.1": "--critic-lr",
    "--resume nowhere": "no run folder",
    "--resume nowhere --run-dir other": "no run folder",
    "--run-dir full": "already in use",
    "--run-dir full/file": "already in use",
    "--resume full": "no run folder",
    "--device cuda": "--device cpu",
}


BAD_REPLAY = {
    "--critic v": "cannot score an action that was not taken",
    "--critic v --actor-actions policy": "cannot score an action that was not taken",
    "--num-action-samples 1": "--num-action-samples 2 or more",
    "--num-action-samples 0": "--num-action-samples must lie in [1, inf)",
    "--buffer-size 2 --num-envs 3": "--buffer-size must be at least",
    "--buffer-size 0": "--buffer-size",
    "--buffer-size 1000000000000": "would fit",
    "--batch-size 0": "--batch-size",
    "--learning-starts -1": "--learning-starts",
    "--learning-starts 1000 --total-timesteps 1000": "nothing would be learned",
    "--updates-per-step 1e308": "--updates-per-step must lie in (0, 1000]",
    "--updates-per-step 0": "--updates-per-step",
    "--tau 0": "--tau must lie in (0, 1]",
    "--tau 1.1": "--tau",
    "--env-id toy_envs:UnboundedActions-v0": "bounded",
}
BAD_SAC = {
    "--env-id CartPole-v1": "use off_policy_ac.py",
    "--alpha 0": "--alpha must be auto or lie in (0, inf)",
    "--alpha -1": "--alpha must be auto or lie in (0, inf)",
    "--alpha nan": "--alpha must be auto or lie in (0, inf)",
    "--num-critics 0": "--num-critics must lie in [1, inf)",
    "--estimator score": "--num-action-samples 2 or more",
    "--buffer-size 1000000000000": "would fit",
    "--learning-starts 20000": "nothing would be learned",
}
ALL_BAD = [
    (script, sentences, words)
    for script, sentences in ((a2c_sync, BAD), (off_policy_ac, BAD_REPLAY), (sac, BAD_SAC))
    for words in sentences
]


@pytest.mark.parametrize("script, sentences, words", ALL_BAD, ids=[words for _, _, words in ALL_BAD])
def test_bad_input(workdir, monkeypatch, capsys, script, sentences, words):
    if words == "--device cuda" and torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("full").mkdir()
    Path("full/file").touch()
    monkeypatch.setattr(sys, "argv", ["script.py", *words.split()])
    with pytest.raises(SystemExit) as exit:
        run_cli(script.train, script.Args)
    message = exit.value.code
    assert isinstance(message, str) and message.startswith("error: ") and sentences[words] in message
    assert message.count("\n") == 0 and len(message) < 400
    assert sorted(str(p) for p in Path(".").rglob("*")) == ["full", "full/file"]


@pytest.mark.parametrize("words", ["--no-such-flag 1", "--gamma abc", "--network both", "--num-envs 1.5"])
def test_words_that_do_not_parse(workdir, monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["a2c_sync.py", *words.split()])
    with pytest.raises(SystemExit) as exit:
        run_cli(train, Args)
    assert exit.value.code not in (0, None) and list(Path(".").iterdir()) == []


@pytest.mark.parametrize(
    "flags", [{"network": "both"}, {"optimizer": "sgd"}, {"vectorization": "x"}, {"device": "gpu"}]
)
def test_choices_are_checked_in_python_too(workdir, flags):
    with pytest.raises(UserError, match="must be one of"):
        train(Args(**flags))
    assert list(Path(".").iterdir()) == []


def test_a_package_in_the_working_directory_is_found(workdir):
    Path("mine.py").write_text("import gymnasium, toy_envs\ngymnasium.register('Mine-v0', toy_envs.Constant)\n")
    words = "--env-id mine:Mine-v0 --total-timesteps 100 --num-envs 2 --vectorization async --eval-episodes 1".split()
    status, out, err = finish(start(SCRIPT, *words, cwd=workdir))
    assert status == 0 and "greedy return 10.0" in out and "100%" in err, err
    play = re.search(r"see it play +(.*) --video", out).group(1)  # as printed, from this directory
    evaluation = subprocess.run(
        play + " --episodes 1", shell=True, capture_output=True, text=True, env=environment(), cwd=workdir
    )
    assert "greedy return 10.0" in evaluation.stdout, evaluation.stderr


def test_bad_input_as_a_process(workdir):
    """What the shell sees: exit status, one line, no traceback, no folder."""
    status, out, err = finish(start(SCRIPT, "--env-id", "CartPol-v1", cwd=workdir))
    assert status != 0 and err.strip().count("\n") == 0 and "Traceback" not in err and list(Path(".").iterdir()) == []


def test_missing_extra_names_the_install_line(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)  # as if it were not installed
    with pytest.raises(UserError, match=re.escape('pip install -e ".[atari]"')):
        make_envs(Args(env_id="ALE/Pong-v5"))
    monkeypatch.setitem(sys.modules, "mujoco", None)
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=re.escape('pip install -e ".[mujoco]"')):
        make_envs(Args(env_id="InvertedPendulum-v5"))


DAMAGES = {
    "args": lambda run: (run / "args.json").write_text("{"),
    "foreign args": lambda run: (run / "args.json").write_text("[1]"),
    "no checkpoint": lambda run: (run / "checkpoint.pt").unlink(),
    "cut checkpoint": lambda run: os.truncate(run / "checkpoint.pt", 1000),
    "empty checkpoint": lambda run: (run / "checkpoint.pt").write_bytes(b""),
    "foreign pickle": lambda run: (run / "checkpoint.pt").write_bytes(pickle.dumps({"a": 1})),
    "foreign weights": lambda run: torch.save({"weight": torch.zeros(3)}, run / "checkpoint.pt"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_run_folders_are_refused(workdir, damage):
    train(Args(run_dir="run", total_timesteps=100, num_envs=2, eval_episodes=1))
    damage(Path("run"))
    with pytest.raises(UserError) as error:
        train(Args(resume="run", total_timesteps=200))
    assert "'run" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError):
        load_agent("run")


def test_flags_that_do_not_fit_the_checkpoint_are_refused(workdir):
    train(Args(run_dir="run", total_timesteps=100, num_envs=2, eval_episodes=1))
    before = checkpoint("run")
    with pytest.raises(UserError, match="does not fit these flags"):
        train(Args(resume="run", network="shared"))
    assert same(before, checkpoint("run"))


@pytest.mark.parametrize("flags", [{"optimizer": "adam"}, {"normalize_obs": True}, {"network": "shared"}], ids=str)
def test_a_refused_resume_changes_nothing(workdir, flags):
    train(Args(run_dir="run", env_id="Pendulum-v1", total_timesteps=100, num_envs=2, eval_episodes=1))
    before = Path("run/args.json").read_text()
    with pytest.raises(UserError, match="does not fit these flags"):
        train(Args(resume="run", total_timesteps=300, **flags))
    assert Path("run/args.json").read_text() == before
    assert train(Args(resume="run", total_timesteps=300))["env_steps"] >= 300  # and nothing stays locked


def test_a_folder_in_use_by_a_live_run_is_refused(workdir):
    process = start(SCRIPT, "--env-id", "toy_envs:Slow-v0", "--run-dir", "run", "--num-envs", "1", cwd=workdir)
    try:
        wait_for(lambda: os.path.exists("run/checkpoint.pt"))
        with pytest.raises(UserError, match="in use by another process"):
            train(Args(resume="run"))
    finally:
        process.kill()
        finish(process)


def test_two_runs_in_the_same_second_get_two_folders(workdir, monkeypatch):
    monkeypatch.setattr(time, "time", lambda now=time.time(): now)
    for _ in range(2):
        train(Args(total_timesteps=50, num_envs=2, eval_episodes=1))
    assert len(list(Path("runs").iterdir())) == 2


@pytest.mark.parametrize(
    "flags", [{"env_id": "toy_envs:Broken-v0"}, {"env_id": "toy_envs:Broken-v0", "network": "shared"}]
)
def test_a_loss_that_is_not_finite_stops_the_run(workdir, flags):
    with pytest.raises(UserError, match=r"critic_loss is not finite at environment step \d+"):
        train(Args(run_dir="run", num_envs=2, total_timesteps=2_000, checkpoint_every=100, **flags))
    saved = checkpoint("run")
    assert 100 <= saved["env_steps"] <= 420
    assert all(value.isfinite().all() for value in saved["parts"]["agent"].values())


def test_broken_weights_are_not_saved(workdir, monkeypatch):
    save = a2c_sync.Run._save

    def poison(run):
        if run.env_steps > 200:
            next(run._parts["agent"].parameters()).data[0] = np.nan
        save(run)

    monkeypatch.setattr(a2c_sync.Run, "_save", poison)
    with pytest.raises(UserError, match="agent's weights is not finite"):
        train(Args(run_dir="run", total_timesteps=1_000, checkpoint_every=200))
    assert all(weight.isfinite().all() for weight in checkpoint("run")["parts"]["agent"].values())


def test_exploding_weights_stop_the_run_with_a_sentence(workdir):
    with pytest.raises(UserError, match=r"is not finite at environment step"):
        train(Args(run_dir="run", total_timesteps=5_000, actor_lr=1e38, lr_decay=False))


# --- Environments, statistics, evaluation -----------------------------------------------------------------------------


def test_episode_statistics_are_gymnasiums(workdir):
    ours = make_envs(Args(env_id="toy_envs:Counting-v0", num_envs=5))
    theirs = gym.wrappers.vector.RecordEpisodeStatistics(
        gym.make_vec("toy_envs:Counting-v0", num_envs=5, vectorization_mode="sync")
    )
    ours.reset(seed=1)
    theirs.reset(seed=1)
    episodes = 0
    for _ in range(100):
        a, b = (envs.step(np.zeros(5, int))[4] for envs in (ours, theirs))
        assert ("episode" in a) == ("episode" in b)
        if "episode" in a:
            ended = a["_episode"]
            assert (ended == b["_episode"]).all()
            assert all((a["episode"][key][ended] == b["episode"][key][ended]).all() for key in "rl")
            episodes += ended.sum()
    assert episodes > 50


def test_an_environments_own_episode_is_none_of_ours(workdir):
    end = train(Args(run_dir="run", env_id="toy_envs:Talkative-v0", total_timesteps=200, eval_episodes=2))
    assert end["train_return_mean"] == end["eval_return_mean"] == 10


def test_normalization_is_saved_and_frozen_in_evaluation(workdir):
    train(
        Args(
            run_dir="run", env_id="Pendulum-v1", normalize_obs=True, total_timesteps=2_000, num_envs=4, eval_episodes=2
        )
    )
    before = checkpoint("run")["parts"]["envs"]
    agent, args, env_state, _ = load_agent("run")
    envs = make_envs(args, 2, evaluation=True)
    envs.load_state_dict(env_state)
    raw = make_envs(Args(env_id="Pendulum-v1"), 2)
    obs, raw_obs = envs.reset(seed=5)[0], raw.reset(seed=5)[0]
    expected = (raw_obs - before["mean"].numpy()) / np.sqrt(before["var"].numpy() + 1e-8)
    np.testing.assert_allclose(obs, expected, rtol=1e-5)
    assert before["count"] > 2_000 and same(envs.state_dict(), before)
    first = evaluate(agent, args, env_state, 3)
    assert first == evaluate(agent, args, env_state, 3) and same(checkpoint("run")["parts"]["envs"], before)


def test_what_evaluation_builds(workdir, monkeypatch):
    """True rewards, frozen statistics, those of training; and a seed that no reset in training has."""
    import common.evaluate as module

    built, seeds = [], []

    def spy(args, num_envs=None, evaluation=False, render=False):
        envs = make_envs(args, num_envs, evaluation, render)
        reset = envs.reset
        envs.reset = lambda seed: seeds.append(seed) or reset(seed=seed)
        built.append((envs, evaluation))
        return envs

    monkeypatch.setattr(module, "make_envs", spy)
    train(Args(run_dir="run", env_id="Pendulum-v1", normalize_obs=True, total_timesteps=2_000, eval_episodes=2))
    (envs, evaluation), state = built[-1], checkpoint("run")["parts"]["envs"]
    assert evaluation and same(envs.state_dict(), state)
    training = [env_seed(1, steps) for steps in range(0, 10_000, 10)]
    assert len(set(training)) == len(training) and len(seeds) == 1 and seeds[0] not in training


def test_an_evaluation_without_end_is_given_up(workdir, monkeypatch):
    monkeypatch.setattr("common.evaluate.MAX_EPISODE_STEPS", 8)  # episodes of Constant-v0 have 10 steps
    with pytest.raises(UserError, match="max_episode_steps"):
        train(Args(run_dir="run", env_id="toy_envs:Constant-v0", total_timesteps=50, num_envs=2))


def test_evaluation_counts_a_fixed_number_of_episodes_of_every_environment(workdir):
    """16 environments, 40 episodes: those that ended first must not be short ones. Lengths 1 to 5: 3 on average."""
    train(Args(run_dir="run", env_id="toy_envs:Counting-v0", total_timesteps=50, eval_episodes=1))
    agent, args, env_state, _ = load_agent("run")
    returns, lengths = evaluate(agent, args, env_state, 3_000)
    assert len(returns) == len(lengths) == 3_000
    assert np.mean(lengths) == pytest.approx(3, abs=0.1)
    assert returns == [n * (n + 1) / 2 for n in lengths]


def test_evaluate_command(workdir):
    end = train(Args(run_dir="a run", total_timesteps=500, num_envs=2, eval_episodes=3))
    run = str(workdir / "a run")
    process = start("-m", "common.evaluate", run, "--episodes", "3", cwd=ROOT)
    status, out, err = finish(process)
    assert status == 0 and f"greedy return {end['eval_return_mean']:.1f} ± {end['eval_return_std']:.1f}" in out, err
    status, out, err = finish(start("-m", "common.evaluate", str(workdir), cwd=ROOT))
    assert status != 0 and "no args.json" in err and "Traceback" not in err


def test_the_log_is_cut_back_to_its_checkpoint(workdir):
    logger = Logger(Path("."), 100, 0, 0.0)
    logger.log(10, actor_loss=1.0)
    state = logger.state_dict()
    logger.log(20, actor_loss=2.0)
    logger.close()
    Logger.rewind(Path("."), state)
    again = Logger(Path("."), 100, 10, 0.0)
    again.log(20, actor_loss=3.0)
    again.close()
    assert [row[2] for row in metrics(".")] == ["1.0", "3.0"]
    assert events(".")["losses/actor_loss"] == [(10, 1.0), (20, 3.0)]


def test_importing_a_script_has_no_side_effect(workdir):
    code = "import a2c_sync, torch; assert torch.get_num_threads() == 2; assert torch.initial_seed() == 5"
    code = "import torch; torch.set_num_threads(2); torch.manual_seed(5)\n" + code
    status, out, err = finish(start("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}", cwd=workdir))
    assert (status, out, err) == (0, "", "") and list(Path(".").iterdir()) == []
