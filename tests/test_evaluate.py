"""Environments, statistics of episodes, and the greedy evaluation of a run."""

import math
import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, finish, start
from helpers import checkpoint, metrics, same

import evaluate as evaluate_command
from a2c_sync import Args, make_agent, train
from common.checkpoint import env_seed
from common.envs import Envs, make_envs
from common.evaluate import evaluate
from evaluate import load_agent

NORMALIZED = {"env_id": "Pendulum-v1", "normalize_obs": True, "total_timesteps": 2_000, "num_envs": 4}


# --- Environments -----------------------------------------------------------------------------------------------------


def test_denormals_are_flushed(workdir):
    """Adam's moments of a dead unit shrink for ever; as denormals they would make every step many times as slow."""
    torch.set_flush_denormal(False)
    assert torch.tensor(1e-30) * 1e-10 > 0
    make_envs(Args()).close()
    assert torch.tensor(1e-30) * 1e-10 == 0


def test_environments_see_the_same_numbers_in_whatever_process():
    """A simulator may depend on denormals: toy_envs:Halving ends when its state is 0."""
    lengths, group = {}, os.getpgrp()
    for vectorization in ("sync", "async"):
        envs = make_envs(Args(env_id="toy_envs:Halving-v0", vectorization=vectorization), 1)
        envs.reset(seed=0)
        lengths[vectorization] = next(n for n in range(1, 200) if envs.step(np.zeros(1, int))[2][0])
        envs.close()
    assert lengths["sync"] == lengths["async"]
    assert os.getpgrp() == group  # only the processes of environments leave that of the terminal


def test_episode_statistics_are_gymnasiums():
    ours = make_envs(Args(env_id="toy_envs:Counting-v0", num_envs=5))
    theirs = gym.wrappers.vector.RecordEpisodeStatistics(
        gym.make_vec("toy_envs:Counting-v0", num_envs=5, vectorization_mode="sync")
    )
    found, expected = [], []
    for seed in (1, 2):  # a second reset, in the middle of episodes, forgets them
        ours.reset(seed=seed)
        theirs.reset(seed=seed)
        for t in range(50):
            found += [(t, *episode) for episode in ours.step(np.zeros(5, int))[4]]
            infos = theirs.step(np.zeros(5, int))[4]
            for i in np.flatnonzero(infos.get("_episode", [])):
                expected.append((t, i, infos["episode"]["r"][i], infos["episode"]["l"][i]))
    assert found == expected and len(found) > 80


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_infos_of_environments_need_not_fit_together(workdir, vectorization):
    """Nobody reads them; an "episode" among them is none of ours."""
    flags = {"vectorization": vectorization, "num_envs": 2, "total_timesteps": 200, "eval_episodes": 2}
    end = train(Args(run_dir="run", env_id="toy_envs:Talkative-v0", **flags))
    assert end["train_return_mean"] == end["eval_return_mean"] == 10
    assert {value for _, tag, value in metrics("run") if tag == "charts/episodic_length"} == {"10"}


# --- Normalization ----------------------------------------------------------------------------------------------------


def test_normalization_is_saved_and_frozen_in_evaluation(workdir):
    train(Args(run_dir="run", eval_episodes=2, **NORMALIZED))
    before = checkpoint("run")["parts"]["envs"]
    agent, args, env_state, _ = load_agent("run")
    envs = make_envs(args, 2, evaluation=True)
    envs.load_state_dict(env_state)
    raw = make_envs(Args(env_id="Pendulum-v1"), 2)
    obs, raw_obs = envs.reset(seed=5)[0], raw.reset(seed=5)[0]
    expected = (raw_obs - before["mean"].numpy()) / np.sqrt(before["var"].numpy() + 1e-8)
    np.testing.assert_allclose(obs, expected, rtol=1e-5)
    assert before["count"] > 2_000 and same(envs.state_dict(), before)
    first = evaluate(agent, args, env_state, 3, seed=1)
    assert first == evaluate(agent, args, env_state, 3, seed=1) != evaluate(agent, args, env_state, 3, seed=2)
    assert same(checkpoint("run")["parts"]["envs"], before)


def test_environments_are_closed_when_an_evaluation_fails(monkeypatch):
    closed, args = [], Args()
    envs = make_envs(args, 1)
    monkeypatch.setattr(Envs, "close", lambda *_: closed.append(True))

    def fail(*_):
        raise OSError

    with pytest.raises(OSError):
        evaluate(make_agent(envs, args), args, envs.state_dict(), 1, on_step=fail)
    assert closed == [True]


def test_restored_statistics_go_on_bit_identically():
    """Their count is no whole number: gymnasium begins at 1e-4."""
    envs, again = (make_envs(Args(env_id="Pendulum-v1", normalize_obs=True), 2) for _ in range(2))
    actions = np.random.default_rng(0).uniform(-1, 1, (300, 2, 1)).astype(np.float32)
    envs.reset(seed=1)
    for action in actions:
        envs.step(action)
    again.load_state_dict(envs.state_dict())
    mine, its = (vars(e.env.obs_rms) for e in (envs, again))
    # As Python's floats: NumPy compares one of them to a float32 with as few digits as that has
    assert float(mine["count"]) == float(its["count"]) and mine["count"] % 1 > 0
    assert all((mine[name] == its[name]).all() for name in ("mean", "var"))
    first, second = envs.reset(seed=2)[0], again.reset(seed=2)[0]
    for action in actions:
        assert (first == second).all()
        first, second = envs.step(action)[0], again.step(action)[0]


