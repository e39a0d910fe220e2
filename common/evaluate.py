"""Greedy evaluation of an agent on fresh environments."""

import numpy as np
import torch

from common.envs import env_seed, make_envs
from common.flags import UserError

MAX_EPISODE_STEPS = 30_000  # Atari's games last up to 27,000; without a limit, a policy may never come to an end


def evaluate(agent, args, env_state: dict, episodes: int, seed: int, on_step=lambda envs, obs: None, render=False):
    """Greedy returns and lengths, each (episodes,), in fresh environments with frozen statistics.

    Every environment plays a fixed number of episodes; taking whichever end first would favour short ones.
    `on_step` is called with environments and observations before each step; `render`: one environment, with pictures.
    """
    device = next(agent.parameters()).device
    num_envs = 1 if render else min(episodes, 16)
    quota = np.array([len(range(i, episodes, num_envs)) for i in range(num_envs)])
    envs = make_envs(args, num_envs, evaluation=True, render=render)
    envs.load_state_dict(env_state)
    # The seed differs from those of training, which are made of (seed, environment steps)
    obs, _ = envs.reset(seed=env_seed(seed, 2**62))
    returns, lengths, steps_left = [], [], MAX_EPISODE_STEPS * int(quota.max())
    try:
        while quota.any():
            on_step(envs, obs)
            actions = agent.act(torch.as_tensor(obs, device=device), greedy=True)
            obs, _, _, _, ended = envs.step(actions.cpu().numpy())
            steps_left -= 1
            if steps_left < 0:
                raise UserError(
                    f"Greedy episodes of {args.env_id} do not end within {MAX_EPISODE_STEPS:,} steps; "
                    "register it with max_episode_steps, or wrap it in gymnasium.wrappers.TimeLimit."
                )
            for i, episodic_return, length in ended:
                if quota[i] > 0:
                    quota[i] -= 1
                    returns.append(episodic_return)
                    lengths.append(length)
    except BaseException:  # a worker may owe an answer that will never come
        envs.close(terminate=True)
        raise
    envs.close()
    return returns, lengths
