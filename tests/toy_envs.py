"""Small environments whose observations can be recognized. Ids: `toy_envs:Name-v0` (gymnasium imports the module)."""

import copy
import random
import sys
import time

import gymnasium as gym
import numpy as np
import torch
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


class Insisting(Constant):
    """Asserts that an action lies in its space; a NaN does not."""

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(action)


class Images(Constant):
    """Images: uint8, channels first."""

    def __init__(self):
        super().__init__()
        self.observation_space = Box(0, 255, (3, 40, 44), np.uint8)

    def _obs(self):
        return np.full((3, 40, 44), self.t, np.uint8)


def with_spaces(observation_space, action_space=Discrete(2)):
    class Unusual(Constant):
        def __init__(self):
            super().__init__()
            self.observation_space, self.action_space = observation_space, action_space

        def _obs(self):
            return self.observation_space.sample()

    return Unusual


ACTIONS = {  # the same with other actions
    "CountingBox": (Counting, Box(-1.0, 1.0, (1,), np.float32)),
    "ConstantBox": (Constant, Box(-1.0, 1.0, (2,), np.float32)),
    "ImagesBox": (Images, Box(-1.0, 1.0, (2,), np.float32)),
    "Shifted": (Insisting, Discrete(2, start=3)),
    "SmallInts": (Insisting, Discrete(3, dtype=np.int32)),
    "Doubles": (Insisting, Box(np.array([-0.1, 2.0]), np.array([0.3, 7.0]), dtype=np.float64)),  # no exact float32
}
for name, (cls, space) in ACTIONS.items():
    globals()[name] = type(name, (cls,), {"action_space": space})
CountingBox, ConstantBox = globals()["CountingBox"], globals()["ConstantBox"]

VECTOR = Box(-1.0, 1.0, (3,), np.float32)
UNUSUAL = {
    "DictObs": with_spaces(Dict({"a": VECTOR})),
    "DiscreteObs": with_spaces(Discrete(5)),
    "MatrixObs": with_spaces(Box(0, 255, (84, 84), np.uint8)),
    "ChannelsLast": with_spaces(Box(0, 255, (84, 84, 3), np.uint8)),
    "FloatImage": with_spaces(Box(0.0, 1.0, (3, 84, 84), np.float32)),
    "SmallImage": with_spaces(Box(0, 255, (3, 20, 20), np.uint8)),
    "MultiDiscreteActions": with_spaces(VECTOR, MultiDiscrete([2, 2])),
    "UnboundedActions": with_spaces(VECTOR, Box(-np.inf, np.inf, (2,), np.float32)),
}


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


class Talkative(Constant):
    """Infos whose names, types and shapes change from step to step and from environment to environment."""

    INFOS = {"x": 1}, {"x": "text"}, {}, {"x": np.zeros(3)}, {"x": np.zeros((2, 2))}, {"episode": 3}, {"x": {"y": [1]}}

    def _info(self):
        return copy.deepcopy(self.INFOS[np.random.default_rng().integers(len(self.INFOS))])

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0], self._info()

    def step(self, action):
        return *super().step(action)[:4], self._info()


class Dice(Constant):
    """Shows and rewards numbers from the generators that belong to nobody."""

    def __init__(self):
        super().__init__()
        self.observation_space = Box(0.0, 1.0, (3,), np.float32)

    def _obs(self):
        return np.array([random.random(), np.random.rand(), torch.rand(1).item()], np.float32)

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float(obs[0]), *rest


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


class Needy(Constant):
    """Its constructor needs an argument."""

    def __init__(self, size):
        super().__init__(length=size)


class Broken(Constant):
    """What it gives is `value` after `after` steps of an environment: as a reward, an observation, or from a reset."""

    def __init__(self, what="reward", value=np.nan, after=200, length=50, box=False):
        super().__init__(length)
        self.what, self.value, self.after, self.count = what, value, after, 0
        self.observation_space = Box(-np.inf, np.inf, (1,), np.float64)
        if box:
            self.action_space = ConstantBox.action_space

    def _or(self, good, *whats):
        return self.value if self.what in whats and self.count > self.after else good

    def reset(self, **kwargs):
        return np.full(1, self._or(super().reset(**kwargs)[0][0], "observation", "reset")), {}

    def step(self, action):
        self.count += 1
        obs, reward, *rest = super().step(action)
        return np.full(1, self._or(obs[0], "observation")), self._or(reward, "reward"), *rest


class WornOut(Constant):
    """Raises at its 100th step."""

    count = 0

    def fail(self):
        raise RuntimeError(f"worn out after {self.count} steps")

    def step(self, action):
        self.count += 1
        if self.count == 100:
            self.fail()
        return super().step(action)


