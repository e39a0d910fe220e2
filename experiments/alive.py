"""What training has done to a run's shared trunk of images: ReLUs that no frame lifts above 0 learn nothing any more.

    python a3c_async.py --env-id ALE/Pong-v5 --network shared --total-timesteps 200000 --run-dir runs/pong
    python experiments/alive.py runs/pong

Prints, before and after training, for every layer the share of its features (of a convolution: channels) that are above
0 in some frame, and how far its outputs differ between frames, as a share of their length; the standard deviation of V;
and how much faster gradient descent moves V's mean over frames than differences between them: the gain of the mean
and the largest of a difference, in the Gram matrix of V's gradients at about 24 frames, divided by their number.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.envs import make_envs  # noqa: E402
from evaluate import load_agent  # noqa: E402


@dataclass
class Options:
    run_dir: tyro.conf.Positional[str]
    """run folder, of --network shared"""
    steps: int = 150
    """steps with random actions, in four environments"""


@torch.enable_grad()
def gains(agent: nn.Module, frames: torch.Tensor) -> tuple[float, float]:
    """<grad V(s_i), grad V(s_j)> / K of K frames: its gain for V's mean over them, the largest for what is left."""
    parameters = [*agent.encoder.parameters(), *agent.critic.parameters()]
    values = [agent.critic(agent.encoder(frame[None])).sum() for frame in frames]
    gradients = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(v, parameters)]) for v in values])
    differences = gradients - gradients.mean(0)
    of_differences = torch.linalg.eigvalsh(differences @ differences.T)[-1] / len(frames)
    return gradients.mean(0).square().sum().item(), of_differences.item()


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
    fresh = importlib.import_module(type(args).__module__).make_agent(envs, args)
    envs.close()
    for name, agent in (("before", fresh), ("after", trained)):
        print(f"{name} training: std of V {agent.critic(agent.encoder(frames)).std():.3f}")
        of_mean, of_differences = gains(agent, frames[:: max(1, len(frames) // 24)])
        print(f"    gain of V's mean {of_mean:.3g}, of differences between frames at most {of_differences:.3g}")
        outputs = frames / 255.0
        for module in agent.encoder.modules():
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
