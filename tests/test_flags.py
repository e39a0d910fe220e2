"""Bad input ends in one sentence and an exit status that is not 0, before anything is written."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment, finish, start

import a2c_sync
import off_policy_ac
import sac
from a2c_sync import Args, train
from common.envs import make_envs
from common.flags import UserError
from common.run import run_cli

BAD = {
    "--env-id CartPol-v1": "Did you mean: `CartPole`",
    "--env-id CartPole-v7": "CartPole",
    "--env-id Nothing/Like-this-v0": "Nothing",
    "--env-id no_such_package:Env-v0": "there is no package 'no_such_package' to import",
    "--env-id toy_envs:NoSuchName-v0": "doesn't exist",
    "--env-id toy_envs:Constnt-v0": "Did you mean: `Constant`",
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
    "--actor-lr 0": "--actor-lr must lie in (0, inf)",
    "--actor-lr inf": "--actor-lr",
    "--critic-lr -1": "--critic-lr",
    "--max-grad-norm 0": "--max-grad-norm must lie in (0, inf)",
    "--ent-coef -1": "--ent-coef must lie in [0, inf)",
    "--seed -1": "--seed",
    "--seed 18446744073709551616": "--seed",
    "--run-dir full/file/sub": "cannot be used: Not a directory",
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
    "--env-id toy_envs:Images-v0": "for images use a2c_sync.py or a3c_async.py",
}
BAD_SAC = {
    "--env-id CartPole-v1": "use off_policy_ac.py",
    "--env-id toy_envs:ImagesBox-v0": "for images use a2c_sync.py or a3c_async.py",
    "--alpha 0": "auto or lie in (0, inf)",
    "--alpha -1": "auto or lie in (0, inf)",
    "--alpha nan": "auto or lie in (0, inf)",
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


@pytest.mark.parametrize("words", ["--no-such-flag 1", "--gamma abc", "--network both", "--num-envs 1.5", "--resume"])
def test_words_that_do_not_parse(workdir, monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["a2c_sync.py", *words.split()])
    with pytest.raises(SystemExit) as exit:
        run_cli(train, Args)
    assert exit.value.code not in (0, None) and list(Path(".").iterdir()) == []


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"network": "both"}, "--network must be one of separate, shared, got 'both'."),
        ({"optimizer": "sgd"}, "must be one of"),
        ({"vectorization": "x"}, "must be one of"),
        ({"device": "gpu"}, "must be one of"),
        ({"num_envs": 2.5}, r"--num-envs must lie in \[1, inf\), got 2.5"),
        ({"num_envs": True}, "--num-envs"),
        ({"gamma": "0.9"}, "--gamma"),
        ({"lr_decay": 1}, "--lr-decay must be bool"),
        ({"env_id": 3}, "--env-id must be str"),
    ],
    ids=str,
)
def test_choices_and_types_are_checked_in_python_too(workdir, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        train(Args(**flags))
    assert list(Path(".").iterdir()) == []


def test_bad_input_as_a_process(workdir):
    """What the shell sees: exit status, one line, no traceback, no folder."""
    status, out, err = finish(start(ROOT / "a2c_sync.py", "--env-id", "CartPol-v1", cwd=workdir))
    assert status == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert list(Path(".").iterdir()) == []


@pytest.mark.parametrize("module, env_id, extra", [("ale_py", "ALE/Pong-v5", "atari"), ("mujoco", "Ant-v5", "mujoco")])
def test_a_missing_extra_names_the_install_line(workdir, monkeypatch, module, env_id, extra):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=rf'pip install .*"?.*\[{extra}\]"') as error:
        make_envs(Args(env_id=env_id))
    assert "\n" not in str(error.value)


def test_a_package_in_the_working_directory_is_found(workdir):
    """By training, by its environment process, and by the evaluation, whose command works as it was printed."""
    Path("mine.py").write_text("import gymnasium, toy_envs\ngymnasium.register('Mine-v0', toy_envs.Constant)\n")
    words = "--env-id mine:Mine-v0 --total-timesteps 100 --num-envs 1 --vectorization async --eval-episodes 1".split()
    status, out, err = finish(start(ROOT / "a2c_sync.py", *words, cwd=workdir))
    assert status == 0 and "greedy return 10.0" in out and "100%" in err, err
    play = re.search(r"see it play +(.*) --video", out).group(1)  # from this directory
    assert shlex.split(play)[0] == "python"
    command = play + " --episodes 1"
    evaluation = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment(), cwd=workdir)
    assert "greedy return 10.0" in evaluation.stdout, evaluation.stderr
