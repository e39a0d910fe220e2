"""The real simulators, through make_envs: Atari's C++ vector environment and MuJoCo. And the video."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import checkpoint

from a2c_sync import Args, train
from common.envs import make_envs
from common.evaluate import load_agent, write_video

PONG = {"env_id": "ALE/Pong-v5", "num_envs": 4, "network": "shared"}


def test_atari_is_the_cpp_vector_environment():
    envs = make_envs(Args(**PONG))
    assert type(envs.unwrapped).__name__ == "AtariVectorEnv"
    obs, _ = envs.reset(seed=1)
    assert obs.shape == (4, 4, 84, 84) and obs.dtype == np.uint8
    envs.close()


def play(envs, seed, steps):
    obs, _ = envs.reset(seed=seed)
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(steps):
        obs, rewards, terminated, truncated, infos = envs.step(rng.integers(0, 6, 4))
        rows.append((obs.copy(), rewards, terminated | truncated, infos))
    return rows


def test_atari_keeps_the_contract_of_next_step():
    """Same seed, same play; environments differ; the step after an end has reward 0, and no second end."""
    envs = make_envs(Args(**PONG))
    first, again = play(envs, 1, 1100), play(envs, 1, 1100)
    assert all((a[0] == b[0]).all() and (a[1] == b[1]).all() for a, b in zip(first, again))
    assert any((row[0][0] != row[0][1]).any() for row in first)
    ends = [(t, n) for t, row in enumerate(first[:-1]) for n in np.flatnonzero(row[2])]
    assert ends
    for t, n in ends:
        _, rewards, done, _ = first[t + 1]
        assert rewards[n] == 0 and not done[n]
        # Between two ends lie the episode's rewards: Pong ends at 21 points, so a random player's return is about -20
        assert -21 <= first[t][3]["episode"]["r"][n] <= -15
    envs.close()


def test_atari_rewards_are_clipped_for_learning_and_true_in_the_statistics(monkeypatch):
    training, evaluation = (make_envs(Args(**PONG), evaluation=evaluation) for evaluation in (False, True))
    for envs, expected in ((training, [1, -1, 1, 0]), (evaluation, [7, -3, 1, 0])):
        obs, _ = envs.reset(seed=0)
        raw = obs, np.array([7, -3, 1, 0], np.int32), np.ones(4, bool), np.zeros(4, bool), {}
        monkeypatch.setattr(envs.unwrapped, "step", lambda actions: raw[:4] + ({},))
        _, rewards, *_, infos = envs.step(np.zeros(4, int))
        assert rewards.tolist() == expected and infos["episode"]["r"].tolist() == [7, -3, 1, 0]
        envs.close()


@pytest.mark.parametrize("network", ["separate", "shared"])
def test_pixels_train_and_resume_bit_identically(workdir, monkeypatch, network):
    """Uninterrupted against stopped at its first checkpoint; the convolution's memory layout survives, too."""
    flags = PONG | {"network": network, "num_steps": 4, "num_envs": 2, "checkpoint_every": 64, "eval_episodes": 1}
    import a2c_sync

    # A game of Pong takes longer than this test should
    monkeypatch.setattr("common.run.evaluate", lambda *_: ([0.0], [1]))
    train(Args(run_dir="whole", total_timesteps=200, lr_decay=False, **flags))
    train(Args(run_dir="parts", total_timesteps=128, lr_decay=False, **flags))
    # Back to a checkpoint in the middle: that of 128 steps, reset as the uninterrupted run was
    train(Args(resume="parts", total_timesteps=200))
    a, b = checkpoint("whole")["parts"]["agent"], checkpoint("parts")["parts"]["agent"]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a2c_sync.NatureCNN((4, 84, 84)).net[0][0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("normalize_obs", [False, True])
def test_mujoco_trains(workdir, normalize_obs):
    """Its float64 observations included."""
    flags = {"total_timesteps": 2_000, "normalize_obs": normalize_obs, "eval_episodes": 2}
    end = train(Args(run_dir="run", env_id="InvertedPendulum-v5", **flags))
    assert end["eval_return_mean"] > 0


@pytest.mark.parametrize("env_id", ["CartPole-v1", "InvertedPendulum-v5", "ALE/Pong-v5"])
def test_video(workdir, env_id, monkeypatch):
    flags = {"network": "shared", "num_steps": 2, "num_envs": 2} if env_id.startswith("ALE") else {}
    monkeypatch.setattr("common.run.evaluate", lambda *_: ([0.0], [1]))
    if env_id != "CartPole-v1":
        monkeypatch.setenv("MUJOCO_GL", "egl")
    train(Args(run_dir="run", env_id=env_id, total_timesteps=50, **flags))
    write_video(*load_agent("run")[:3], Path("run"), seed=0)
    assert Path("run/video.mp4").stat().st_size > 1000
