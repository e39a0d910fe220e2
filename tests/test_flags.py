"""Flags: --help says all there is, and bad input ends in one sentence before anything is written."""

import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, finish, start
from helpers import SCRIPTS, command_line, resume, short_run

import a2c_sync
from common.envs import make_envs
from common.flags import RunArgs, UserError, check_ranges

EVERY = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)

# --- --help -----------------------------------------------------------------------------------------------------------


def help_of(monkeypatch, capsys, script, *words):
    """What --help prints: the boxes, of which each is one line of words, and the lines behind them."""
    with pytest.raises(SystemExit) as end:
        command_line(monkeypatch, *words, "--help", script=script)
    assert end.value.code in (0, None)
    out, err = capsys.readouterr()
    boxes, page, rest = out.partition("More in docs")
    text = " ".join(re.sub("[│─╭╮╰╯]|-{5,}", " ", boxes).split())
    assert err == ""
    return text.split(" algorithm options ")[1].split(" run options "), (page + rest).splitlines()


@EVERY
def test_help_shows_every_flag_in_its_box_with_the_words_behind_it_in_the_source(monkeypatch, capsys, script):
    """First the box of the algorithm's flags, then that of the run's."""
    boxes, _ = help_of(monkeypatch, capsys, script)
    shared, own = (ROOT / "common" / "flags.py").read_text(), Path(script.__file__).read_text()
    names = [each.name for each in fields(script.Args)]
    for box, is_run in zip(boxes, (False, True), strict=True):
        found = re.findall(r"(?<!\S)--([\w-]+)(?:, --no-\S+| \S+) (.+?) \(default: ", box)
        wanted = [name for name in names if (name in RunArgs.__annotations__) == is_run]
        assert [flag.replace("-", "_") for flag, _ in found] == wanted and len(wanted) >= 10
        for name, (_, words) in zip(wanted, found):
            source = own if name in script.Args.__annotations__ else shared
            assert len(words.split()) >= 2 and re.search(rf"^    {name}: .*  # {re.escape(words)}$", source, re.M)


@EVERY
def test_help_ends_with_the_page_and_the_examples(monkeypatch, capsys, script):
    _, (page, *examples) = help_of(monkeypatch, capsys, script)
    name = script.__name__
    assert page == f"More in docs/{name}.md. Examples:" and (ROOT / "docs" / f"{name}.md").is_file()
    assert len(examples) >= 2 and all(line.startswith(f"    python {name}.py") for line in examples)
    assert "\n".join(examples) in script.__doc__


@pytest.mark.parametrize("words", [["--resume=run"], ["--resume", "run"]], ids=" ".join)
def test_help_of_a_run_folder_shows_its_flags(workdir, monkeypatch, capsys, words):
    short_run(gamma=0.875, lr_decay=False, env_kwargs={"render_mode": None})
    capsys.readouterr()
    (algorithm, run), _ = help_of(monkeypatch, capsys, a2c_sync, *words)
    assert "discount γ (default: 0.875)" in algorithm and "0 at --total-timesteps (default: False)" in algorithm
    assert "(default: '{\"render_mode\": null}')" in run and "given beside it (default: run)" in run


