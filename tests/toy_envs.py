"""Small environments whose observations can be recognized. Ids: `toy_envs:Name-v0` (gymnasium imports the module)."""

import copy
import random

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete


class Counting(gym.Env):
    """Observation (episode, step); episodes of 1 to 5 steps that end terminated, truncated or both, in turn."""

    observation_space = Box(-1.0, np.inf, (2,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode = getattr(self, "episode", -1) + 1
        self.t = 0
        self.length = 1 + int(self.np_random.integers(5))
        return self._obs(), {}

    def _obs(self):
        return np.array([self.episode, self.t], np.float32)

    def step(self, action):
        self.t += 1
        end = self.t == self.length
        return self._obs(), float(self.t), end and self.episode % 3 != 0, end and self.episode % 3 != 1, {}


class CountingBox(Counting):
    """The same with continuous actions."""

    action_space = Box(-1.0, 1.0, (1,), np.float32)


class Constant(gym.Env):
    """Reward 1 for ever. Ends after `length` steps, terminated or (by default) only truncated."""

    action_space = Discrete(2)

    def __init__(self, length=10, terminates=False):
        self.length, self.terminates = length, terminates
        self.observation_space = Box(0.0, 1.0, (length + 1 if terminates else 1,), np.float32)

    def _obs(self):  # a terminating one shows the time (one-hot), on which its value depends
        return np.eye(self.length + 1, dtype=np.float32)[self.t] if self.terminates else np.ones(1, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        end = self.t == self.length
        return self._obs(), 1.0, end and self.terminates, end and not self.terminates, {}


class OneStep(Constant):
    """Episodes of one step."""

    def step(self, action):
        return self._obs(), 1.0, True, False, {}


class Reusing(gym.vector.VectorEnv):
    """A native vector environment that returns the same arrays at every step. Observation: episode, step."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs=1, box=False, max_episode_steps=None):
        self.num_envs, self.single_observation_space = num_envs, Box(-1.0, np.inf, (2,), np.float32)
        self.single_action_space = Box(-1.0, 1.0, (1,), np.float32) if box else Discrete(2)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.obs, self.rewards = np.zeros((num_envs, 2), np.float32), np.zeros(num_envs, np.float32)
        self.terminated, self.truncated = np.zeros(num_envs, bool), np.zeros(num_envs, bool)

    def reset(self, *, seed=None, options=None):
        self.obs[:, 0] += 1
        self.obs[:, 1] = 0
        self.terminated[:] = self.truncated[:] = False
        return self.obs, {}

    def step(self, actions):
        over = self.terminated | self.truncated
        self.obs[:, 1] = np.where(over, 0, self.obs[:, 1] + 1)
        self.obs[:, 0] += over
        self.rewards[:] = self.obs[:, 1]
        self.terminated[:] = ~over & (self.obs[:, 1] >= 3 + np.arange(self.num_envs))
        return self.obs, self.rewards, self.terminated, self.truncated, {}


class Chatty(Constant):
    """Infos that differ between environments and steps in keys, shapes and types."""

    count = 0

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], self._info()

    def step(self, action):
        return *super().step(action)[:4], self._info()

    def _info(self):
        type(self).count += 1
        k = type(self).count
        several = [
            np.zeros(k % 5),
            [1] * (k % 3),
            "text",
            None,
            {"a": object()},
            [[1], [2, 3]],
            np.zeros((k % 2 + 1, 2)),
        ]
        return {"same": several[k % 7], f"key {k % 4}": several[(k + 3) % 7], "episode": k}


class Dice(Constant):
    """Shows numbers from the global generators."""

    def __init__(self):
        super().__init__()
        self.observation_space = Box(0.0, 1.0, (3,), np.float32)

    def _obs(self):
        import random

        import torch

        return np.array([random.random(), np.random.rand(), torch.rand(1).item()], np.float32)


class Single(Constant):
    """A simulator of which there may be `allowed` at a time; remembers the most there have been, and all seeds."""

    allowed, alive, most, seeds = 10**9, 0, 0, []

    def __init__(self):
        super().__init__()
        Single.alive += 1
        Single.most = max(Single.most, Single.alive)
        if Single.alive > Single.allowed:
            raise RuntimeError(f"there are {Single.alive} of them")

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            Single.seeds.append(seed)
        return super().reset(seed=seed)

    def close(self):
        Single.alive -= 1


class Endless(Constant):
    """Long episodes."""

    def __init__(self, length=3_000):
        super().__init__(length=length)


class Needy(Constant):
    """Its constructor needs an argument."""

    def __init__(self, size):
        super().__init__(length=size)


class Unbuildable(Constant):
    def __init__(self):
        raise OSError("no licence server at port 7")


class Family(Constant):
    """Starts a process of its own."""

    def __init__(self):
        super().__init__()
        import multiprocessing

        self.process = multiprocessing.get_context("spawn").Process(target=print, args=("",))
        self.process.start()

    def close(self):
        self.process.join()


class NanAction(Constant):
    """Asserts that no action is NaN."""

    action_space = Box(-1.0, 1.0, (2,), np.float32)

    def step(self, action):
        assert np.isfinite(action).all(), "a NaN reached the environment"
        return super().step(action)


class NanReset(Constant):
    """Observations that are infinite after the third reset."""

    resets = 0

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        obs, infos = super().reset(seed=seed)
        return obs * np.float32(np.inf if self.resets > 3 else 1), infos


class Huge(Constant):
    """float64 observations that are infinite as float32."""

    def __init__(self):
        super().__init__()
        self.observation_space = Box(-np.inf, np.inf, (1,), np.float64)

    def _obs(self):
        return np.array([1e300 if self.t > 5 else 1.0])


class Picky(gym.Env):
    """A float64 Box with uneven bounds, another for each dimension; asserts its own space and shows the last action."""

    action_space = Box(np.array([-0.1, 2.0]), np.array([0.3, 7.0]), dtype=np.float64)
    observation_space = Box(-10.0, 10.0, (2,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        return np.array(action), 0.0, False, self.t == 10, {}


class Frames(Constant):
    """Renders what `kind` says."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, kind="good", render_mode=None):
        super().__init__()
        self.kind, self.render_mode = kind, render_mode

    def render(self):
        if self.kind == "raises":
            raise RuntimeError("no display")
        shape = {"none": None, "grey": (32, 48), "sizes": (32 + 2 * self.t, 48, 3)}.get(self.kind, (32, 48, 3))
        return None if shape is None else np.full(shape, 20 * self.t, np.uint8)


class Halving(Constant):
    """Ends when a number that is halved at every step has become 0."""

    def reset(self, *, seed=None, options=None):
        self.x = 1e-290
        return super().reset(seed=seed)

    def step(self, action):
        self.x *= 0.5
        return self._obs(), 1.0, self.x == 0, False, {}


class Talkative(Constant):
    """Infos whose names, types and shapes change from step to step and from environment to environment."""

    INFOS = {"x": 1}, {"x": "text"}, {}, {"x": np.zeros(3)}, {"x": np.zeros((2, 2))}, {"episode": 3}, {"x": {"y": [1]}}

    def _info(self):
        return copy.deepcopy(self.INFOS[np.random.default_rng().integers(len(self.INFOS))])

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0], self._info()

    def step(self, action):
        return *super().step(action)[:4], self._info()


class Drawing(Constant):
    """Observations from the generators that belong to nobody: Python's and NumPy's."""

    def __init__(self):
        super().__init__()
        self.observation_space = Box(0.0, 1.0, (2,), np.float32)

    def _obs(self):
        return np.array([random.random(), np.random.random()], np.float32)


class Target(gym.Env):
    """One-step episodes, a Box with odd bounds; the best action is the upper one if the first element is positive."""

    observation_space = Box(-1.0, 1.0, (3,), np.float32)
    action_space = Box(np.array([-3.0], np.float32), np.array([5.0], np.float32))
    actions: list = []  # everything that step() received

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        obs = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        self.best = 5.0 if obs[0] > 0 else -3.0
        return obs, {}

    def step(self, action):
        Target.actions.append(action.copy())
        return np.zeros(3, np.float32), -float((action[0] - self.best) ** 2), True, False, {}


class Shifted(Constant):
    """Discrete actions that start at 3."""

    action_space = Discrete(2, start=3)

    def step(self, action):
        assert action in (3, 4)
        return super().step(action)


class SmallInts(Constant):
    """Discrete actions of another dtype, on which it insists."""

    action_space = Discrete(3, dtype=np.int32)

    def step(self, action):
        assert self.action_space.contains(action)
        return super().step(action)


class Doubles(Constant):
    """A Box of float64, on which it insists."""

    action_space = Box(-2.0, 3.0, (2,), np.float64)

    def step(self, action):
        assert self.action_space.contains(action)
        return super().step(action)


class Nothing(Constant):
    """No reward at all, continuous actions."""

    action_space = Box(-1.0, 1.0, (2,), np.float32)

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 0.0, *rest


class ConstantBox(Constant):
    """Reward 1 for ever, continuous actions."""

    action_space = Box(-1.0, 1.0, (2,), np.float32)


class Images(Constant):
    """Images: uint8, channels first."""

    def __init__(self):
        super().__init__()
        self.observation_space = Box(0, 255, (3, 40, 44), np.uint8)

    def _obs(self):
        return np.full((3, 40, 44), self.t, np.uint8)


class Broken(Constant):
    """Rewards that turn NaN after `after` steps of an environment."""

    def __init__(self, after=200):
        super().__init__(length=50)
        self.after, self.count = after, 0

    def step(self, action):
        self.count += 1
        obs, reward, *rest = super().step(action)
        return obs, np.nan if self.count > self.after else reward, *rest


class BrokenBox(Broken):
    """With continuous actions."""

    action_space = Box(-1.0, 1.0, (2,), np.float32)


class BrokenObsBox(ConstantBox):
    """Observations that turn NaN after 70 steps."""

    count = 0

    def step(self, action):
        self.count += 1
        obs, *rest = super().step(action)
        return obs * np.float32(np.nan if self.count > 70 else 1), *rest


class ImagesBox(Images):
    """Images and continuous actions."""

    action_space = Box(-1.0, 1.0, (2,), np.float32)


class WornOut(Constant):
    """Raises at its 100th step."""

    count = 0

    def step(self, action):
        self.count += 1
        if self.count == 100:
            raise RuntimeError(f"worn out after {self.count} steps")
        return super().step(action)


class Slow(Constant):
    """20 ms a step: long enough to be interrupted at a chosen moment."""

    def step(self, action):
        import time

        time.sleep(0.02)
        return super().step(action)


def with_spaces(observation_space, action_space=Discrete(2)):
    class Unsupported(Constant):
        def __init__(self):
            super().__init__()
            self.observation_space, self.action_space = observation_space, action_space

        def _obs(self):
            return self.observation_space.sample()

    return Unsupported


VECTOR = Box(-1.0, 1.0, (3,), np.float32)
UNSUPPORTED = {
    "DictObs": with_spaces(Dict({"a": VECTOR})),
    "DiscreteObs": with_spaces(Discrete(5)),
    "MatrixObs": with_spaces(Box(-1.0, 1.0, (3, 3), np.float32)),
    "ChannelsLast": with_spaces(Box(0, 255, (84, 84, 3), np.uint8)),
    "FloatImage": with_spaces(Box(0.0, 1.0, (3, 84, 84), np.float32)),
    "MultiDiscreteActions": with_spaces(VECTOR, MultiDiscrete([2, 2])),
    "GreyImage": with_spaces(Box(0, 255, (84, 84), np.uint8)),
    "StackedImages": with_spaces(Box(0, 255, (4, 84, 84, 3), np.uint8)),
    "UnboundedActions": with_spaces(VECTOR, Box(-np.inf, np.inf, (2,), np.float32)),
}

CLASSES = (
    Counting,
    CountingBox,
    Constant,
    ConstantBox,
    Target,
    Shifted,
    SmallInts,
    Doubles,
    Nothing,
    Images,
    Broken,
    BrokenBox,
    BrokenObsBox,
    ImagesBox,
    WornOut,
    Slow,
    Halving,
    OneStep,
    Talkative,
    Drawing,
    Chatty,
    Dice,
    Single,
    Endless,
    Needy,
    Unbuildable,
    Family,
    NanAction,
    NanReset,
    Huge,
    Picky,
    Frames,
)
for cls in CLASSES:
    gym.register(f"{cls.__name__}-v0", cls)
for name, box in (("Reusing", False), ("ReusingBox", True)):
    gym.register(f"{name}-v0", vector_entry_point=Reusing, kwargs={"box": box})
gym.register("SixFrames-v0", with_spaces(Box(0, 255, (18, 84, 84), np.uint8)))
gym.register("Terminating-v0", Constant, kwargs={"terminates": True})
gym.register("TerminatingBox-v0", ConstantBox, kwargs={"terminates": True})
for name, cls in UNSUPPORTED.items():
    gym.register(f"{name}-v0", cls)
