"""Environments, statistics of episodes, and the greedy evaluation of a run."""

import json
import os
import re
import sys
import threading
import weakref
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy_envs
from conftest import ROOT, finish, start
from helpers import checkpoint, metrics, resume, same, short_run

import evaluate as evaluate_command
from a2c_sync import ActorCritic, Args
from common.checkpoint import restore_random
from common.envs import Envs, make_envs
from common.evaluate import evaluate
from common.flags import UserError
from evaluate import load_agent, write_video

# --- Environments -----------------------------------------------------------------------------------------------------


def test_environments_see_the_same_numbers_in_whatever_process():
    """A simulator may depend on denormals: toy_envs:Halving ends when its state is 0. They are flushed, else Adam's
    moments of a dead unit would make every step many times as slow."""
    lengths, group = {}, os.getpgrp()
    torch.set_flush_denormal(False)
    for vectorization in ("sync", "async"):
        envs = make_envs(Args(env_id="toy_envs:Halving-v0", vectorization=vectorization), 1)
        envs.reset(seed=0)
        lengths[vectorization] = next(n for n in range(1, 200) if envs.step(np.zeros(1, int))[2][0])
        envs.close()
    assert lengths["sync"] == lengths["async"] and torch.tensor(1e-30) * 1e-10 == 0
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
    end = short_run(env_id="toy_envs:Talkative-v0", vectorization=vectorization, eval_episodes=2)
    assert end["train_return_mean"] == end["eval_return_mean"] == 10
    assert {value for _, tag, value in metrics("run") if tag == "charts/episodic_length"} == {"10"}


@pytest.mark.parametrize("box", [False, True])
def test_an_environment_may_return_the_same_arrays_at_every_step(box):
    """Ours are copies, else all transitions of a rollout or of the replay buffer would be alike."""
    envs = make_envs(Args(env_id=f"toy_envs:Reusing{'Box' * box}-v0", num_envs=3))
    rows = [(envs.reset(seed=0)[0], np.zeros(3), np.zeros(3, bool))]
    rows += [envs.step(np.zeros((3, 1)[: 1 + box], np.float32 if box else int))[:3] for _ in range(50)]
    for (obs, _, ended), (next_obs, rewards, _) in zip(rows, rows[1:]):
        assert (next_obs[:, 1] == np.where(ended, 0, obs[:, 1] + 1)).all() and (rewards == next_obs[:, 1]).all()
        assert (next_obs[:, 0] == obs[:, 0] + ended).all()
    assert sum(ended.sum() for *_, ended in rows) >= 30


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("in_a_step", [True, False])
def test_a_dead_process_of_an_environment_is_a_sentence(victim, in_a_step):
    """And close() waits neither for it nor for the other, which ends, too."""
    envs = make_envs(Args(env_id="toy_envs:Slow-v0", vectorization="async"), 2)
    envs.reset(seed=0)
    processes, closing = envs.unwrapped.processes, threading.Thread(target=envs.close, daemon=True)
    threading.Timer(0.01, processes[victim].kill).start()
    if not in_a_step:
        processes[victim].join()
    with pytest.raises(UserError, match="^A process of an environment has died"):
        for _ in range(100):
            envs.step(np.zeros(2, int))
    closing.start()
    closing.join(60)
    assert envs.unwrapped.closed and not any(process.is_alive() for process in processes)


# --- Normalization ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 4])
def test_normalization_is_saved_and_frozen_in_evaluation(workdir, num_steps):
    """It has seen every observation of the training once, and none of the evaluation."""
    short_run(env_id="Pendulum-v1", normalize_obs=True, num_steps=num_steps, total_timesteps=400, eval_episodes=2)
    before, seen = checkpoint("run")["parts"]["envs"], checkpoint("run")["env_steps"]
    # One of each step, and those of the first reset and of four at checkpoints; gymnasium begins with 1e-4
    assert before["count"].item() == pytest.approx(seen + 2 * 10, abs=20.1) and before["count"] > seen
    agent, args, env_state, _ = load_agent("run")
    envs, raw = make_envs(args, 2, evaluation=True), make_envs(Args(env_id="Pendulum-v1"), 2)
    envs.load_state_dict(env_state)
    for envs_obs, raw_obs in (
        (envs.reset(seed=5)[0], raw.reset(seed=5)[0]),
        (envs.step(np.ones((2, 1)))[0], raw.step(np.ones((2, 1)))[0]),
    ):
        expected = (raw_obs - before["mean"].numpy()) / np.sqrt(before["var"].numpy() + 1e-8)
        np.testing.assert_allclose(envs_obs, expected, rtol=1e-5)
    assert same(envs.state_dict(), before)
    first = evaluate(agent, args, env_state, 3, seed=1)
    assert first == evaluate(agent, args, env_state, 3, seed=1) != evaluate(agent, args, env_state, 3, seed=2)
    assert same(env_state, before)


