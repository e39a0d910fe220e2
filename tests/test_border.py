"""What crosses the border of an environment: it is made plain there, or refused in a sentence that names it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SCRIPTS, command_line, metrics, short_run

import a2c_sync
import off_policy_ac
from common.checkpoint import kept, load_checkpoint, warn
from common.envs import make_envs
from common.flags import UserError


@pytest.fixture(autouse=True)
def not_warned_yet():
    warn.cache_clear()


def process_state():
    return torch.get_default_dtype(), torch.is_grad_enabled(), np.geterr()


@pytest.mark.parametrize("when", ["init", "reset", "first step"])
@pytest.mark.parametrize("what", ["dtype", "grad", "errors", "noise"])
def test_what_an_environment_changes_for_the_whole_process_is_put_back(capsys, what, when):
    """With one warning. The agent's noise neither repeats, nor is it the same for every seed."""
    before, first = process_state(), []
    try:
        for seed in (42, 43):  # 42: the environment's own
            torch.manual_seed(seed)
            kwargs = {"what": what, "when": when}
            envs = make_envs(a2c_sync.Args(env_id="toy_envs:Meddling-v0", env_kwargs=kwargs, num_envs=3))
            assert process_state() == before
            drawn = [torch.rand(1).item()]
            envs.reset(seed=1)
            assert process_state() == before
            for _ in range(12):
                drawn.append(torch.rand(1).item())
                envs.step(np.zeros(3, int))
                assert process_state() == before
            envs.close()
            assert len(set(drawn)) == 13
            first.append(drawn[0])
        assert first[0] != first[1]
    finally:
        torch.set_default_dtype(before[0]), torch.set_grad_enabled(before[1]), np.seterr(**before[2])
    assert capsys.readouterr().err.count("warning: toy_envs:Meddling-v0 uses torch's generator, or changes") == 1


def test_a_module_that_is_imported_for_its_environment_changes_nothing(workdir, monkeypatch):
    """Nor does a constructor that fails afterwards."""
    before, code = process_state(), "import gymnasium as gym, numpy as np, torch\ntorch.manual_seed(0)\n"
    code += "torch.set_default_dtype(torch.float64), np.seterr(all='raise')\n"
    Path("meddling.py").write_text(code + "gym.register('Pole-v0', 'gymnasium.envs.classic_control:CartPoleEnv')")
    monkeypatch.syspath_prepend(workdir)
    drawn = []
    for _ in range(2):  # with the import, and without it
        torch.manual_seed(1)
        make_envs(a2c_sync.Args(env_id="meddling:Pole-v0")).close()
        drawn.append(torch.rand(1).item())
        assert process_state() == before
    torch.manual_seed(1)
    assert drawn == [torch.rand(1).item()] * 2
    with pytest.raises(ZeroDivisionError), kept("it"):
        torch.set_default_dtype(torch.float64) or 1 / 0
    assert process_state() == before


@pytest.mark.parametrize("script", [a2c_sync, off_policy_ac], ids=["a2c_sync", "off_policy_ac"])
@pytest.mark.parametrize("how", ["int64", "uint8", "torch", "paid at a reset"])
def test_a_native_environment_of_other_types_is_learned_from_as_usual(workdir, script, how):
    for each in ("as usual", how):
        short_run(script, env_id="toy_envs:Native-v0", env_kwargs={"how": each}, run_dir=each)
    assert metrics(how) == metrics("as usual")
    returns = {value for _, tag, value in metrics(how) if tag == "charts/episodic_return"}
    assert returns == ({"6.0", "10.0"} if script is a2c_sync else {"6.0"})  # 1 + 2 + 3, and + 4 of the second


@pytest.mark.parametrize("how", ["rewards", "flags", "observations"])
def test_a_native_environment_of_other_shapes_is_refused(workdir, how):
    with pytest.raises(UserError, match=rf"^toy_envs:Native-v0 gives {how} of shape \(.*\), not \(2,.*\)\."):
        short_run(env_id="toy_envs:Native-v0", env_kwargs={"how": how})


REFUSED = {
    "Former": "Former-v0: step() must return obs, reward, terminated, truncated, info.",
    "Shapeless": "Shapeless-v0 gives observations of shape (1, 1), float32, not Box(0.0, 1.0, (1,), float32).",
    "NumEnvs": "toy_envs:NumEnvs-v0 is registered with num_envs, which --num-envs could not change.",
}


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")  # gymnasium's own
def test_what_gymnasium_would_take_for_something_else_is_refused(workdir, name, vectorization):
    env_id = f"toy_envs:{name}-v0"
    with pytest.raises(UserError) as error:
        short_run(env_id=env_id, vectorization=vectorization, env_kwargs={"disable_env_checker": True})
    assert str(error.value).startswith(REFUSED[name])


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.filterwarnings("ignore")  # gymnasium's own
def test_an_environment_that_exits_does_not_end_training_as_if_all_were_well(workdir, monkeypatch, vectorization):
    flags = "--env-id toy_envs:Window-v0 --num-envs 2 --num-steps 5 --checkpoint-every 50 --run-dir run".split()
    with pytest.raises(SystemExit) as end:
        command_line(monkeypatch, *flags, "--vectorization", vectorization)
    steps = load_checkpoint("run", "a2c_sync")["env_steps"]
    assert steps >= 100
    words = rf"error: Window-v0 has called sys.exit\(\) in step\(\).\nGo on from environment step {steps} with\n"
    assert end.match(words + "  python .*a2c_sync.py --resume run$")


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_environment_may_take_gradients(workdir, name):
    box = {"env_id": "toy_envs:Differentiating-v0"} if name != "sac" else {"env_id": "toy_envs:DifferentiatingBox-v0"}
    assert short_run(SCRIPTS[name], **box)["eval_return_mean"] == 5


@pytest.mark.parametrize("wrapper", ["NormObs", "NormReward"])
def test_statistics_in_a_wrapper_are_warned_of_once(workdir, capsys, wrapper):
    short_run(env_id=f"toy_envs:{wrapper}-v0")
    err = capsys.readouterr().err
    assert err.count(f"{wrapper}-v0 has Normalize") == err.count("evaluation lacks; a2c_sync.py --normalize-obs") == 1
    short_run(env_id="toy_envs:Constant-v0", run_dir="other")
    assert "warning" not in capsys.readouterr().err