def test_what_evaluation_builds(workdir, monkeypatch):
    """True rewards, frozen statistics, those of training; and a seed that no reset in training has."""
    import common.evaluate as module

    built, seeds = [], []

    def spy(args, num_envs=None, evaluation=False, **options):
        envs = make_envs(args, num_envs, evaluation, **options)
        reset = envs.reset
        envs.reset = lambda seed: seeds.append(seed) or reset(seed=seed)
        built.append((envs, evaluation))
        return envs

    monkeypatch.setattr(module, "make_envs", spy)
    train(Args(run_dir="run", eval_episodes=2, **NORMALIZED))
    (envs, evaluation), state = built[-1], checkpoint("run")["parts"]["envs"]
    assert evaluation and same(envs.state_dict(), state)
    training = [env_seed(1, steps) for steps in range(0, 10_000, 10)]
    assert len(set(training)) == len(training) and len(seeds) == 1 and not set(seeds[0]) & set(training)


# --- Evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_counts_a_fixed_number_of_episodes_of_every_environment(workdir):
    """Those that end first must not be short ones. Lengths 1 to 5: 3 on average."""
    train(Args(run_dir="run", env_id="toy_envs:Counting-v0", total_timesteps=50, eval_episodes=1))
    agent, args, env_state, _ = load_agent("run")
    returns, lengths = evaluate(agent, args, env_state, 3_000, seed=1)
    assert len(returns) == len(lengths) == 3_000
    assert np.mean(lengths) == pytest.approx(3, abs=0.1)
    assert returns == [n * (n + 1) / 2 for n in lengths]


@pytest.mark.parametrize("episodes", [1, 5, 40])
def test_every_round_counts_the_first_episode_of_each_environment(workdir, monkeypatch, episodes):
    """In the order of the episodes' seeds; an environment that has ended is stepped on, but plays for nothing."""
    import common.evaluate as module

    rounds, built = [], []

    def spy(*args, **options):
        envs = make_envs(*args, **options)
        step, reset = envs.step, envs.reset

        def begin(seed):
            rounds.append({})
            return reset(seed=seed)

        def remember(actions):
            *rest, ended = step(actions)
            for i, episodic_return, length in ended:
                rounds[-1].setdefault(i, (episodic_return, length))
            return *rest, ended

        envs.step, envs.reset = remember, begin
        built.append(envs)
        return envs

    train(Args(run_dir="run", env_id="toy_envs:Counting-v0", total_timesteps=50, eval_episodes=1))
    agent, args, env_state, _ = load_agent("run")
    monkeypatch.setattr(module, "make_envs", spy)
    returns, lengths = evaluate(agent, args, env_state, episodes)
    num_envs = built[0].num_envs
    assert num_envs == min(episodes, 16) and len(rounds) == math.ceil(episodes / num_envs)
    expected = [rounds[k // num_envs][k % num_envs] for k in range(episodes)]
    assert list(zip(returns, lengths)) == expected


def test_evaluate_command(workdir):
    """From any folder, with any path; the episodes of the evaluation after training unless a seed is given."""
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 100, "num_envs": 2, "eval_episodes": 3}
    end = train(Args(run_dir="a run", **flags))
    sentence = (
        f"greedy return {end['eval_return_mean']:.1f} ± {end['eval_return_std']:.1f} over 3 episodes of Pendulum-v1"
    )
    before = {path: path.read_bytes() for path in Path("a run").iterdir()}
    script = ROOT / "evaluate.py"
    for cwd, words in ((workdir, ["a run"]), (ROOT, [workdir / "a run"]), (ROOT, [workdir / "a run", "--seed", "0"])):
        status, out, err = finish(start(script, *words, "--episodes", "3", cwd=cwd))
        assert status == 0 and sentence in out and f"trained for {end['env_steps']} environment steps" in out, err
    status, out, err = finish(start(script, "a run", "--episodes", "3", "--seed", "2", cwd=workdir))
    assert status == 0 and "greedy return" in out and sentence not in out
    assert {path: path.read_bytes() for path in Path("a run").iterdir()} == before


def test_evaluate_computes_as_the_run_did(workdir, monkeypatch):
    flags = {"env_id": "toy_envs:Counting-v0", "total_timesteps": 50, "eval_episodes": 1}
    train(Args(run_dir="run", num_threads=2, matmul_precision="medium", **flags))
    found = []

    def spy(*_):
        found.append((torch.get_num_threads(), *get_precision()))
        return [0.0], [1]

    monkeypatch.setattr(evaluate_command, "evaluate", spy)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "run"])
    with pytest.raises(SystemExit):
        isolated(lambda _: evaluate_command.main())(Args())
    assert found == [(2, "medium", "bf16")]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["."], "no args.json"),
        (["nowhere"], "'nowhere' is no run folder"),
        ([".", "--episodes", "0"], "--episodes must lie in [1, inf)"),
        ([".", "--seed", "-1"], "--seed must lie in [0, 4294967295]"),
    ],
    ids=str,
)
def test_what_evaluate_cannot_do_it_says_in_one_sentence(workdir, words, sentence):
    status, out, err = finish(start(ROOT / "evaluate.py", *words, cwd=workdir))
    assert status == 1 and err.startswith("error: ") and sentence in err and err.count("\n") == 1