class Slow(Constant):
    """20 ms a step: long enough to be interrupted at a chosen moment."""

    def step(self, action):
        time.sleep(0.02)
        return super().step(action)


class Halving(Constant):
    """Ends when a number that is halved at every step has become 0."""

    def reset(self, *, seed=None, options=None):
        self.x = 1e-290
        return super().reset(seed=seed)

    def step(self, action):
        self.x *= 0.5
        return self._obs(), 1.0, self.x == 0, False, {}


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


class Meddling(Constant):
    """Changes something for the whole process in its constructor, in reset(), or in its first step."""

    WHAT = {
        "dtype": lambda: torch.set_default_dtype(torch.float64),
        "grad": lambda: torch.set_grad_enabled(False),
        "errors": lambda: np.seterr(all="raise"),
        "noise": lambda: torch.manual_seed(42),
    }

    def __init__(self, what="noise", when="reset"):
        super().__init__(length=3)
        self.what, self.when = what, when
        self._meddle("init")

    def _meddle(self, now):
        if now == self.when:
            self.WHAT[self.what]()

    def reset(self, **kwargs):
        self._meddle("reset")
        return super().reset(**kwargs)

    def step(self, action):
        self._meddle("first step")
        self.when = self.when.removeprefix("first ")
        return super().step(action)


class Window(WornOut):
    """Somebody closes its window at its 100th step, and pygame's usual code ends the program."""

    def fail(self):
        sys.exit()


class Former(Constant):
    """step() of before 2022: obs, reward, done, info."""

    def step(self, action):
        obs, reward, *ends, info = super().step(action)
        return obs, reward, any(ends), info


class Differentiating(Constant):
    """Its physics are gradients."""

    def step(self, action):
        x = torch.ones(1, requires_grad=True)
        (x**2 / 4).sum().backward()
        obs, _, *rest = super().step(action)
        return obs, x.grad.item(), *rest


class Shapeless(Constant):
    """Its observation is a row, which its space is not."""

    def _obs(self):
        return super()._obs()[None]


class Native(Reusing):
    """What it returns has other types or shapes than gymnasium's own, or a reward where it only resets."""

    HOW = {
        "as usual": lambda x, over: x,
        "int64": lambda x, over: [x[0], x[1].astype(int), *(flags.astype(int) for flags in x[2:4]), {}],
        "uint8": lambda x, over: [*x[:2], *(flags.astype(np.uint8) for flags in x[2:4]), {}],
        "torch": lambda x, over: [*(torch.as_tensor(each) for each in x[:4]), {}],
        "paid at a reset": lambda x, over: [x[0], x[1] + 1000 * over, *x[2:]],
        "rewards": lambda x, over: [x[0], x[1][:, None], *x[2:]],
        "flags": lambda x, over: [*x[:2], x[2][:, None], *x[3:]],
        "observations": lambda x, over: [x[0][None], *x[1:]],
    }

    def __init__(self, num_envs=1, how="as usual"):
        super().__init__(num_envs)
        self.how = how

    def step(self, actions):
        over = self.terminated | self.truncated
        return tuple(self.HOW[self.how](list(super().step(actions)), over))


for name, cls in list(globals().items()):
    if isinstance(cls, type) and issubclass(cls, gym.Env):
        gym.register(f"{name}-v0", cls)
for name, cls in UNUSUAL.items():
    gym.register(f"{name}-v0", cls)
gym.register("Native-v0", vector_entry_point=Native)
gym.register("DifferentiatingBox-v0", type("DifferentiatingBox", (Differentiating,), {"action_space": VECTOR}))
gym.register("NumEnvs-v0", Constant, kwargs={"num_envs": 3})
gym.register("NormObs-v0", lambda: gym.wrappers.NormalizeObservation(Constant()))
gym.register("NormReward-v0", lambda: gym.wrappers.TimeLimit(gym.wrappers.NormalizeReward(Constant()), 5))
for name, box in (("Reusing", False), ("ReusingBox", True)):
    gym.register(f"{name}-v0", vector_entry_point=Reusing, kwargs={"box": box})
gym.register("Terminating-v0", Constant, kwargs={"terminates": True})
gym.register("TerminatingBox-v0", ConstantBox, kwargs={"terminates": True})
gym.register("BrokenBox-v0", Broken, kwargs={"box": True})
gym.register("BrokenObsBox-v0", Broken, kwargs={"what": "observation", "after": 70, "length": 10, "box": True})
gym.register("BrokenReset-v0", Broken, kwargs={"what": "reset", "value": np.inf, "after": 70, "length": 10})
gym.register("Huge-v0", Broken, kwargs={"what": "observation", "value": 1e300, "after": 5})  # infinite as float32
