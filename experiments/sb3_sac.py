"""Stable-Baselines3's SAC with the settings of sac.py, as the laboratory runs it, and with the files that it reads.

pip install -e ".[bench,mujoco]"
python experiments/sb3_sac.py --env-id Hopper-v5 --total-timesteps 100000 --run-dir runs/sb3
"""

import csv
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import tyro  # noqa: E402

from common.checkpoint import env_seed  # noqa: E402


@dataclass
class Options:
    run_dir: str = ""
    """folder to write, which must not exist"""
    resume: str = ""
    """folder of a run to go on with from its last checkpoint, with its flags; not exactly, as SB3 cannot"""
    env_id: str = "HalfCheetah-v5"
    """environment"""
    seed: int = 1
    """seed of networks, actions and the environment"""
    total_timesteps: int = 100_000
    """environment steps"""
    learning_starts: int = 10_000
    """environment steps before the first update"""
    checkpoint_every: int = 100_000
    """environment steps between checkpoints"""
    eval_episodes: int = 20
    """episodes of the greedy evaluation, from the starts that our scripts are evaluated on"""


def main(options: Options):
    import gymnasium as gym
    import torch
    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.monitor import Monitor

    if not (options.run_dir or options.resume):
        sys.exit("Give --run-dir or --resume.")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # changes its speed, not its returns
    folder, rows, before = Path(options.resume or options.run_dir), [], 0.0
    checkpoint, buffer, metrics = (folder / name for name in ("checkpoint.pt", "buffer.pkl", "metrics.csv"))
    if options.resume:
        options = Options(**json.loads((folder / "args.json").read_text()))
        model = SAC.load(checkpoint, Monitor(gym.make(options.env_id)), device="cpu")
        model.load_replay_buffer(buffer)
        rows = [row for row in csv.reader(metrics.open()) if row[0].isdigit() and int(row[0]) <= model.num_timesteps]
        before = float(rows[-1][1]) if rows else 0.0
    else:
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps(asdict(options), indent=2))
        # Its defaults are those of sac.py with --critic-lr 3e-4: batches of 256, τ = 0.005, two layers of 256
        model = SAC(
            "MlpPolicy", Monitor(gym.make(options.env_id)), seed=options.seed, learning_starts=options.learning_starts,
            device="cpu",
        )  # fmt: skip
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
                if self.num_timesteps % options.checkpoint_every == 0:
                    file.flush()
                    for save, path in ((model.save_replay_buffer, buffer), (model.save, checkpoint)):
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
            obs, _, terminated, truncated, info = test.step(model.predict(obs, deterministic=True)[0])
            ended = terminated or truncated
        returns.append(float(info["episode"]["r"]))
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
