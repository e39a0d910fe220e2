"""make_envs: the only place that builds environments."""

import difflib
import multiprocessing
import os
import sys
import warnings

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorWrapper
from gymnasium.wrappers.vector import NormalizeObservation

from common.errors import UserError

EXTRAS = {"mujoco": "mujoco", "box2d": "box2d", "ale_py": "atari"}  # part of an entry point -> extra of pyproject.toml


def env_seed(seed: int, env_steps: int, *worker: int) -> int:
    """Seed for a reset of all environments (of a worker) at `env_steps`; environment i takes this plus i."""
    return int(np.random.SeedSequence([seed, env_steps, *worker]).generate_state(1)[0] >> 2)


def make_envs(args, num_envs: int | None = None, evaluation: bool = False, render: bool = False) -> "Envs":
    """Vector environment of `args.env_id` with autoreset NEXT_STEP; scripts and networks see actions in [-1, 1].

    `evaluation`: true rewards and frozen statistics; `render`: for Envs.picture. Raises UserError for an
    unknown environment, a missing extra or a space that no script supports.
    """
    flush_denormals()
    num_envs = num_envs or args.num_envs
    spec = find_spec(args.env_id)
    atari = spec.vector_entry_point == "ale_py.vector_env:AtariVectorEnv"
    native = args.vectorization == "auto" and spec.vector_entry_point is not None
    options = {}
    if atari:
        if not native:
            raise UserError(f"{args.env_id} has its own C++ vector environment; leave --vectorization at auto.")
        options["reward_clipping"] = False  # clipped by Envs, after the true return has been counted
    elif render:
        options |= {"vectorization_mode": "sync", "render_mode": "rgb_array"}
    elif not native:
        is_async = args.vectorization == "async"
        options["vectorization_mode"] = "async" if is_async else "sync"
        if is_async:  # a fork of this process could hang, its threads missing; a fork of a clean server imports once
            options |= {"vector_kwargs": {"context": "forkserver"}, "wrappers": [in_process]}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium's remarks on spaces; unsupported ones are refused below
            envs = gym.make_vec(spec, num_envs=num_envs, **options)
    except (ImportError, gym.error.Error) as error:
        raise missing_extra(args.env_id, str(spec.entry_point), error) from None
    if envs.metadata.get("autoreset_mode") != AutoresetMode.NEXT_STEP:
        raise UserError(f"{args.env_id} does not use gymnasium's autoreset mode NEXT_STEP, on which all scripts rely.")
    try:
        check_spaces(envs.single_observation_space, envs.single_action_space, args)
    except UserError:
        envs.close()
        raise
    envs = EpisodeStatistics(envs)
    if getattr(args, "normalize_obs", False):
        envs = NormalizeObservation(envs)
        envs.update_running_mean = not evaluation
    return Envs(envs, clip_rewards=atari and not evaluation)


class EpisodeStatistics(VectorWrapper):
    """As gymnasium's RecordEpisodeStatistics: infos["episode"] holds "r" and "l" of the episodes in infos["_episode"].

    A third of its cost, which for CartPole's native vector environment is half of a step.
    """

    def reset(self, **kwargs):
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        return self.env.reset(**kwargs)

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        self._returns += rewards  # of a step that only resets: 0
        self._lengths += 1
        ended = terminated | truncated
        for name in ("episode", "_episode"):  # an environment's own
            infos.pop(name, None)
        if ended.any():
            infos["_episode"] = ended
            infos["episode"] = {"r": self._returns.copy(), "l": self._lengths.copy()}
            self._returns[ended] = 0
            self._lengths[ended] = -1  # the next step only resets
        return obs, rewards, terminated, truncated, infos


