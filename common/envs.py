"""make_envs: the only place that builds environments."""

import ctypes
import math
import os
import re
import sys
import warnings
from contextlib import nullcontext, suppress
from functools import partial

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorWrapper
from gymnasium.vector.async_vector_env import AsyncState
from gymnasium.wrappers.vector import NormalizeObservation

from common.checkpoint import kept, warn
from common.flags import UserError

TODAY = {  # what everybody types -> its name today
    r"(\w+?)(?:NoFrameskip|Deterministic)-v\d|(Pong|Breakout)-v\d": r"ALE/\1\2-v5",
    r"(HalfCheetah|Hopper|Walker2d|Ant|Humanoid|Swimmer|Reacher)-v[23]": r"\1-v5",
}


def make_envs(args, num_envs=None, evaluation=False, render=False, images=True, discrete=True) -> "Envs":
    """Vector environment of `args.env_id` with autoreset NEXT_STEP.

    `evaluation`: true rewards, frozen statistics, a seed for each environment; `render`: as rgb_array; `images`,
    `discrete`: whether the script takes such observations and actions. Raises UserError for what it cannot train on.
    """
    # Numbers below 1e-38 become 0: Adam's moments of dead units end there, and make its step several times as slow
    torch.set_flush_denormal(True)
    with suppress(AttributeError, TypeError):  # where there is glibc: keep what is freed, or pixels take 8 % longer
        for limit, size in ((-3, 2**25), (-1, 2**28)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(limit, size)
    noise = torch.get_rng_state()
    with kept(args.env_id):
        spec = find_spec(args.env_id)
    torch.set_rng_state(noise)  # whether its module was imported just now or had been before
    atari = spec.vector_entry_point == "ale_py.vector_env:AtariVectorEnv"
    # A native vector environment draws all starts from one seed: evaluation takes single ones where there are any
    native = args.vectorization == "auto" and spec.vector_entry_point and not (evaluation and spec.entry_point)
    plain = partial(Plain, os.getpid())
    options = {"vectorization_mode": "sync", "vector_kwargs": {"copy": False}, "wrappers": [plain]}
    if atari:
        options = {"reward_clipping": False}  # clipped by Envs, after the true return has been counted
    elif render:
        options["render_mode"] = "rgb_array"
    elif native:
        options = {}
    elif args.vectorization == "async" and not evaluation:  # a fork of this process could hang, its threads missing
        options["vectorization_mode"] = "async"
        options["vector_kwargs"] |= {"context": "forkserver" if os.name == "posix" else "spawn"}
    if "num_envs" in spec.kwargs:
        raise UserError(f"{args.env_id} is registered with num_envs, which --num-envs could not change.")
    try:
        with warnings.catch_warnings(), kept(args.env_id):
            warnings.simplefilter("ignore")  # gymnasium's remarks on spaces; unsupported ones are refused below
            envs = gym.make_vec(spec, num_envs=num_envs or args.num_envs, **options, **args.env_kwargs)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        hint = newer(args.env_id) or " (--env-kwargs gives arguments)"
        raise UserError(f"{args.env_id} cannot be built. {reason}{hint}") from error
    check_spaces(envs, args, images, discrete)
    reward_scale = 1.0 if evaluation else getattr(args, "reward_scale", 1.0)
    return Envs(args.env_id, envs, getattr(args, "normalize_obs", False), evaluation, atari, reward_scale)


class Plain(gym.Wrapper):
    """Without infos, which nobody reads and which need not fit together; and what is odd is refused."""

    def __init__(self, main: int, env):
        super().__init__(env)
        self._name, self._space = env.spec.id, env.observation_space
        while env is not env.unwrapped:
            if isinstance(env, (gym.wrappers.NormalizeObservation, gym.wrappers.NormalizeReward)):
                words = "whose statistics evaluation lacks; a2c_sync.py --normalize-obs keeps those of observations"
                warn(f"{self._name} has {type(env).__name__}, {words}.")
            env = env.env
        if os.getpid() != main and hasattr(os, "setpgrp"):
            os.setpgrp()  # in a process of its own: Ctrl-C is for the main process, which then ends this one
            torch.set_flush_denormal(True)

    def reset(self, **kwargs):
        return self._call(self.env.reset, "obs, info", **kwargs)

    def step(self, action):
        return self._call(self.env.step, "obs, reward, terminated, truncated, info", action)

    def _call(self, method, names: str, *args, **kwargs) -> tuple:
        try:
            result = method(*args, **kwargs)
        except SystemExit as end:  # of a window that was closed, perhaps
            if isinstance(end.code, int) and end.code >= 128:  # or by a signal to us
                raise
            raise UserError(f"{self._name} has called sys.exit() in {method.__name__}().") from None
        if not isinstance(result, tuple) or len(result) != len(names.split()):
            raise UserError(f"{self._name}: {method.__name__}() must return {names}.")
        obs = np.asarray(result[0])
        if obs.shape != self._space.shape or not np.can_cast(obs.dtype, self._space.dtype, "same_kind"):
            raise UserError(f"{self._name} gives observations of shape {obs.shape}, {obs.dtype}, not {self._space}.")
        return obs, *result[1:-1], {}


class Envs(VectorWrapper):
    """gymnasium's vector environment as scripts and networks see it; instead of infos, step() returns ended episodes.

    Vectors are float32, actions of a Box lie in [-1, 1], those of Discrete start at 0, Atari's rewards are clipped
    (Mnih et al. 2015). gymnasium's wrappers loop over the environments, and its RecordEpisodeStatistics is slower.
    `obs_spec`, `action_spec`: shape and dtype of one entry; `num_actions`: choices if `discrete`, else dimensions.
    """

    def __init__(self, name: str, envs, normalize: bool, evaluation: bool, atari: bool, reward_scale: float = 1.0):
        super().__init__(NormalizeObservation(envs) if normalize else envs)
        self._name, self._normalizes = name, normalize
        if normalize:
            self.env.update_running_mean = not evaluation
        shape, dtype = envs.single_observation_space.shape, envs.single_observation_space.dtype
        self.obs_spec = shape, np.dtype(np.float32) if len(shape) == 1 else dtype
        space = envs.single_action_space
        self.discrete = isinstance(space, Discrete)
        if self.discrete:
            self.num_actions, self.action_spec = int(space.n), ((), np.dtype(np.int64))  # 0 to n − 1
            self._start, self._action_dtype = int(space.start), space.dtype
        else:
            self.num_actions, self.action_spec = space.shape[0], (space.shape, np.dtype(np.float32))
            self._bounds = space.low, space.high
            low, high = space.low.astype(np.float64), space.high.astype(np.float64)
            self._center, self._half_range = (high + low) / 2, (high - low) / 2
        self._atari, self._clip_rewards, self._reward_scale = atari, atari and not evaluation, reward_scale

    def reset(self, *, seed):
        """`seed`: one for all, or a list with one for each environment."""
        if isinstance(seed, list) and not isinstance(self.unwrapped, (SyncVectorEnv, AsyncVectorEnv)):
            seed = np.array(seed) if self._atari else seed[0]
        self._returns, self._lengths, self._some_reset = np.zeros(self.num_envs), np.zeros(self.num_envs, int), True
        with kept(self._name):
            obs = self._array("observations", self.env.reset(seed=seed)[0], *self.obs_spec)
        check_finite("observation", obs)
        return obs, {}

    def _array(self, what: str, values, shape: tuple, dtype) -> np.ndarray:
        """A copy, (N, *shape)."""
        array = np.array(values, dtype)
        if array.shape != (self.num_envs, *shape):
            raise UserError(f"{self._name} gives {what} of shape {array.shape}, not {(self.num_envs, *shape)}.")
        return array

    def step(self, actions: np.ndarray):
        """Copies of obs, rewards, terminated, truncated, and (environment, return, length) of each ended episode."""
        if not self.discrete:  # a Gaussian's sample may lie outside, and rounding may leave the bounds by a digit
            check_finite("action", actions)
            actions = self._center + self._half_range * actions.clip(-1.0, 1.0)
            actions = actions.astype(self._bounds[0].dtype).clip(*self._bounds)
        elif self._start or self._action_dtype != actions.dtype:
            actions = (actions + self._start).astype(self._action_dtype)
        try:
            with kept(self._name) if self._some_reset else nullcontext():  # a tenth of a step of CartPole
                obs, rewards, terminated, truncated, _ = self.env.step(actions)
        except (EOFError, ConnectionError):  # of a pipe to a process of an environment
            raise UserError("A process of an environment has died (out of memory?).") from None
        obs, rewards = self._array("observations", obs, *self.obs_spec), self._array("rewards", rewards, (), float)
        terminated, truncated = (self._array("flags", flags, (), bool) for flags in (terminated, truncated))
        check_finite("observation", obs)
        check_finite("reward", rewards)
        self._returns += rewards * (self._lengths >= 0)  # not of a step that only resets
        self._lengths += 1
        episodes = []
        for i in np.flatnonzero(terminated | truncated).tolist():
            episodes.append((i, float(self._returns[i]), int(self._lengths[i])))
            self._returns[i], self._lengths[i] = 0, -1  # the next step only resets
        self._some_reset = bool(episodes)
        if self._clip_rewards:
            rewards = rewards.clip(-1, 1)
        return obs, rewards * self._reward_scale, terminated, truncated, episodes

    def close(self):
        processes = getattr(self.unwrapped, "processes", ())
        if processes and (self.unwrapped._state != AsyncState.DEFAULT or not all(p.is_alive() for p in processes)):
            self.unwrapped._state = AsyncState.DEFAULT  # amid a step, whose answer may never come
            [process.kill() for process in processes]
            self.env.close(terminate=True)
        self.env.close()

    def state_dict(self) -> dict:
        """Mean, variance and count of --normalize-obs, if they are kept."""
        names = ("mean", "var", "count") if self._normalizes else ()
        return {name: torch.as_tensor(np.asarray(getattr(self.env.obs_rms, name))) for name in names}

    def load_state_dict(self, state: dict):
        if self._normalizes:  # the count as Python's number, or NumPy would compute the rest in its precision
            vars(self.env.obs_rms).update({k: v.numpy().copy() if v.dim() else v.item() for k, v in state.items()})


def check_finite(name: str, values: np.ndarray):
    if not math.isfinite(values.sum()) and not np.isfinite(values).all():  # the sum costs half as much
        raise FloatingPointError(name)


def find_spec(env_id: str):
    """gymnasium's spec of an environment; raises UserError, with gymnasium's own words where it names a remedy."""
    package, _, name = env_id.rpartition(":")
    try:
        package = "ale_py" if env_id.startswith("ALE/") else package
        if package:
            if os.getcwd() not in sys.path:  # a package in the working directory, as `python -m` would find it
                sys.path.append(os.getcwd())
            __import__(package)
        return gym.spec(name)
    except ModuleNotFoundError as error:
        hint = ' (pip install -e ".[atari]")' if error.name == "ale_py" else ""
        raise UserError(f"--env-id {env_id}: there is no package {error.name!r} to import from here{hint}.") from None
    except gym.error.Error as error:
        raise UserError(f"--env-id {env_id}: {' '.join(str(error).split())}{newer(env_id)}") from None


def newer(env_id: str) -> str:
    """A hint for ids of former days."""
    return "".join(f" Did you mean {re.sub(o, n, env_id)}?" for o, n in TODAY.items() if re.fullmatch(o, env_id))


def check_spaces(envs, args, images: bool, discrete: bool):
    """Raises UserError, naming the spaces, for those that a script does not take."""
    obs, actions = envs.single_observation_space, envs.single_action_space
    vector = isinstance(obs, Box) and len(obs.shape) == 1
    image = images and isinstance(obs, Box) and len(obs.shape) == 3
    box = isinstance(actions, Box) and len(actions.shape) == 1 and actions.is_bounded() and actions.dtype.kind == "f"
    for fits, words in (
        (envs.metadata.get("autoreset_mode") == AutoresetMode.NEXT_STEP, "it must have the autoreset mode NEXT_STEP"),
        (vector or image or not images, "use vectors (gymnasium.wrappers.FlattenObservation) or images"),
        (not image or obs.dtype == np.uint8, "scale images to uint8, 0 to 255"),
        (not image or not obs.shape[2] < 36 <= obs.shape[0], "channels must come first: transpose images"),
        (not image or min(obs.shape[1:]) >= 36, "resize images to 36 x 36 or more"),
        (vector or images, "this script takes vectors; for images use a2c_sync.py or a3c_async.py"),
        (vector or not getattr(args, "normalize_obs", False), "--normalize-obs is for vectors"),
        (not isinstance(actions, MultiDiscrete), "make one Discrete of them, which an ActionWrapper takes apart"),
        (box or isinstance(actions, Discrete), "actions must be Discrete or a bounded one-dimensional float Box"),
        (box or discrete, "this script needs continuous actions; for discrete ones use off_policy_ac.py"),
    ):  # fmt: skip
        if not fits:
            spaces = f"It has observations {obs} and actions {actions}."
            raise UserError(f"{args.env_id}: {words}. {spaces}{newer(args.env_id)}")
