"""The real simulators, through make_envs: Atari's C++ vector environment and MuJoCo. And the video."""

import dataclasses
import os
import re
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from helpers import checkpoint

import a2c_sync
import evaluate
from a2c_sync import Args, train
from common.envs import make_envs
from common.flags import UserError
from evaluate import frame, load_agent, load_args, write_video

PONG = {"env_id": "ALE/Pong-v5", "num_envs": 4, "network": "shared"}


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_atari_is_the_cpp_vector_environment(vectorization):
    envs = make_envs(Args(**PONG, vectorization=vectorization))
    assert type(envs.unwrapped).__name__ == "AtariVectorEnv"
    obs, _ = envs.reset(seed=1)
    assert obs.shape == (4, 4, 84, 84) and obs.dtype == np.uint8
    envs.close()


def play(envs, seed, steps):
    obs, _ = envs.reset(seed=seed)
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(steps):
        obs, rewards, terminated, truncated, episodes = envs.step(rng.integers(0, 6, 4))
        rows.append((obs.copy(), rewards, terminated | truncated, episodes))
    return rows


def test_atari_keeps_the_contract_of_next_step():
    """Same seed, same play; environments differ; the step after an end has reward 0, and no second end."""
    envs = make_envs(Args(**PONG))
    again, first = play(envs, 1, 150), play(envs, 1, 1100)
    assert all((a[0] == b[0]).all() and (a[1] == b[1]).all() for a, b in zip(first, again))
    assert any((row[0][0] != row[0][1]).any() for row in first)
    ends = [(t, n) for t, row in enumerate(first[:-1]) for n in np.flatnonzero(row[2])]
    assert ends == [(t, n) for t, row in enumerate(first[:-1]) for n, _, _ in row[3]] and ends
    for t, n in ends:
        _, rewards, done, _ = first[t + 1]
        assert rewards[n] == 0 and not done[n]
        # Pong ends at 21 points, so a random player's return is about -20
        (episode,) = (episode for episode in first[t][3] if episode[0] == n)
        assert -21 <= episode[1] <= -15
        if (t, n) == next(end for end in ends if end[1] == n):
            assert episode[1] == sum(row[1][n] for row in first[: t + 1]) and episode[2] == t + 1
    envs.close()


def test_atari_rewards_are_clipped_for_learning_and_true_in_the_statistics(monkeypatch):
    training, evaluation = (make_envs(Args(**PONG), evaluation=evaluation) for evaluation in (False, True))
    for envs, expected in ((training, [1, -1, 1, 0]), (evaluation, [7, -3, 1, 0])):
        obs, _ = envs.reset(seed=0)
        raw = obs, np.array([7, -3, 1, 0], np.int32), np.ones(4, bool), np.zeros(4, bool), {}
        monkeypatch.setattr(envs.unwrapped, "step", lambda actions: raw)
        _, rewards, *_, episodes = envs.step(np.zeros(4, int))
        assert rewards.tolist() == expected
        assert episodes == [(0, 7.0, 1), (1, -3.0, 1), (2, 1.0, 1), (3, 0.0, 1)]
        envs.close()


def test_scaled_rewards_are_for_learning_only():
    args = Args(env_id="Acrobot-v1", num_envs=2, reward_scale=0.25)
    training, evaluation = (make_envs(args, evaluation=evaluation) for evaluation in (False, True))
    for envs, expected in ((training, -0.25), (evaluation, -1.0)):
        envs.reset(seed=0)
        steps = [envs.step(np.array([0, 2])) for _ in range(500)]  # its time limit
        assert all(rewards.tolist() == [expected] * 2 for _, rewards, *_ in steps)
        assert [(episodic_return, length) for _, episodic_return, length in steps[-1][4]] == [(-500.0, 500)] * 2
        envs.close()


@pytest.mark.parametrize(
    "env_id, today",
    [
        ("PongNoFrameskip-v4", "ALE/Pong-v5"),
        ("BreakoutDeterministic-v4", "ALE/Breakout-v5"),
        ("Pong-v4", "ALE/Pong-v5"),
        ("Pong-v5", "ALE/Pong-v5"),
        ("HalfCheetah-v2", "HalfCheetah-v5"),
        ("Walker2d-v3", "Walker2d-v5"),
        ("MyEnv-v0", None),
        ("CartPole-v7", None),
    ],
)
def test_ids_of_former_days_have_a_hint(env_id, today):
    """And gymnasium's own words stand before it; ids that nobody knows get no made-up hint."""
    with pytest.raises(UserError) as refused:
        make_envs(Args(env_id=env_id))
    hints = re.findall(r"Did you mean ([\w/-]+)\?", str(refused.value))
    assert hints == [today] * (today is not None) and env_id in str(refused.value)


