"""make_envs: the only place that builds environments."""

import importlib.util
import math
import multiprocessing
import os
import re
import sys
import warnings
from functools import partial

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorWrapper
from gymnasium.wrappers.vector import NormalizeObservation

from common import ranks
from common.checkpoint import seed_generators
from common.flags import NotFinite, UserError


def make_envs(args, num_envs=None, evaluation=False, render=False, images=True, discrete=True) -> "Envs":
    """Vector environment of `args.env_id` with autoreset NEXT_STEP.

    `evaluation`: true rewards, frozen statistics, a seed for each environment; `render`: as rgb_array; `images`,
    `discrete`: whether the script takes such observations and actions. Raises UserError for what it cannot train on.
    """
    # Numbers below 1e-38 (float64: 1e-308) become 0, in every process that has environments, which see it, too. Adam's
    # moments of dead units end there, and as denormals make its step several times as slow (docs/sac.md)
    torch.set_flush_denormal(True)
    spec = find_spec(args.env_id)
    atari = spec.vector_entry_point == "ale_py.vector_env:AtariVectorEnv"
    # A native vector environment draws all starts from one seed: evaluation takes single ones where there are any
    native = args.vectorization == "auto" and spec.vector_entry_point and not (evaluation and spec.entry_point)
    options = {"vectorization_mode": "sync", "vector_kwargs": {"copy": False}, "wrappers": [WithoutInfos]}
    if atari:
        if args.vectorization != "auto":
            raise UserError(f"{args.env_id} has its own C++ vector environment; leave --vectorization at auto.")
        options = {"reward_clipping": False}  # clipped by Envs, after the true return has been counted
    elif render:
        options["render_mode"] = "rgb_array"
    elif native:
        options = {}
    elif args.vectorization == "async" and not evaluation:  # a fork of this process could hang, its threads missing
        context = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        multiprocessing.set_forkserver_preload(["torch", "gymnasium"])  # imported once, not in every process
        options["vectorization_mode"], options["wrappers"] = "async", [partial(InProcess, os.getpid())]
        # Daemons may have no processes of their own
        options["vector_kwargs"] |= {"context": context, "daemon": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium's remarks on spaces; unsupported ones are refused below
            envs = gym.make_vec(spec, num_envs=num_envs or args.num_envs, **options, **args.env_kwargs)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = " (--env-kwargs gives arguments)" if isinstance(error, TypeError) else similar(args.env_id)
        raise UserError(f"{args.env_id} cannot be built. {reason}{remedy}") from error
    try:
        if envs.metadata.get("autoreset_mode") != AutoresetMode.NEXT_STEP:
            raise UserError(f"{args.env_id} does not use gymnasium's autoreset mode NEXT_STEP, which all scripts need.")
        check_spaces(envs.single_observation_space, envs.single_action_space, args, images, discrete)
    except UserError:
        envs.close()
        raise
    reward_scale = 1.0 if evaluation else getattr(args, "reward_scale", 1.0)
    return Envs(envs, getattr(args, "normalize_obs", False), evaluation, atari, reward_scale)


class WithoutInfos(gym.Wrapper):
    """Nobody reads an environment's infos, and those of several environments need not fit together."""

    def reset(self, **kwargs):
        return self.env.reset(**kwargs)[0], {}

    def step(self, action):
        return *self.env.step(action)[:4], {}


class InProcess(WithoutInfos):
    """One environment in a process of its own. (gymnasium also builds one in the main process, for its spaces.)"""

    def __init__(self, main: int, env):
        super().__init__(env)
        if os.getpid() != main and hasattr(os, "setpgrp"):
            os.setpgrp()  # Ctrl-C and SIGTERM of a process group are for the main process, which then ends this one
        torch.set_flush_denormal(True)

    def reset(self, *, seed=None, **kwargs):
        if seed is not None:
            seed_generators(seed)  # the global ones, from which it may draw
        return super().reset(seed=seed, **kwargs)


class Envs(VectorWrapper):
    """gymnasium's vector environment as scripts and networks see it; instead of infos, step() returns ended episodes.

    Vectors are float32, actions of a Box lie in [-1, 1], those of Discrete start at 0, Atari's rewards are clipped
    (Mnih et al. 2015). gymnasium's wrappers loop over the environments, and its RecordEpisodeStatistics is slower.
    `obs_spec`, `action_spec`: shape and dtype of one entry; `num_actions`: choices if `discrete`, else dimensions.
    """

    def __init__(self, envs, normalize: bool, evaluation: bool, atari: bool, reward_scale: float = 1.0):
        super().__init__(NormalizeObservation(envs) if normalize else envs)
        self._normalizes = normalize
        if normalize:
            self.env.update_running_mean = not evaluation
            if ranks.SIZE > 1 and not evaluation:
                self.env.obs_rms.update = ranks.Moments(self.env.obs_rms)
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
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        obs = np.array(self.env.reset(seed=seed)[0], self.obs_spec[1])
        check_finite("observation", obs)
        return obs, {}

    def step(self, actions: np.ndarray):
        """obs, rewards, terminated, truncated, and (environment, return, length) of each episode that ended.

        Copies: an environment may use its arrays again.
        """
        if not self.discrete:  # a Gaussian's sample may lie outside, and rounding may leave the bounds by a digit
            check_finite("action", actions)
            actions = self._center + self._half_range * actions.clip(-1.0, 1.0)
            actions = actions.astype(self._bounds[0].dtype).clip(*self._bounds)
        elif self._start or self._action_dtype != actions.dtype:
            actions = (actions + self._start).astype(self._action_dtype)
        try:
            obs, rewards, terminated, truncated = map(np.array, self.env.step(actions)[:4])
        except (EOFError, ConnectionError):  # of a pipe to a process
            codes = [process.exitcode for process in getattr(self.unwrapped, "processes", [])]
            raise UserError(f"A process of an environment has died; exit codes {codes} (-9: out of memory?).") from None
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
        if self._reward_scale != 1:
            rewards = rewards * self._reward_scale
        return obs, rewards, terminated, truncated, episodes

    def close(self, terminate: bool = False):
        """`terminate`: do not wait for the answer of environments' processes, one of which may have died."""
        if terminate and isinstance(self.unwrapped, AsyncVectorEnv) and not self.unwrapped.closed:
            self.unwrapped.closed = True
            for process in self.unwrapped.processes:
                process.kill()
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
            spec = gym.spec(name)
    except ModuleNotFoundError as error:
        remedy = f"there is no package {error.name!r} to import from here"
        if error.name == "ale_py":
            remedy = 'pip install -e ".[atari]"'
        raise UserError(f"--env-id {env_id}: {remedy}.") from None
    except gym.error.Error as error:
        raise UserError(f"--env-id {env_id}: {' '.join(str(error).split())}{similar(env_id)}") from None
    if str(spec.entry_point).startswith("__main__:"):
        raise UserError(f"{env_id} is registered as a string in __main__; give gymnasium.register the class itself.")
    return spec


def similar(env_id: str) -> str:
    """A hint for an id that has another name or version today."""
    if importlib.util.find_spec("ale_py"):
        import ale_py

        gym.register_envs(ale_py)
    env_id = env_id.rpartition(":")[2]
    base = re.sub(r"-v\d+$|NoFrameskip|Deterministic|-ram", "", env_id.rpartition("/")[2]).lower()
    found = [name for name in gym.registry if name.rpartition("/")[2].rpartition("-v")[0].lower() == base != ""]
    newest = max(found, key=lambda name: int(name.rpartition("-v")[2] or 0), default=env_id)
    return "" if newest == env_id else f" Did you mean {newest}?"


def check_spaces(obs_space, action_space, args, images: bool, discrete: bool):
    """Raises UserError, naming the spaces and what to use instead, for those that a script does not take."""
    dims = len(obs_space.shape) if isinstance(obs_space, Box) else 0
    channels_first = dims == 3 and obs_space.dtype == np.uint8 and min(obs_space.shape[1:]) >= 36
    box = isinstance(action_space, Box) and len(action_space.shape) == 1 and action_space.is_bounded()
    box = box and np.issubdtype(action_space.dtype, np.floating)
    remedy = {
        2: "ReshapeObservation adds the channel to a grey image, FlattenObservation makes a vector",
        3: "TransformObservation with x.transpose(2, 0, 1) puts channels first",
        4: "ReshapeObservation turns stacked frames into channels",
    }.get(dims, "FlattenObservation makes a vector")
    for fits, words in (
        (dims == 1 or channels_first or dims == 3 and not images, "use vectors or images of uint8, (channels, height, "
         f"width), at least 36 x 36; of gymnasium.wrappers, {remedy}"),
        (dims == 1 or images, "this script takes vectors; for images use a2c_sync.py or a3c_async.py"),
        (dims == 1 or not getattr(args, "normalize_obs", False), "--normalize-obs is for vectors"),
        (box or isinstance(action_space, Discrete), "actions must be Discrete or a bounded one-dimensional float Box"),
        (box or discrete, "this script needs continuous actions; for discrete ones use off_policy_ac.py"),
    ):  # fmt: skip
        if not fits:
            spaces = f"{args.env_id} has observations {obs_space} and actions {action_space}"
            raise UserError(f"{spaces}: {words}.{similar(args.env_id)}")
