"""Greedy evaluation of an agent on fresh environments."""

import numpy as np
import torch

from common.checkpoint import env_seed, seed_generators
from common.envs import make_envs
from common.flags import UserError


def evaluate(agent, args, env_state, episodes, seed=0, max_steps=100_000, on_step=lambda *_: None, render=False):
    """Greedy returns and lengths, each (episodes,), in fresh environments with frozen statistics.

    Episode i starts from a seed made of `seed` and i, whatever trained the agent. They are played in rounds of as many
    as training had. `on_step` is called before each step with environments and observations; `render`: one
    environment, with pictures. Raises UserError if an episode has more than `max_steps`.
    """
    num_envs = 1 if render else min(episodes, args.num_envs)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, int)
    envs = make_envs(args, num_envs, evaluation=True, render=render)
    try:
        envs.load_state_dict(env_state)
        for first in range(0, episodes, num_envs):
            # Resets in training have seeds made of (seed, environment steps)
            seeds = [env_seed(seed, 2**62, i) for i in range(first, first + num_envs)]
            seed_generators(seeds[0])  # an environment may draw from the global ones
            obs, _ = envs.reset(seed=seeds)
            playing = set(range(min(num_envs, episodes - first)))
            for _ in range(max_steps):
                on_step(envs, obs)
                actions = agent.act(torch.as_tensor(obs, device=next(agent.parameters()).device), greedy=True)
                obs, _, _, _, ended = envs.step(actions.cpu().numpy())
                for i, episodic_return, length in ended:
                    if i in playing:
                        returns[first + i], lengths[first + i] = episodic_return, length
                        playing.remove(i)
                if not playing:
                    break
            else:
                raise UserError(f"A greedy episode of {args.env_id} does not end within {max_steps:,} steps.")
    finally:
        envs.close()
    return returns.tolist(), lengths.tolist()
