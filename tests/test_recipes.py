"""Every recipe of docs/recipes.md as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

pytestmark = pytest.mark.slow  # pip install -e ".[test,recipes]"
PAGE = (ROOT / "docs" / "recipes.md").read_text()
RECIPES = {
    title: re.findall(r"```(?:python|sh)\n(.*?)```", text, re.DOTALL)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}


def recipe(beginning):
    ((code,),) = (blocks for title, blocks in RECIPES.items() if title.startswith(beginning))
    return code


def call(words, folder, **options):
    env = environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder like the repository's, with a run of 4,000 steps in runs/mine."""
    folder = tmp_path_factory.mktemp("recipes")
    for path in [*ROOT.glob("*.py"), ROOT / "common", ROOT / "experiments"]:
        (folder / path.name).symlink_to(path)
    flags = ["--total-timesteps", "4000", "--normalize-obs", "--run-dir", "runs/mine", "--eval-episodes", "1"]
    call([sys.executable, "a2c_sync.py", *flags], folder)
    return folder


def test_recipes_are_short():
    assert len(RECIPES) == 11
    for title, blocks in RECIPES.items():
        for block in blocks:
            assert len([line for line in block.splitlines() if line.strip()]) <= 11, title


def test_act_with_a_trained_agent(folder):
    printed = call([sys.executable, "-c", recipe("Act")], folder)
    lengths = [int(length) for length in re.findall(r"an episode of (\d+) steps", printed)]
    assert 500 < sum(lengths) + len(lengths) <= 1000


@pytest.mark.parametrize(
    "beginning, module, names, flags",
    [
        ("Dict", "others", ("Timed", "Gentle"), []),
        ("An environment of images", "races", ("Racing",), ["--num-envs", "2"]),
    ],
)
def test_other_environments(folder, beginning, module, names, flags):
    (folder / f"{module}.py").write_text(recipe(beginning))
    for name in names:
        more = ["--env-id", f"{module}:{name}-v0", "--total-timesteps", "500", "--eval-episodes", "1"]
        call([sys.executable, "a2c_sync.py", *more, *flags, "--run-dir", f"runs/{name}"], folder)


def test_a_curve_with_pandas(folder):
    call([sys.executable, "-c", recipe("A curve")], folder, timeout=300)
    assert (folder / "curve.png").stat().st_size > 5000


def test_weights_and_biases_get_the_losses(folder):
    code = recipe("Weights &").replace("sync_tensorboard", 'mode="offline", sync_tensorboard')
    call([sys.executable, "-c", code], folder)
    assert any(b"losses/actor_loss" in path.read_bytes() for path in folder.glob("wandb/*/*.wandb"))


def test_the_weights_are_the_actors(folder):
    code = (
        recipe("The weights")
        + "obs = torch.randn(3, 4)\nprint(torch.equal(mine(obs).log_softmax(-1), agent.actor(obs).log_probs))"
    )
    assert call([sys.executable, "-c", code], folder).strip() == "True"


def test_own_environment_with_wrappers(folder):
    (folder / "lakes.py").write_text(recipe("Your own"))
    for name in ("Lake", "Pole"):
        flags = ["--env-id", f"lakes:{name}-v0", "--total-timesteps", "2000", "--eval-episodes", "1"]
        call([sys.executable, "a2c_sync.py", *flags, "--run-dir", f"runs/{name}"], folder)
        assert (folder / "runs" / name / "results.json").exists()


def test_discrete_actions_off_policy(folder):
    command = recipe("Discrete").replace("30000", "700") + " --learning-starts 600 --eval-episodes 1"
    call(command.replace("\n", " "), folder, shell=True)


def test_several_seeds(folder):
    call(recipe("Several").replace("50000", "4000 --eval-episodes 1"), folder, shell=True)
    assert {path.name for path in (folder / "runs" / "seeds").iterdir()} == {"1", "2", "3", "4", "5"}
    assert (folder / "seeds.png").stat().st_size > 5000


def test_sweep(folder):
    assert "'actor_lr'" in call([sys.executable, "-c", recipe("A sweep")], folder)


def test_onnx(folder):
    import numpy as np
    import onnxruntime
    import torch

    from evaluate import load_agent

    call([sys.executable, "-c", recipe("The policy")], folder)
    session = onnxruntime.InferenceSession(str(Path(folder) / "policy.onnx"))
    before = os.getcwd()
    os.chdir(folder)
    try:
        agent, *_ = load_agent("runs/mine")
    finally:
        os.chdir(before)
    for obs in np.random.default_rng(0).normal(size=(20, 1, 4)).astype(np.float32):
        (actions,) = session.run(None, {"obs": obs})
        assert actions.tolist() == agent.act(torch.as_tensor(obs), greedy=True).tolist()


def test_the_notebook_runs_and_draws_its_curve():
    import nbclient
    import nbformat

    notebook = nbformat.read(ROOT / "examples" / "plain_loop.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any(float(output["text"].split()[-1]) >= 200 for output in outputs if output.output_type == "stream")
