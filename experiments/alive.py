"""What training has done to a run's shared trunk of images: ReLUs that no frame lifts above 0 learn nothing any more.

    python a3c_async.py --env-id ALE/Pong-v5 --network shared --total-timesteps 200000 --run-dir runs/pong
    python experiments/alive.py runs/pong

Prints, before and after training, for every layer the share of its features (of a convolution: channels) that are above
0 in some frame, and how far its outputs differ between frames, as a share of their length; and the standard deviation of V.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
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
        print(f"{name} training: std of V {agent.critic(agent.trunk(frames)).std():.3f}")
        outputs = frames / 255.0
        for module in agent.trunk.modules():
            if not isinstance(module, (nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten)):
                continue  # a container
            outputs = module(outputs)
            if isinstance(module, nn.ReLU):
                highest = outputs.amax([dim for dim in range(outputs.dim()) if dim != 1])
                length, difference = outputs.flatten(1).norm(dim=1).mean(), (outputs - outputs.mean(0)).flatten(1)
                print(
                    f"    {(highest > 0).float().mean():4.0%} of {len(highest):3} alive, "
                    f"frames differ by {difference.norm(dim=1).mean() / length:.1%}"
                )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
