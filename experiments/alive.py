"""How many features of a run's shared trunk still live: ReLUs that no frame lifts above 0 learn nothing any more.

    python a3c_async.py --env-id ALE/Pong-v5 --network shared --num-steps 16 --total-timesteps 1000000 --run-dir runs/pong
    python experiments/alive.py runs/pong

Prints the share of features above 0 in some frame, and how far V differs between frames, before and after training.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from runs import ROOT

sys.path.insert(0, str(ROOT))

from common.envs import make_envs  # noqa: E402
from common.evaluate import load_agent  # noqa: E402


@dataclass
class Options:
    run_dir: tyro.conf.Positional[str]
    """run folder, of --network shared"""
    steps: int = 150
    """steps with random actions, in four environments"""


@torch.no_grad()
def main(options: Options):
    trained, args, env_state, _ = load_agent(options.run_dir)
    envs = make_envs(args, 4, evaluation=True)
    envs.load_state_dict(env_state)
    obs, _ = envs.reset(seed=0)
    envs.action_space.seed(0)
    frames = [obs] + [envs.step(envs.action_space.sample())[0].copy() for _ in range(options.steps)]
    frames = torch.from_numpy(np.concatenate(frames))
    torch.manual_seed(args.seed)
    fresh = type(trained)(envs.single_observation_space, envs.single_action_space, args)
    envs.close()
    for name, agent in (("before", fresh), ("after", trained)):
        features = agent.trunk(frames)
        alive = (features.amax(0) > 0).float().mean()
        print(
            f"{name} training: {alive:.0%} of {features.shape[1]} features alive, std of V {agent.critic(features).std():.3f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
