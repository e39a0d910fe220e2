"""A run of the off-policy scripts written out plainly: a list in place of the buffer, the environments one by one."""

import random
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch

from common.envs import env_seed


def recorded(cls):
    """A subclass of a toy environment whose list `happened` gets every step: (environment, transition)."""

    class Recorded(cls):
        happened: list = []

        def step(self, action):
            obs = self._obs()
            next_obs, reward, terminated, *rest = super().step(action)
            row = {"obs": obs, "actions": action, "rewards": reward, "next_obs": next_obs, "terminated": terminated}
            self.happened.append((self, row))
            return next_obs, reward, terminated, *rest

    return Recorded


def as_fields(rows):
    """Transitions as the buffer holds them: a tensor for every field, all of float32 but discrete actions."""
    fields = {name: torch.as_tensor(np.array([row[name] for row in rows])) for name in rows[0]}
    return {name: x if x.dtype == torch.int64 else x.float() for name, x in fields.items()}


def transitions_of_the_first(happened, num_envs):
    """What the first environments did; those of the evaluation come later."""
    first = list(dict.fromkeys(env for env, _ in happened))[:num_envs]
    return as_fields([row for env, row in happened if env in first])


def written_out_run(script, args, act):
    """The agent at the end of a run, and the updates. Actions of a Box are taken as they are: its bounds must be ±1.

    act(agent, optimizer, obs (N, ...), env_steps) gives the fields of a transition that acting yields, (N, ...) each.
    """
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    envs = [gym.make(args.env_id) for _ in range(args.num_envs)]
    space = envs[0].action_space
    discrete = isinstance(space, gym.spaces.Discrete)
    num_actions = int(space.n) if discrete else space.shape[0]
    spec = (envs[0].observation_space.shape, np.float32)
    agent = script.make_agent(SimpleNamespace(obs_spec=spec, num_actions=num_actions, discrete=discrete), args)
    optimizer = script.make_optimizer(agent, args)
    rows, next_reset, updates = [], 0, 0
    while len(rows) < args.total_timesteps:
        if len(rows) >= next_reset:
            seed = env_seed(args.seed, len(rows))
            obs = [env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]
            ended = [False] * len(envs)
            next_reset = (len(rows) // args.checkpoint_every + 1) * args.checkpoint_every
        chosen, before = act(agent, optimizer, torch.as_tensor(np.array(obs)), len(rows)), len(rows)
        for i, env in enumerate(envs):
            if ended[i]:  # a step that only resets
                obs[i], ended[i] = env.reset()[0], False
                continue
            action = chosen["actions"][i].numpy()
            next_obs, reward, terminated, truncated, _ = env.step(int(action) if discrete else action.clip(-1, 1))
            rows.append({name: x[i].numpy() for name, x in chosen.items()})
            rows[-1] |= {"obs": obs[i], "rewards": reward, "next_obs": next_obs, "terminated": terminated}
            obs[i], ended[i] = next_obs, terminated or truncated
        if len(rows) <= args.learning_starts:
            continue
        for _ in range(int(len(rows) * args.updates_per_step) - int(before * args.updates_per_step)):
            # Transition n lies in row n of the buffer, modulo its size, if no later one does
            filled = min(len(rows), args.buffer_size)
            index = torch.randint(filled, (args.batch_size,)).tolist()
            newest = {n % args.buffer_size: rows[n] for n in range(len(rows))}
            script.update(agent, optimizer, SimpleNamespace(**as_fields([newest[i] for i in index])), args)
            updates += 1
    return agent, updates
