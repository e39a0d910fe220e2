"""A run of the off-policy scripts written out plainly: a list in place of the buffer, the environments one by one."""

import random
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch

from common.checkpoint import env_seed


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
    """The agent at the end of a run, and the number of updates. The bounds of continuous actions must be -1 and 1.

    Matrix products are of precision "highest", which a run must have, too: what auto chooses may round otherwise.

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
    buffer, env_steps, next_reset, updates = {}, 0, 0, 0
    while env_steps < args.total_timesteps:
        if env_steps >= next_reset:
            seed = env_seed(args.seed, env_steps)
            obs = [env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]
            ended = [False] * len(envs)
            next_reset = (env_steps // args.checkpoint_every + 1) * args.checkpoint_every
        chosen, before = act(agent, optimizer, torch.as_tensor(np.array(obs)), env_steps), env_steps
        for i, env in enumerate(envs):
            if ended[i]:  # a step that only resets
                obs[i], ended[i] = env.reset()[0], False
                continue
            action = chosen["actions"][i].numpy()
            next_obs, reward, terminated, truncated, _ = env.step(int(action) if discrete else action.clip(-1, 1))
            row = {"obs": obs[i], "rewards": reward, "next_obs": next_obs, "terminated": terminated}
            buffer[env_steps % args.buffer_size] = row | {name: x[i].numpy() for name, x in chosen.items()}
            env_steps += 1
            obs[i], ended[i] = next_obs, terminated or truncated
        if env_steps <= args.learning_starts:
            continue
        for _ in range(int(env_steps * args.updates_per_step) - int(before * args.updates_per_step)):
            index = torch.randint(len(buffer), (args.batch_size,)).tolist()
            script.update(agent, optimizer, SimpleNamespace(**as_fields([buffer[i] for i in index])), args)
            updates += 1
    return agent, updates
