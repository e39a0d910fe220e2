"""Stable-Baselines3's A2C, PPO and SAC, as the laboratory runs our scripts, and with the files that it reads.

The flags are those that its authors publish for the task. One thread, on the CPU.

pip install -e ".[bench,mujoco,box2d]"
python experiments/peers.py --algorithm sac --env-id Hopper-v5 --total-timesteps 100000
"""

import csv
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import tyro  # noqa: E402

from common.checkpoint import env_seed  # noqa: E402

# https://github.com/DLR-RM/rl-baselines3-zoo/tree/master/hyperparams; its environments are a version older.
# A rate in a list falls linearly to 0, and `normalize` is VecNormalize of observations and rewards.
MUJOCO = {"learning_starts": 10_000}
FLAGS = {
    ("a2c", "CartPole"): {"n_envs": 8, "ent_coef": 0.0},
    ("a2c", "Acrobot"): {"n_envs": 16, "normalize": True, "ent_coef": 0.0},
    ("a2c", "LunarLander"): {"n_envs": 8, "gamma": 0.995, "n_steps": 5, "learning_rate": [8.3e-4], "ent_coef": 1e-5},
    ("a2c", "BipedalWalker"): {
        "n_envs": 16, "normalize": True, "ent_coef": 0.0, "max_grad_norm": 0.5, "n_steps": 8, "gae_lambda": 0.9,
        "vf_coef": 0.4, "gamma": 0.99, "use_rms_prop": True, "normalize_advantage": False, "learning_rate": [9.6e-4],
        "use_sde": True, "policy_kwargs": {"log_std_init": -2, "ortho_init": False},
    },
    ("ppo", "LunarLander"): {
        "n_envs": 16, "n_steps": 1024, "batch_size": 64, "gae_lambda": 0.98, "gamma": 0.999, "n_epochs": 4,
        "ent_coef": 0.01,
    },
    **{("sac", task): MUJOCO for task in ("HalfCheetah", "Hopper", "Walker2d")},
}  # fmt: skip


@dataclass
class Options:
    algorithm: Literal["a2c", "ppo", "sac"] = "sac"
    """which of Stable-Baselines3's"""
    run_dir: str = ""
    """folder to write, which must not exist; by default runs/sb3_..., named after algorithm, environment and seed"""
    resume: str = ""
    """folder of a run to go on with from its last checkpoint, with its flags; not exactly, as SB3 cannot"""
    env_id: str = "HalfCheetah-v5"
    """environment"""
    seed: int = 1
    """seed of networks, actions and environments"""
    total_timesteps: int = 100_000
    """environment steps"""
    checkpoint_every: int = 100_000
    """environment steps between checkpoints"""
    eval_episodes: int = 20
    """episodes of the greedy evaluation, from the starts that our scripts are evaluated on"""


def main(options: Options):
    import gymnasium as gym
    import stable_baselines3
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # changes its speed, not its returns
    script, resumed, rows, before = f"sb3_{options.algorithm}", bool(options.resume), [], 0.0
    folder = Path(options.resume or options.run_dir or f"runs/{script}__{options.env_id}__{options.seed}")
    checkpoint, buffer, normal, metrics = (
        folder / f for f in ("checkpoint.pt", "buffer.pkl", "vec.pkl", "metrics.csv")
    )
    if resumed:
        options = Options(**{k: v for k, v in json.loads((folder / "args.json").read_text()).items() if k != "script"})
    algorithm = getattr(stable_baselines3, options.algorithm.upper())
    if (task := (options.algorithm, options.env_id.partition("-")[0])) not in FLAGS:
        sys.exit(f"There are flags for {', '.join(map(' '.join, FLAGS))}, and not for {' '.join(task)}.")
    flags = dict(FLAGS[task])
    num_envs, normalize = flags.pop("n_envs", 1), flags.pop("normalize", False)
    if isinstance(flags.get("learning_rate"), list):
        (rate,) = flags["learning_rate"]
        flags["learning_rate"] = lambda left: rate * left
    envs = DummyVecEnv([lambda: Monitor(gym.make(options.env_id))] * num_envs)
    if normalize and resumed:
        envs = VecNormalize.load(normal, envs)
    elif normalize:
        envs = VecNormalize(envs, gamma=flags.get("gamma", 0.99))
    if resumed:
        model = algorithm.load(checkpoint, envs, device="cpu")
        model.set_random_seed(options.seed + model.num_timesteps)  # else it would draw again what it drew first
        if buffer.exists():
            model.load_replay_buffer(buffer)
        rows = [row for row in csv.reader(metrics.open()) if row[0].isdigit() and int(row[0]) <= model.num_timesteps]
        before = float(rows[-1][1]) if rows else 0.0
    else:
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps({"script": script} | asdict(options), indent=2))
        model = algorithm("MlpPolicy", envs, seed=options.seed, device="cpu", **flags)
    saved = [(model.save, checkpoint)]  # the last to be written: a folder that has it is whole
    saved += [(envs.save, normal)] if normalize else []
    saved += [(model.save_replay_buffer, buffer)] if options.algorithm == "sac" else []
    with metrics.open("w", newline="") as file:
        log, start = csv.writer(file), time.perf_counter() - before
        log.writerows([["env_steps", "seconds", "tag", "value"], *rows])
        file.flush()  # a kill before the next checkpoint must not lose them

        class Log(BaseCallback):
            def _on_step(self):
                for info in self.locals["infos"]:
                    if "episode" in info:
                        seconds = f"{time.perf_counter() - start:.3f}"
                        log.writerow([self.num_timesteps, seconds, "charts/episodic_return", info["episode"]["r"]])
                if self.num_timesteps % options.checkpoint_every < num_envs:
                    file.flush()
                    for save, path in reversed(saved):
                        unfinished = path.with_name(f"unfinished{path.suffix}")  # a kill leaves the one before
                        save(unfinished)
                        unfinished.replace(path)
                return True

        model.learn(options.total_timesteps - model.num_timesteps, callback=Log(), reset_num_timesteps=False)
        seconds = time.perf_counter() - start
    test, returns = Monitor(gym.make(options.env_id)), []
    for i in range(options.eval_episodes):
        (obs, _), ended = test.reset(seed=env_seed(0, 2**62, i)), False
        while not ended:
            obs = envs.normalize_obs(obs) if normalize else obs
            obs, _, terminated, truncated, info = test.step(model.predict(obs, deterministic=True)[0])
            ended = terminated or truncated
        returns.append(float(info["episode"]["r"]))
    results = {
        "env_steps": model.num_timesteps,
        "seconds": seconds,
        "sps": model.num_timesteps / seconds,
        "eval_return_mean": sum(returns) / len(returns),
        "eval_episodes": len(returns),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"greedy return {results['eval_return_mean']:.1f}, run folder {folder}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
