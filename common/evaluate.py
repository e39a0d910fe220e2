"""Greedy evaluation of a run:  python -m common.evaluate RUN_DIR [--episodes N] [--video]"""

import importlib
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro

from common.checkpoint import load_checkpoint, read_args
from common.envs import env_seed, make_envs
from common.errors import UserError


MAX_EPISODE_STEPS = 30_000  # Atari's games last up to 27,000; without a limit, a policy may never come to an end


@torch.no_grad()
def evaluate(agent, args, env_state: dict, episodes: int, seed: int | None = None, frames: list | None = None):
    """Greedy returns and lengths, each (episodes,), in fresh environments with frozen statistics.

    Every environment plays a fixed number of episodes; taking whichever end first would favour short ones.
    """
    device = next(agent.parameters()).device
    num_envs = 1 if frames is not None else min(episodes, 16)
    quota = np.array([len(range(i, episodes, num_envs)) for i in range(num_envs)])
    envs = make_envs(args, num_envs, evaluation=True, render=frames is not None)
    envs.load_state_dict(env_state)
    # The seed differs from those of training, which are made of (seed, environment steps)
    obs, _ = envs.reset(seed=env_seed(args.seed if seed is None else seed, 2**62))
    returns, lengths, steps_left = [], [], MAX_EPISODE_STEPS * int(quota.max())
    try:
        while quota.any():
            if frames is not None:
                frames.append(envs.picture(obs))
            actions = agent.act(torch.as_tensor(obs, device=device), greedy=True)
            obs, _, _, _, infos = envs.step(actions.cpu().numpy())
            steps_left -= 1
            if steps_left < 0:
                raise UserError(
                    f"Greedy episodes of {args.env_id} do not end within {MAX_EPISODE_STEPS:,} steps; "
                    "register it with max_episode_steps, or wrap it in gymnasium.wrappers.TimeLimit."
                )
            for i in np.flatnonzero(infos.get("_episode", [])):
                if quota[i] > 0:
                    quota[i] -= 1
                    returns.append(float(infos["episode"]["r"][i]))
                    lengths.append(int(infos["episode"]["l"][i]))
    except BaseException:  # a worker may owe an answer that will never come
        envs.close(terminate=True)
        raise
    envs.close()
    return returns, lengths


def load_agent(run_dir: str | Path):
    """The trained agent of a run folder, its Args, and the statistics of its environments."""
    saved = read_args(run_dir)
    script = importlib.import_module(saved["script"])
    names = {field.name for field in fields(script.Args)}
    args = script.Args(**{name: value for name, value in saved.items() if name in names})
    content = load_checkpoint(run_dir, saved["script"])
    envs = make_envs(args, 1, evaluation=True)
    agent = script.ActorCritic(envs.single_observation_space, envs.single_action_space, args)
    envs.close()
    try:
        agent.load_state_dict(content["parts"]["agent"])
    except (KeyError, RuntimeError):
        raise UserError(f"The checkpoint in {str(run_dir)!r} does not fit its args.json.") from None
    return agent, args, content["parts"]["envs"], content["env_steps"]


@dataclass
class EvaluateArgs:
    run_dir: Annotated[str, tyro.conf.Positional]
    """run folder of a trained agent"""
    episodes: int = 20
    """episodes to play"""
    video: bool = False
    """write the first episode to RUN_DIR/video.mp4"""
    seed: int | None = None
    """seed of the environments; by default that of the run"""


def main():
    options = tyro.cli(EvaluateArgs, description=__doc__)
    run_dir = Path(options.run_dir)
    try:
        if options.episodes < 1:
            raise UserError(f"--episodes must lie in [1, inf), got {options.episodes}.")
        agent, args, env_state, env_steps = load_agent(run_dir)
        if options.video:
            write_video(agent, args, env_state, run_dir, options.seed)
        returns, lengths = evaluate(agent, args, env_state, options.episodes, options.seed)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(
        f"greedy return {np.mean(returns):.1f} ± {np.std(returns):.1f} over {len(returns)} episodes of {args.env_id} "
        f"(mean length {np.mean(lengths):.0f}), trained for {env_steps:,} environment steps"
    )


def write_video(agent, args, env_state: dict, run_dir: Path, seed: int | None):
    try:
        from moviepy import ImageSequenceClip
    except ImportError:
        raise UserError('--video needs an extra: pip install -e ".[video]"') from None
    frames = []
    try:
        evaluate(agent, args, env_state, 1, seed, frames)
    except (TypeError, gym.error.Error) as error:
        raise UserError(f"{args.env_id} does not render as rgb_array: {error}") from None
    clip = ImageSequenceClip(frames, fps=30)
    clip.write_videofile(str(run_dir / "video.mp4"), logger=None)
    print(f"video of one episode, {len(frames)} frames: {run_dir / 'video.mp4'}")


if __name__ == "__main__":
    main()