# --- Evaluation -------------------------------------------------------------------------------------------------------

WRITTEN_OUT = [
    {"env_id": "Pendulum-v1", "normalize_obs": True, "reward_scale": 0.1},
    {"env_id": "Pendulum-v1", "network": "shared", "seed": 2, "num_envs": 3},
    {"env_id": "CartPole-v1", "num_envs": 5},  # whose native vector environment would draw all starts from one seed
]


@pytest.mark.parametrize("flags", WRITTEN_OUT, ids=str)
def test_evaluation_written_out_plainly(workdir, flags):
    """The first episode of each start: greedy actions, true rewards, the frozen statistics of training; whatever seed
    the run had, and however many environments."""
    end = short_run(eval_episodes=7, total_timesteps=600, actor_lr=1e-3, **flags)
    agent, args, state, _ = load_agent("run")
    env, returns, lengths = gym.make(flags["env_id"]), [], []
    for i in range(7):
        obs, _ = env.reset(seed=int(np.random.SeedSequence([0, 2**62, i]).generate_state(1)[0] >> 2))
        rewards, over = [], False
        while not over:
            if flags.get("normalize_obs"):
                obs = ((obs - state["mean"].numpy()) / np.sqrt(state["var"].numpy() + 1e-8)).astype(np.float32)
            with torch.no_grad():
                policy = agent.actor(agent.encoder(torch.as_tensor(obs)))
            is_box = flags["env_id"] == "Pendulum-v1"
            action = 2 * policy.mean.clamp(-1, 1).numpy() if is_box else policy.log_probs.argmax().item()
            obs, reward, terminated, truncated, _ = env.step(action)
            rewards.append(reward)
            over = terminated or truncated
        returns.append(sum(rewards))
        lengths.append(len(rewards))
    found = evaluate(agent, args, state, 7)
    np.testing.assert_allclose(found[0], returns, rtol=1e-3)  # products of other sizes round differently
    assert found[1] == lengths and len(set(returns)) >= 3 and end["eval_episodes"] == 7
    wanted = np.mean(returns), np.std(returns)
    assert (end["eval_return_mean"], end["eval_return_std"]) == pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_there_are_never_more_environments_than_num_envs(workdir, monkeypatch, num_envs):
    """Those of training are closed before those of the evaluation open; and those are closed, too."""
    for name, value in {"alive": 0, "most": 0, "allowed": num_envs}.items():
        monkeypatch.setattr(toy_envs.Single, name, value)
    assert short_run(env_id="toy_envs:Single-v0", num_envs=num_envs, eval_episodes=7)["eval_episodes"] == 7
    assert toy_envs.Single.most == num_envs and toy_envs.Single.alive == 0


def test_evaluation_is_the_same_for_environments_that_draw_from_global_generators(workdir):
    """toy_envs:Dice rewards with what it draws."""
    short_run(env_id="toy_envs:Dice-v0")
    agent, args, env_state, _ = load_agent("run")
    first = evaluate(agent, args, env_state, 3)
    restore_random(checkpoint("run")["random"])
    assert first == evaluate(agent, args, env_state, 3) and len(set(first[0])) == 3


def test_an_evaluation_that_fails_costs_no_training(workdir, monkeypatch):
    """Its environments are closed, there are no results, and --resume evaluates."""
    closed, close, act = [], Envs.close, ActorCritic.act
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Envs, "close", lambda envs: closed.append(envs) or close(envs))
        patch.setattr(ActorCritic, "act", lambda agent, obs, greedy=False: 1 / 0 if greedy else act(agent, obs))
        short_run()
    assert len(set(closed)) == 2 and not Path("run/results.json").exists()
    steps = checkpoint("run")["env_steps"]
    assert resume()["env_steps"] == steps >= 120 and json.loads(Path("run/results.json").read_text())["updates"] > 10


