"""What ranks do in test_ranks.py; a module of its own, which their processes import."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from gymnasium.wrappers.utils import RunningMeanStd

import a2c_sync
from common import ranks
from common.ranks import GradientSum, Moments

CASES = {
    "separate": {"network": "separate", "max_grad_norm": None},
    "shared, clipped": {"network": "shared", "max_grad_norm": 0.5},
    "separate, clipped, Adam": {"network": "separate", "max_grad_norm": 0.5, "optimizer": "adam"},
    "pixels": {"network": "shared", "max_grad_norm": 0.5, "images": True},
    "box": {"network": "separate", "max_grad_norm": 0.5, "discrete": False},
}
T, N = 4, 7  # 7 environments: two or three ranks have unequal shares


def job(case):
    """Agent, optimizer, flags and three rollouts of the whole job."""
    flags = dict(CASES[case])
    images, discrete = flags.pop("images", False), flags.pop("discrete", True)
    torch.manual_seed(0)
    args = a2c_sync.Args(actor_lr=1e-2, ent_coef=0.05, num_envs=N, num_steps=T, **flags)
    obs_shape = (2, 36, 36) if images else (3,)
    agent = a2c_sync.ActorCritic(obs_shape, 2, discrete, args.network == "shared")
    rollouts = []
    for k in range(3):
        obs = torch.rand(T + 1, N, *obs_shape) if not images else torch.randint(256, (T + 1, N, *obs_shape))
        done = (torch.rand(T + 1, N) < 0.2).float()
        if k == 1:
            done[:, : N // 3 + 1] = 1  # the first rank has less to learn from; of three, it has nothing
        actions = torch.randint(2, (T, N)) if discrete else torch.rand(T, N, 2) * 2 - 1
        rewards, terminated = torch.randn(T, N) + torch.arange(N), done[1:] * (torch.rand(T, N) < 0.5)
        rollouts.append(a2c_sync.Rollout(obs.to(torch.uint8) if images else obs, actions, rewards, terminated, done))
    if not images:  # in double precision, where rounding is far from what an error would be
        agent, rollouts = agent.double(), [a2c_sync.Rollout(*map(double, rollout)) for rollout in rollouts]
    return agent, a2c_sync.make_optimizer(agent, args), args, rollouts


def double(x):
    return x.double() if x.is_floating_point() else x


def learn(case, columns=slice(None), share=None, around=lambda agent, share: None):
    """Parameters after three updates on these environments, and the trunk's metrics before the first."""
    agent, optimizer, args, rollouts = job(case)
    state = SimpleNamespace(share=1.0)
    reduce = around(agent, lambda: state.share) or (lambda gradient: gradient)
    trunk = {}
    for k, rollout in enumerate(rollouts):
        batch = a2c_sync.Rollout(*(x[:, columns] for x in rollout))
        state.share = share(batch) if share else 1.0
        if k == 0 and args.network == "shared":
            trunk = a2c_sync.trunk_gradients(agent, batch, args, reduce)
        a2c_sync.update(agent, optimizer, batch, args)
    return {name: p.detach() for name, p in agent.named_parameters()} | trunk


def rank(rank, size, folder, plain_mean=False):
    """One rank's process: learns from its share in every case; and statistics of observations."""
    torch.set_num_threads(1)
    ranks.SIZE, ranks.RANK = size, rank
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    first = sum(N // size + (i < N % size) for i in range(rank))
    columns = slice(first, first + ranks.part(N))

    def share(batch):
        valid = float((1 - batch.done[:-1]).sum())
        return 1 / size if plain_mean else valid / max(ranks.total(valid)[0], 1)

    def around(agent, share):
        if rank > 0:
            for p in agent.parameters():
                p.data += 1  # what the ranks begin with is the first one's
        return GradientSum(agent, share).reduce

    found = {case: learn(case, columns, share, around) for case in CASES}
    rms = RunningMeanStd(shape=(3,))
    rms.update = Moments(rms)
    for x in observations():
        rms.update(x[columns])
    found["moments"] = {name: torch.as_tensor(getattr(rms, name)) for name in ("mean", "var", "count")}
    found["others"] = ranks.gathered(rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    ranks.wait()
    dist.destroy_process_group()


def observations():
    rng = np.random.default_rng(0)
    return [rng.normal(3, 2, (N, 3)).astype(np.float32) for _ in range(20)]


if __name__ == "__main__":
    rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "plain")
