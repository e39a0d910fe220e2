"""What ranks do in test_ranks.py. It imports nothing of the project's before it knows that it is a rank."""

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from gymnasium.wrappers.utils import RunningMeanStd

CASES = {
    "separate": {"network": "separate", "max_grad_norm": None},
    "shared, clipped": {"network": "shared", "max_grad_norm": 0.5},
    "separate, clipped, Adam": {"network": "separate", "max_grad_norm": 0.5, "optimizer": "adam"},
    "pixels": {"network": "shared", "max_grad_norm": 0.5, "images": True},
    "box": {"network": "separate", "max_grad_norm": 0.5, "discrete": False},
}
T, N = 4, 7  # 7 environments: three ranks have unequal shares
JOB = {"num_envs": 4, "num_steps": 24, "lr_decay": False, "normalize_obs": True, "network": "shared"}
JOB |= {"seed": 20, "max_grad_norm": 0.5, "checkpoint_every": 400, "total_timesteps": 800, "eval_episodes": 1}


def run_as_rank(target, rank, size, folder):
    """A rank as torchrun starts it."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ |= {"TORCHELASTIC_RUN_ID": "job", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    for name in [name for name in sys.modules if name.partition(".")[0] in ("a2c_sync", "common")]:
        del sys.modules[name]  # the fork server may have them
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.save(target(rank, size), f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # torch's threads may abort an end in order


def make(case):
    """Agent, optimizer, flags and three rollouts of the whole job."""
    import a2c_sync

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
            done[:, : N // 3 + 1] = 1  # the first of three ranks has nothing to learn from
        actions = torch.randint(2, (T, N)) if discrete else torch.rand(T, N, 2) * 2 - 1
        rewards, terminated = torch.randn(T, N) + torch.arange(N), done[1:] * (torch.rand(T, N) < 0.5)
        rollouts.append(a2c_sync.Rollout(obs.to(torch.uint8) if images else obs, actions, rewards, terminated, done))
    if not images:  # in double precision, where rounding is far from what an error would be
        agent = agent.double()
        rollouts = [a2c_sync.Rollout(*(x.double() if x.is_floating_point() else x for x in r)) for r in rollouts]
    return agent, a2c_sync.make_optimizer(agent, args), args, rollouts


def parameters(agent):
    return {name: p.detach().clone() for name, p in agent.named_parameters()}


def learn(case, columns=slice(None), ranks=None):
    """Parameters after three updates on these environments; of ranks, the first one's are those that all begin with."""
    import a2c_sync

    agent, optimizer, args, rollouts = make(case)
    share = 1.0
    if ranks is not None:
        for p in agent.parameters():
            p.data += ranks.RANK
        ranks.GradientSum(agent, lambda: share)
    for rollout in rollouts:
        batch = a2c_sync.Rollout(*(x[:, columns] for x in rollout))
        if ranks is not None:
            valid = float((1 - batch.done[:-1]).sum())
            share = valid / max(ranks.total(valid)[0], 1)
        a2c_sync.update(agent, optimizer, batch, args)
    return parameters(agent)


def learn_share(rank, size):
    """Learns from its share in every case; and statistics of observations."""
    from common.run import Run  # noqa: F401 (first: it imports common.ranks in turn)
    from common import ranks  # isort: skip

    first = sum(N // size + (i < N % size) for i in range(rank))
    columns, rms = slice(first, first + ranks.part(N)), RunningMeanStd(shape=(3,))
    rms.update = ranks.Moments(rms)
    for x in observations():
        rms.update(x[columns])
    moments = {name: torch.as_tensor(getattr(rms, name)) for name in ("mean", "var", "count")}
    return {case: learn(case, columns, ranks) for case in CASES} | {"moments": moments}


def observations():
    rng = np.random.default_rng(0)
    return [rng.normal(3, 2, (N, 3)).astype(np.float32) for _ in range(20)]


def train_job(rank, size):
    """An uninterrupted job; the same, ended half-way and resumed; one of which rank 1 gets SIGTERM; refused ones."""
    import a2c_sync
    from common.checkpoint import random_state, restore_random
    from common.flags import UserError, saved_args

    found, made, update, make_envs = {"batches": []}, [], a2c_sync.update, a2c_sync.make_envs

    def note(agent, optimizer, batch, args):
        found["batches"].append([x.clone() for x in batch])
        if len(found["batches"]) > 1:
            if stop and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(agent, optimizer, batch, args)
        state, found["noise"] = random_state(), [torch.rand(1).item(), np.random.rand(), random.random()]
        restore_random(state)
        made.append(agent)
        found["before"] = parameters(agent)
        metrics = update(agent, optimizer, batch, args)
        found["after"] = parameters(agent)
        return metrics

    a2c_sync.update, stop = note, False
    a2c_sync.make_envs = lambda *args, **options: made.append(make_envs(*args, **options)) or made[-1]
    a2c_sync.train(a2c_sync.Args(run_dir="whole", **JOB))
    found |= {"end": parameters(made[1]), "rms": made[0].state_dict()}
    whole = list(found["batches"])

    a2c_sync.train(a2c_sync.Args(**JOB | {"run_dir": "part", "total_timesteps": 400}))
    args = saved_args(Path("part"), a2c_sync.Args, "a2c_sync")
    args.total_timesteps = 800
    a2c_sync.train(args)

    stop = True
    found |= {"batches": [], "ends": []}
    for flags in {"run_dir": "stopped"}, {"run_dir": "whole"}, {"run_dir": "new", "num_envs": 1}:
        try:
            a2c_sync.train(a2c_sync.Args(**JOB | flags))
        except (SystemExit, UserError) as error:
            found["ends"].append(str(error))
    return found | {"batches": whole}