def test_an_episode_without_end_is_given_up_with_a_sentence(workdir, monkeypatch):
    short_run(env_id="toy_envs:Constant-v0")
    agent, args, env_state, _ = load_agent("run")
    assert evaluate(agent, args, env_state, 1, max_steps=10) == ([10.0], [10])
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "run", "--max-steps", "9"])
    sentence = "error: A greedy episode of toy_envs:Constant-v0 does not end within 9 steps."
    with pytest.raises(SystemExit, match=f"^{sentence}$"):
        evaluate_command.main()


# --- evaluate.py ------------------------------------------------------------------------------------------------------


def test_evaluate_command(workdir):
    """From any folder, with any path; the episodes of the evaluation after training unless a seed is given."""
    end = short_run(run_dir="a run", env_id="Pendulum-v1", eval_episodes=3)
    sentence = (
        f"greedy return {end['eval_return_mean']:.1f} ± {end['eval_return_std']:.1f} over 3 episodes of Pendulum-v1"
    )
    before = {path: path.read_bytes() for path in Path("a run").iterdir()}
    script = ROOT / "evaluate.py"
    for cwd, words in ((workdir, ["a run"]), (ROOT, [workdir / "a run", "--seed", "0"])):
        status, out, err = finish(start(script, *words, "--episodes", "3", cwd=cwd))
        assert status == 0 and sentence in out and f"trained for {end['env_steps']} environment steps" in out, err
        assert err == ""
    status, out, err = finish(start(script, "a run", "--episodes", "3", "--seed", "2", cwd=workdir))
    assert status == 0 and "greedy return" in out and sentence not in out
    assert {path: path.read_bytes() for path in Path("a run").iterdir()} == before


@pytest.mark.parametrize("precision, wanted", [("medium", "medium"), ("auto", "highest")])
def test_evaluate_computes_as_the_run_did(workdir, monkeypatch, precision, wanted):
    short_run(env_id="toy_envs:Constant-v0", num_threads=2, matmul_precision=precision)
    monkeypatch.setattr("pathlib.Path.exists", lambda path: False)  # /proc/cpuinfo
    found, before = [], torch.get_float32_matmul_precision()

    def spy(*_):
        found.append((torch.get_num_threads(), torch.get_float32_matmul_precision()))
        return [0.0], [1]

    monkeypatch.setattr(evaluate_command, "evaluate", spy)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "run"])
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(SystemExit):
            evaluate_command.main()
    finally:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision(before)
    assert found == [(2, wanted)]


CANNOT = {
    ".": "'.' is no run folder: its args.json is missing or damaged.",
    "nowhere": "'nowhere' is no run folder",
    ". --episodes 0": "--episodes must lie in [1, inf)",
    ". --seed -1": "--seed must lie in [0, 4294967295]",
}


@pytest.mark.parametrize("words", CANNOT)
def test_what_evaluate_cannot_do_it_says_in_one_sentence(workdir, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words.split()])
    with pytest.raises(SystemExit) as end:
        evaluate_command.main()
    assert end.value.code.startswith(f"error: {CANNOT[words]}") and "\n" not in end.value.code


VIDEOS = {"good": None, "raises": "RuntimeError: no display", "none": "No video", "grey": r"\(32, 48\)",
          "sizes": "of one size, not"}  # fmt: skip


@pytest.mark.parametrize("kind, words", VIDEOS.items())
def test_a_video_that_fails_is_one_sentence_beside_the_numbers(workdir, monkeypatch, capsys, kind, words):
    short_run(env_id="toy_envs:Frames-v0", env_kwargs={"kind": kind})
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "run", "--video", "--episodes", "2"])
    with pytest.raises(SystemExit) as end:
        evaluate_command.main()
    assert "greedy return 10.0 ± 0.0 over 2 episodes" in capsys.readouterr().out
    assert not Path("run/video.tmp.mp4").exists()
    if words is None:
        assert end.value.code is None and Path("run/video.mp4").stat().st_size > 500
    else:
        assert re.search(words, end.value.code) and "\n" not in end.value.code and not Path("run/video.mp4").exists()


def test_frames_are_written_as_they_come(workdir, monkeypatch):
    """Two in memory at most, however long the episode."""
    short_run(env_id="toy_envs:Frames-v0")
    original, alive = evaluate_command.frame, []

    def frame(envs, obs):
        picture = original(envs, obs)
        alive.append(weakref.ref(picture))
        assert sum(each() is not None for each in alive) <= 2
        return picture

    monkeypatch.setattr(evaluate_command, "frame", frame)
    write_video(*load_agent("run")[:3], Path("run"))
    assert len(alive) == 10
