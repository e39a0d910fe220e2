"""A2C on CartPole-v1 in a loop of one's own:  python examples/plain_loop.py

Of the repository it takes three sections of a2c_sync.py as they stand there: Networks, Equations and Update, which
import only torch and the standard library. To have them in a program of yours, paste them in place of the loop.
"""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium as gym
import torch
from torch import nn

script = Path(__file__).parents[1] / "a2c_sync.py"
sections = re.split(r"^# --- (\w+) -+$", script.read_text(), flags=re.MULTILINE)
for name in ("Networks", "Equations", "Update"):
    exec(sections[sections.index(name) + 1])

torch.manual_seed(1)
torch.set_num_threads(1)  # the networks are small
args = SimpleNamespace(gamma=0.99, gae_lambda=0.95, ent_coef=0.01, value_coef=0.5, max_grad_norm=0.5)
T, N, num_updates = 8, 16, 1_000
envs = gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec("CartPole-v1", num_envs=N))  # autoreset: NEXT_STEP
agent = ActorCritic(obs_shape=(4,), num_actions=2, discrete=True, shared=False)
groups = [{"params": net.parameters(), "lr": 4e-3, "initial_lr": 4e-3} for net in (agent.actor, agent.critic)]
optimizer = torch.optim.Adam(groups)
obs, actions = torch.zeros(T + 1, N, 4), torch.zeros(T, N, dtype=torch.long)
rewards, terminated, done = torch.zeros(T, N), torch.zeros(T, N), torch.zeros(T + 1, N)
obs[T] = torch.as_tensor(envs.reset(seed=1)[0])
curve = []  # mean training return of the last 100 episodes

for i in range(num_updates):
    decay_learning_rates(optimizer, i / num_updates)
    obs[0], done[0] = obs[T], done[T]
    for t in range(T):
        actions[t] = agent.act(obs[t])
        step = envs.step(actions[t].numpy())  # where done[t] is 1 it only resets: loss_fn leaves that step out
        obs[t + 1], rewards[t], terminated[t], truncated = map(torch.as_tensor, step[:4])
        done[t + 1] = torch.maximum(terminated[t], truncated)
    update(agent, optimizer, Rollout(obs, actions, rewards, terminated, done), args)
    curve.append(sum(envs.return_queue) / max(1, len(envs.return_queue)))

print(f"mean training return of the last 100 episodes: {curve[-1]:.0f}")
