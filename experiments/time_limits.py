"""Imported by a variant, this makes every time limit an end, as old code did that knew of `done` alone."""

from common.envs import Envs

step = Envs.step


def step_with_ends(envs, actions):
    obs, rewards, terminated, truncated, episodes = step(envs, actions)
    return obs, rewards, terminated | truncated, truncated, episodes


Envs.step = step_with_ends
