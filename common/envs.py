"""make_envs: the only place that builds environments."""

import math
import os
import sys
import warnings

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorWrapper
from gymnasium.wrappers.vector import NormalizeObservation

from common.flags import NotFinite, UserError


def env_seed(seed: int, env_steps: int, *worker: int) -> int:
    """Seed for a reset of all environments (of a worker) at `env_steps`; environment i takes this plus i."""
    return int(np.random.SeedSequence([seed, env_steps, *worker]).generate_state(1)[0] >> 2)


def make_envs(args, num_envs=None, evaluation=False, render=False, images=True, discrete=True) -> "Envs":
    """Vector environment of `args.env_id` with autoreset NEXT_STEP.

    `evaluation`: true rewards and frozen statistics; `render`: as rgb_array; `images`, `discrete`: whether the script
    takes such observations and actions. Raises UserError for an environment or a space that it cannot train on.
    """
    # Numbers below 1e-38 (float64: 1e-308) become 0, in every process that has environments, which see it, too. Adam's
    # moments of dead units end there, and as denormals make its step several times as slow (docs/sac.md)
    torch.set_flush_denormal(True)
    spec = find_spec(args.env_id)
    atari = spec.vector_entry_point == "ale_py.vector_env:AtariVectorEnv"
    native = args.vectorization == "auto" and spec.vector_entry_point is not None
    options = {"vectorization_mode": "sync", "wrappers": [WithoutInfos]}
    if atari:
        if not native:
            raise UserError(f"{args.env_id} has its own C++ vector environment; leave --vectorization at auto.")
        options = {"reward_clipping": False}  # clipped by Envs, after the true return has been counted
    elif render:
        options |= {"render_mode": "rgb_array"}
    elif native:
        options = {}
    elif args.vectorization == "async":  # a fork of this process could hang, its threads missing
        options |= {"vectorization_mode": "async", "vector_kwargs": {"context": "forkserver"}}
        options["wrappers"] = [WithoutInfos, in_process]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium's remarks on spaces; unsupported ones are refused below
            envs = gym.make_vec(spec, num_envs=num_envs or args.num_envs, **options)
    except (ImportError, gym.error.Error) as error:
        raise UserError(f"{args.env_id} cannot be built: {' '.join(str(error).split())}") from None
    try:
        if envs.metadata.get("autoreset_mode") != AutoresetMode.NEXT_STEP:
            raise UserError(f"{args.env_id} does not use gymnasium's autoreset mode NEXT_STEP, which all scripts need.")
        check_spaces(envs.single_observation_space, envs.single_action_space, args, images, discrete)
    except UserError:
        envs.close()
        raise
    return Envs(envs, getattr(args, "normalize_obs", False), evaluation, clip_rewards=atari and not evaluation)


class WithoutInfos(gym.Wrapper):
    """Nobody reads an environment's infos, and those of several environments need not fit together."""

    def reset(self, **kwargs):
        return self.env.reset(**kwargs)[0], {}

    def step(self, action):
        return *self.env.step(action)[:4], {}


