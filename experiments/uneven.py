"""CartPole-v1 whose steps take time, always the same or at random: for D6. Nothing else of it differs."""

import time

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv


class SlowCartPole(CartPoleEnv):
    def __init__(self, seconds: float = 0.005, uneven: bool = True, **kwargs):
        """`seconds` a step on average; uneven: exponentially distributed, so that a few take several times as long."""
        super().__init__(**kwargs)
        self.seconds, self.uneven, self.noise = seconds, uneven, np.random.default_rng()

    def step(self, action):
        time.sleep(self.noise.exponential(self.seconds) if self.uneven else self.seconds)
        return super().step(action)


gym.register("SlowCartPole-v0", SlowCartPole, max_episode_steps=500, reward_threshold=475.0)