class Envs(VectorWrapper):
    """What networks see: vectors as float32, actions of a Box in [-1, 1], Atari's rewards clipped (Mnih et al. 2015)."""

    def __init__(self, envs, clip_rewards: bool):
        super().__init__(envs)
        space = envs.single_observation_space
        if len(space.shape) == 1:
            self.single_observation_space = Box(-np.inf, np.inf, space.shape, np.float32)
        self._dtype = self.single_observation_space.dtype
        space = envs.single_action_space
        self._box = isinstance(space, Box)
        if self._box:
            self._bounds = space.low, space.high
            low, high = space.low.astype(np.float64), space.high.astype(np.float64)
            self._centre, self._half_range = (high + low) / 2, (high - low) / 2
            self.single_action_space = Box(-1.0, 1.0, space.shape, np.float32)
        else:
            self._start, self._action_dtype = int(space.start), space.dtype
            self.single_action_space = Discrete(int(space.n))  # 0 to n − 1, int64
        self._clip_rewards = clip_rewards

    def reset(self, **kwargs):
        obs, infos = self.env.reset(**kwargs)
        return obs.astype(self._dtype, copy=False), infos

    def step(self, actions: np.ndarray):
        if self._box:  # a Gaussian's sample may lie outside, and rounding may leave the bounds by a digit
            actions = self._centre + self._half_range * actions.clip(-1.0, 1.0)
            actions = actions.astype(self._bounds[0].dtype).clip(*self._bounds)
        elif self._start or self._action_dtype != actions.dtype:
            actions = (actions + self._start).astype(self._action_dtype)
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        if self._clip_rewards:
            rewards = rewards.clip(-1, 1)
        return obs.astype(self._dtype, copy=False), rewards, terminated, truncated, infos

    def close(self, terminate: bool = False):
        """`terminate`: do not wait for the answer of worker processes, one of which may have died."""
        in_processes = isinstance(self.unwrapped, AsyncVectorEnv)
        self.env.close(**({"terminate": True} if terminate and in_processes else {}))

    def picture(self, obs: np.ndarray) -> np.ndarray:
        """The first environment as an RGB picture (H, W, 3); Atari's does not render: what the agent sees, enlarged."""
        if self.render_mode == "rgb_array":
            return self.render()[0]
        return np.repeat(obs[0, -1].repeat(4, 0).repeat(4, 1)[..., None], 3, axis=-1)

    def state_dict(self) -> dict:
        """Statistics of the observation normalization, if there is one."""
        if not isinstance(self.env, NormalizeObservation):
            return {}
        rms = self.env.obs_rms  # --normalize-obs
        return {"mean": torch.from_numpy(rms.mean), "var": torch.from_numpy(rms.var), "count": float(rms.count)}

    def load_state_dict(self, state: dict):
        if isinstance(self.env, NormalizeObservation):
            rms = self.env.obs_rms
            rms.mean, rms.var, rms.count = state["mean"].numpy().copy(), state["var"].numpy().copy(), state["count"]


def find_spec(env_id: str):
    """gymnasium's spec of an environment; raises UserError with near matches."""
    if env_id.startswith("ALE/"):
        try:
            import ale_py

            gym.register_envs(ale_py)
        except ImportError:
            raise missing_extra(env_id, "ale_py") from None
    package, _, name = env_id.rpartition(":")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if package:
                if os.getcwd() not in sys.path:  # a package in the working directory, as `python -m` would find it
                    sys.path.append(os.getcwd())
                __import__(package)
            return gym.spec(name)
    except ModuleNotFoundError as error:
        raise UserError(f"--env-id {env_id}: there is no package {error.name!r} to import.") from None
    except gym.error.Error:
        near = [env_id[: -len(name)] + each for each in difflib.get_close_matches(name, gym.registry, n=3)]
        hint = f"did you mean {' or '.join(near)}?" if near else "see gymnasium.pprint_registry() for those there are."
        raise UserError(f"There is no environment {env_id!r}; {hint}") from None


def missing_extra(env_id: str, entry_point: str, error: Exception | None = None) -> UserError:
    for part, extra in EXTRAS.items():
        if part in entry_point:
            return UserError(f'{env_id} needs an extra: pip install -e ".[{extra}]"')
    return UserError(f"{env_id} cannot be built: {error}")


def check_spaces(observation_space, action_space, args):
    """Raises UserError, naming the space and what to use instead, for spaces that no script supports."""
    shape = observation_space.shape if isinstance(observation_space, Box) else None
    if shape is None or len(shape) not in (1, 3):
        raise UserError(
            f"The observation space {observation_space} is not supported; "
            "gymnasium.wrappers.FlattenObservation makes it a vector."
        )
    if len(shape) == 3 and (observation_space.dtype != np.uint8 or shape[0] > 16 or min(shape[1:]) < 36):
        raise UserError(
            f"Images must be uint8, channels first and at least 36 x 36, not {observation_space}; "
            "gymnasium.wrappers.TransformObservation can bring them there."
        )
    if len(shape) == 3 and getattr(args, "normalize_obs", False):
        raise UserError("--normalize-obs is for vectors; images are scaled in the network.")
    bounded = isinstance(action_space, Box) and len(action_space.shape) == 1 and action_space.is_bounded()
    bounded = bounded and np.issubdtype(action_space.dtype, np.floating)
    if not bounded and not isinstance(action_space, Discrete):
        raise UserError(
            f"The action space {action_space} is not supported; use Discrete or a bounded one-dimensional float Box "
            "(gymnasium.wrappers.TransformAction maps others to it)."
        )


def in_process(env):
    """In a worker process: Ctrl-C and SIGTERM of a process group are for the main process, which then ends its workers."""
    if multiprocessing.parent_process() is not None:
        os.setpgrp()
        flush_denormals()
    return env


def flush_denormals():
    """Numbers below 1e-38 (float64: 1e-308) become 0, in every process that has environments, which see it, too.

    Adam's moments of dead units end there, and as denormals make its step several times as slow (docs/sac.md). Threads that torch
    has already started keep their setting.
    """
    torch.set_flush_denormal(True)