class Envs(VectorWrapper):
    """gymnasium's vector environment as scripts and networks see it; instead of infos, step() returns ended episodes.

    Vectors are float32, actions of a Box lie in [-1, 1], those of Discrete start at 0, Atari's rewards are clipped
    (Mnih et al. 2015). gymnasium's wrappers loop over the environments; its RecordEpisodeStatistics takes thrice as long.
    `obs_spec`, `action_spec`: shape and dtype of one entry; `num_actions`: choices if `discrete`, else dimensions.
    """

    def __init__(self, envs, normalize: bool, evaluation: bool, clip_rewards: bool):
        super().__init__(NormalizeObservation(envs) if normalize else envs)
        self._normalizes = normalize
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
        self._clip_rewards = clip_rewards

    def reset(self, **kwargs):
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        obs = self.env.reset(**kwargs)[0].astype(self.obs_spec[1], copy=False)
        check_finite("observation", obs)
        return obs, {}

    def step(self, actions: np.ndarray):
        """obs, rewards, terminated, truncated, and (environment, return, length) of each episode that ended."""
        if not self.discrete:  # a Gaussian's sample may lie outside, and rounding may leave the bounds by a digit
            check_finite("action", actions)
            actions = self._center + self._half_range * actions.clip(-1.0, 1.0)
            actions = actions.astype(self._bounds[0].dtype).clip(*self._bounds)
        elif self._start or self._action_dtype != actions.dtype:
            actions = (actions + self._start).astype(self._action_dtype)
        obs, rewards, terminated, truncated, _ = self.env.step(actions)
        obs = obs.astype(self.obs_spec[1], copy=False)
        check_finite("observation", obs)
        check_finite("reward", rewards)
        self._returns += rewards  # of a step that only resets: 0
        self._lengths += 1
        episodes = []
        for i in np.flatnonzero(terminated | truncated).tolist():
            episodes.append((i, float(self._returns[i]), int(self._lengths[i])))
            self._returns[i], self._lengths[i] = 0, -1  # the next step only resets
        if self._clip_rewards:
            rewards = rewards.clip(-1, 1)
        return obs, rewards, terminated, truncated, episodes

    def close(self, terminate: bool = False):
        """`terminate`: do not wait for the answer of worker processes, one of which may have died."""
        in_processes = isinstance(self.unwrapped, AsyncVectorEnv)
        self.env.close(**({"terminate": True} if terminate and in_processes else {}))

    def state_dict(self) -> dict:
        """Mean, variance and count of --normalize-obs, if they are kept."""
        return {k: torch.as_tensor(v) for k, v in vars(self.env.obs_rms).items()} if self._normalizes else {}

    def load_state_dict(self, state: dict):
        if self._normalizes:
            vars(self.env.obs_rms).update({name: value.numpy().copy() for name, value in state.items()})


def check_finite(name: str, values: np.ndarray):
    if not math.isfinite(values.sum()) and not np.isfinite(values).all():  # the sum costs half as much
        raise NotFinite(name)


def find_spec(env_id: str):
    """gymnasium's spec of an environment; raises UserError, with gymnasium's own words where it names a remedy."""
    package, _, name = env_id.rpartition(":")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if env_id.startswith("ALE/"):
                import ale_py

                gym.register_envs(ale_py)
            elif package:
                if os.getcwd() not in sys.path:  # a package in the working directory, as `python -m` would find it
                    sys.path.append(os.getcwd())
                __import__(package)
            return gym.spec(name)
    except ModuleNotFoundError as error:
        remedy = (
            'pip install -e ".[atari]"' if error.name == "ale_py" else f"there is no package {error.name!r} to import"
        )
        raise UserError(f"--env-id {env_id}: {remedy}.") from None
    except gym.error.Error as error:
        raise UserError(f"--env-id {env_id}: {error}") from None


def check_spaces(obs_space, action_space, args, images: bool, discrete: bool):
    """Raises UserError, naming the spaces and what to use instead, for those that a script does not take."""
    vector = isinstance(obs_space, Box) and len(obs_space.shape) == 1
    image = isinstance(obs_space, Box) and len(obs_space.shape) == 3
    box = isinstance(action_space, Box) and len(action_space.shape) == 1 and action_space.is_bounded()
    box = box and np.issubdtype(action_space.dtype, np.floating)
    uint8 = image and obs_space.dtype == np.uint8 and obs_space.shape[0] <= 16 and min(obs_space.shape[1:]) >= 36
    for fits, remedy in (
        (vector or image, "gymnasium.wrappers.FlattenObservation makes observations a vector"),
        (vector or images, "this script takes vectors; for images use a2c_sync.py or a3c_async.py"),
        (
            vector or uint8,
            "images must be uint8, channels first and at least 36 x 36 (TransformObservation maps others)",
        ),
        (vector or not getattr(args, "normalize_obs", False), "--normalize-obs is for vectors"),
        (box or isinstance(action_space, Discrete), "actions must be Discrete or a bounded one-dimensional float Box"),
        (box or discrete, "this script needs continuous actions; for discrete ones use off_policy_ac.py"),
    ):
        if not fits:
            raise UserError(f"{args.env_id} has observations {obs_space} and actions {action_space}: {remedy}.")


def in_process(env):
    """In a process of its own: Ctrl-C and SIGTERM of a process group are for the main process, which then ends it."""
    os.setpgrp()
    torch.set_flush_denormal(True)
    return env