@pytest.mark.parametrize("network", [pytest.param("separate", marks=pytest.mark.slow), "shared"])
def test_pixels_train_and_resume_bit_identically(workdir, monkeypatch, network):
    """Uninterrupted against stopped at its first checkpoint; the convolution's memory layout survives, too."""
    flags = PONG | {"network": network, "num_steps": 4, "num_envs": 2, "checkpoint_every": 32, "lr_decay": False}
    # A game of Pong takes longer than this test should
    monkeypatch.setattr("common.run.evaluate", lambda *_, **__: ([0.0], [1]))
    train(Args(run_dir="whole", total_timesteps=80, **flags))
    train(Args(run_dir="parts", total_timesteps=64, **flags))
    # Back to a checkpoint in the middle: that of 64 steps, reset as the uninterrupted run was
    train(dataclasses.replace(load_args("parts"), total_timesteps=80))
    a, b = checkpoint("whole")["parts"]["agent"], checkpoint("parts")["parts"]["agent"]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a2c_sync.NatureCNN(4, 84, 84).net[0][0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("normalize_obs", [False, True])
def test_mujoco_trains(workdir, normalize_obs):
    """Its float64 observations included."""
    flags = {"total_timesteps": 2_000, "normalize_obs": normalize_obs, "eval_episodes": 2}
    end = train(Args(run_dir="run", env_id="InvertedPendulum-v5", **flags))
    assert end["eval_return_mean"] > 0


# --- The video --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["CartPole-v1", "InvertedPendulum-v5"])
def test_video(workdir, env_id, monkeypatch, capsys):
    """It shows one episode, that of the given seed."""
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    train(Args(run_dir="run", env_id=env_id, total_timesteps=50, eval_episodes=1))
    agent, args, env_state, _ = load_agent("run")
    write_video(agent, args, env_state, Path("run"), seed=0)
    _, lengths = evaluate.evaluate(agent, args, env_state, 1, seed=0)
    assert f"video of one episode, {lengths[0]} frames: run/video.mp4" in capsys.readouterr().out
    frames, _ = imageio_ffmpeg.count_frames_and_secs("run/video.mp4")
    reader = imageio_ffmpeg.read_frames("run/video.mp4")
    next(reader)  # what the file says of itself
    assert frames == lengths[0] and len(set(next(reader))) > 1
    reader.close()


def test_video_of_atari_is_what_the_agent_sees(workdir, monkeypatch):
    """Enlarged: the C++ environment has no pictures of its own. Of the first steps, a whole game takes long."""
    seen = []

    def beginning(agent, args, env_state, episodes, seed, max_steps, on_step, render):
        envs = make_envs(args, 1, evaluation=True, render=render)
        obs, _ = envs.reset(seed=seed)
        for _ in range(10):
            on_step(envs, obs)
            seen.append(frame(envs, obs))
            obs = envs.step(agent.act(torch.as_tensor(obs)).numpy())[0]
        assert seen[-1].shape == (336, 336, 3) and seen[-1].dtype == np.uint8
        assert (seen[0][::4, ::4, 0] == seen[0][3::4, 3::4, 2]).all() and len(np.unique(seen[0])) > 2
        envs.close()

    monkeypatch.setattr("common.run.evaluate", lambda *_, **__: ([0.0], [1]))
    train(Args(run_dir="run", total_timesteps=16, **PONG | {"num_steps": 2, "num_envs": 2}))
    monkeypatch.setattr(evaluate, "evaluate", beginning)
    write_video(*load_agent("run")[:3], Path("run"), seed=0)
    assert Path("run/video.mp4").stat().st_size > 1000 and len(seen) == 10


def test_what_does_not_render_has_no_video(workdir):
    train(Args(run_dir="run", env_id="toy_envs:Constant-v0", total_timesteps=50, num_envs=2, eval_episodes=1))
    with pytest.raises(UserError, match="No video of toy_envs:Constant-v0"):
        write_video(*load_agent("run")[:3], Path("run"), seed=0)
    assert not Path("run/video.mp4").exists()