def test_help_on_a_terminal_without_utf8(workdir, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    status, out, err = finish(start(ROOT / "a2c_sync.py", "--help", cwd=workdir, real=True))
    assert status == 0 and "discount ? (default: 0.99)" in out and err == ""


# --- Ranges -----------------------------------------------------------------------------------------------------------

INF, NAN = math.inf, math.nan
COUNT, POSITIVE, NON_NEGATIVE = ([0, -3], [1, 10**9]), ([0.0, -1.0, INF, NAN], [1e-9, 1e9]), ([-1e-9, INF, NAN], [0.0])
RANGES = {  # flags -> values outside and inside
    "total_timesteps num_envs num_threads checkpoint_every eval_episodes eval_every num_steps": COUNT,
    "num_workers batch_size buffer_size num_action_samples num_critics": COUNT,
    "seed": ([-1, 2**32], [0, 2**32 - 1]),
    "learning_starts max_lag": ([-1], [0, 1]),
    "gamma gae_lambda": ([-0.1, 1.01, NAN], [0.0, 1.0]),
    "tau actor_tau": ([0.0, 1.1, NAN], [1e-9, 1.0]),
    "actor_lr critic_lr rmsprop_eps max_grad_norm reward_scale worker_timeout updates_per_step alpha": POSITIVE,
    "ent_coef value_coef slow_worker": NON_NEGATIVE,
}


@EVERY
def test_every_number_has_its_range_and_every_choice_its_names(script):
    """Those of a caller in Python, too; a flag that is not in the table fails."""
    limits = {name: both for names, both in RANGES.items() for name in names.split()}
    for name, hint in get_type_hints(script.Args).items():
        flag = "--" + name.replace("_", "-")
        if get_origin(hint) is Literal:
            with pytest.raises(UserError, match=f"^{flag} must be one of {get_args(hint)[0]}, .*, got 'gpu'.$"):
                check_ranges(script.Args(**{name: "gpu"}))
        elif int in (hint, *get_args(hint)) or float in (hint, *get_args(hint)):
            for value in limits[name][0]:
                with pytest.raises(UserError, match=rf"^{flag} must lie in [\[(].*[\])], got {value!r}\.$"):
                    check_ranges(script.Args(**{name: value}))
            for value in limits[name][1]:
                check_ranges(script.Args(**{name: value}))


# --- Sentences --------------------------------------------------------------------------------------------------------

BAD = {
    "--env-id CartPol-v1": "Did you mean: `CartPole`",
    "--env-id CartPole-v7": "CartPole",
    "--env-id LunarLander-v2": "LunarLander-v3",
    "--env-id Nothing/Like-this-v0": "Nothing",
    "--env-id no_such_package:Env-v0": "there is no package 'no_such_package' to import",
    "--env-id toy_envs:Constnt-v0": "Did you mean: `Constant`",
    "--env-id toy_envs:Needy-v0": "missing 1 required positional argument: 'size'",
    "--env-id toy_envs:DictObs-v0": "FlattenObservation",
    "--env-id toy_envs:DiscreteObs-v0": "FlattenObservation",
    "--env-id toy_envs:MatrixObs-v0": "FlattenObservation",
    "--env-id toy_envs:ChannelsLast-v0": "channels must come first: transpose",
    "--env-id toy_envs:FloatImage-v0": "scale images to uint8",
    "--env-id toy_envs:SmallImage-v0": "resize images",
    "--env-id toy_envs:MultiDiscreteActions-v0": "make one Discrete",
    "--env-id toy_envs:UnboundedActions-v0": "bounded",
    "--env-id toy_envs:Images-v0 --normalize-obs": "--normalize-obs is for vectors",
    "--network shared --critic-lr 0.1": "--critic-lr needs separate networks",
    "--gamma 1.01": "--gamma must lie in [0, 1], got 1.01.",
    "--max-grad-norm nan": "--max-grad-norm must lie in (0, inf), got nan.",
    "--device cuda": "--device cpu",
    "--run-dir ''": "already in use",
    "--run-dir full": "already in use",
    "--run-dir full/file": "already in use",
    "--run-dir full/file/sub": "cannot be used: Not a directory",
    "--resume full": "no run folder",
    "--resume nowhere --run-dir other": "no run folder",
}
BAD_A3C = {
    "--vectorization async": "the workers are processes already",
    "--num-envs 3 --num-workers 2": "--num-envs",
    "--network shared --critic-lr 0.1": "--critic-lr needs separate networks",
    "--device auto": "use --update pooled",
    "--env-id CartPole-v9": "CartPole",
    "--num-workers 0": "--num-workers must lie in [1, inf)",
    "--max-lag -1": "--max-lag must lie in [0, inf)",
}
BAD_BUFFER = {
    "--buffer-size 2 --num-envs 3 --batch-size 1": "--buffer-size must be at least",
    "--buffer-size 15 --batch-size 16": "--buffer-size must be at least",
    "--learning-starts 1000 --total-timesteps 1000": "nothing would be learned",
}
BAD_REPLAY = BAD_BUFFER | {
    "--critic v": "cannot score an action that was not taken",
    "--num-action-samples 1": "--num-action-samples 2 or more",
    "--env-id toy_envs:Images-v0": "for images use a2c_sync.py or a3c_async.py",
}
BAD_SAC = BAD_BUFFER | {
    "--env-id CartPole-v1": "use off_policy_ac.py",
    "--env-id toy_envs:ImagesBox-v0": "for images use a2c_sync.py or a3c_async.py",
    "--alpha nan": "--alpha must lie in (0, inf), got nan.",
    "--estimator score": "--num-action-samples 2 or more",
}
TABLES = zip(SCRIPTS, (BAD, BAD_A3C, BAD_REPLAY, BAD_SAC))


@pytest.mark.parametrize(
    "name, words, sentence", [(name, *row) for name, table in TABLES for row in table.items()], ids=lambda x: x[:60]
)
def test_bad_input(workdir, monkeypatch, capsys, name, words, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("full").mkdir()
    Path("full/file").touch()
    with pytest.raises(SystemExit) as end:
        command_line(monkeypatch, *shlex.split(words), script=SCRIPTS[name])
    message = end.value.code
    assert isinstance(message, str) and message.startswith("error: ") and sentence in message
    assert message.count("\n") == 0 and len(message) < 400
    assert sorted(str(p) for p in Path(".").rglob("*")) == ["full", "full/file"]


WORDS = ["--no-such-flag 1", "--gamma abc", "--network both", "--num-envs 1.5", "--resume"]


@pytest.mark.parametrize("words", WORDS + ["--env-kwargs {", "--env-kwargs [1]", "--env-kwargs 3"])
def test_words_that_do_not_parse(workdir, monkeypatch, capsys, words):
    with pytest.raises(SystemExit) as end:
        command_line(monkeypatch, *words.split())
    assert end.value.code not in (0, None) and list(Path(".").iterdir()) == []


def test_bad_input_as_a_process(workdir):
    """What the shell sees: exit status, one line, no traceback, no folder."""
    status, out, err = finish(start(ROOT / "a2c_sync.py", "--env-id", "CartPol-v1", cwd=workdir))
    assert status == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert list(Path(".").iterdir()) == []


@pytest.mark.parametrize("module, env_id, extra", [("ale_py", "ALE/Pong-v5", "atari"), ("mujoco", "Ant-v5", "mujoco")])
def test_a_missing_extra_names_the_install_line(monkeypatch, module, env_id, extra):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=rf'pip install .*"?.*\[{extra}\]"') as error:
        make_envs(a2c_sync.Args(env_id=env_id))
    assert "\n" not in str(error.value)


# --- What reaches the run ---------------------------------------------------------------------------------------------


def test_arguments_of_the_environment(workdir, monkeypatch):
    """A JSON object on the command line, plain JSON in args.json; evaluation and resume know them."""
    words = "--env-id toy_envs:Needy-v0 --env-kwargs '{\"size\": 7}' --run-dir run --total-timesteps 60"
    command_line(monkeypatch, *shlex.split(words))
    assert json.loads(Path("run/results.json").read_text())["eval_return_mean"] == 7
    assert json.loads(Path("run/args.json").read_text())["env_kwargs"] == {"size": 7}
    assert resume(total_timesteps=200)["eval_return_mean"] == 7
    command_line(monkeypatch, "--resume", "run", "--env-kwargs", '{"size": 4}')
    assert json.loads(Path("run/results.json").read_text())["eval_return_mean"] == 4


def test_numpys_numbers_and_paths_are_arguments_like_others(workdir):
    """What a sweep passes; args.json and results.json are plain JSON, without the Infinity of other languages."""
    numbers = {"seed": np.int64(3), "gamma": np.float32(0.5), "num_envs": np.int32(2), "actor_lr": np.float64(1e-3)}
    end = short_run(run_dir=Path("run"), total_timesteps=np.int64(60), **numbers)
    saved, printed = (
        json.loads(Path(f"run/{name}.json").read_text(), parse_constant=lambda word: pytest.fail(word))
        for name in ("args", "results")
    )
    assert (saved["seed"], saved["gamma"], saved["num_envs"], saved["run_dir"]) == (3, 0.5, 2, "run")
    assert printed == end and resume(Path("run"), total_timesteps=120)["env_steps"] >= 120


def test_a_package_in_the_working_directory_is_found(workdir):
    """By training, by its environment process, and by the evaluation, whose command works as it was printed."""
    Path("mine.py").write_text("import gymnasium, toy_envs\ngymnasium.register('Mine-v0', toy_envs.Constant)\n")
    words = "--env-id mine:Mine-v0 --total-timesteps 100 --num-envs 1 --vectorization async --eval-episodes 1".split()
    status, out, err = finish(start(ROOT / "a2c_sync.py", *words, cwd=workdir))
    assert status == 0 and "greedy return 10.0" in out and "100%" in err, err
    play = re.search(r"see it play +(python .*)", out)[1] + " --episodes 1"  # from this directory
    evaluation = subprocess.run(play, shell=True, capture_output=True, text=True, env=environment(), cwd=workdir)
    assert "greedy return 10.0" in evaluation.stdout, evaluation.stderr
