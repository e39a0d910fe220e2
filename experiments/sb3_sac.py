"""Stable-Baselines3's SAC with the settings of sac.py; writes a run folder that runs.py and plot.py can read.

pip install -e ".[bench,mujoco]"
python experiments/sb3_sac.py --env-id Hopper-v5 --total-timesteps 100000 --run-dir runs/sb3
"""

import csv
import json
import time
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Options:
    run_dir: str
    """folder to write, which must not exist"""
    env_id: str = "HalfCheetah-v5"
    """environment"""
    seed: int = 1
    """seed of networks, actions and the environment"""
    total_timesteps: int = 100_000
    """environment steps"""
    learning_starts: int = 10_000
    """environment steps before the first update"""
    num_threads: int = 1
    """CPU threads of torch"""


def main(options: Options):
    import gymnasium as gym
    import torch
    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    torch.set_num_threads(options.num_threads)
    torch.set_flush_denormal(True)  # changes its speed, not its returns
    folder = Path(options.run_dir)
    folder.mkdir(parents=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        metrics, start = csv.writer(file), time.perf_counter()
        metrics.writerow(["env_steps", "seconds", "tag", "value"])

        class Log(BaseCallback):
            def _on_step(self):
                for info in self.locals["infos"]:
                    if "episode" in info:
                        seconds = f"{time.perf_counter() - start:.3f}"
                        metrics.writerow([self.num_timesteps, seconds, "charts/episodic_return", info["episode"]["r"]])
                return True

        # Its defaults are those of sac.py: batches of 256, learning rates of 3e-4, τ = 0.005, two layers of 256
        model = SAC(
            "MlpPolicy", Monitor(gym.make(options.env_id)), seed=options.seed, learning_starts=options.learning_starts,
            device="cpu",
        )  # fmt: skip
        model.learn(options.total_timesteps, callback=Log())
        seconds = time.perf_counter() - start
    test = Monitor(gym.make(options.env_id))
    test.reset(seed=options.seed + 1_000_000)
    returns, _ = evaluate_policy(model, test, n_eval_episodes=20, deterministic=True, return_episode_rewards=True)
    results = {
        "env_steps": options.total_timesteps,
        "seconds": seconds,
        "sps": options.total_timesteps / seconds,
        "eval_return_mean": sum(returns) / len(returns),
        "eval_episodes": len(returns),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
