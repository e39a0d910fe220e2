"""a2c_sync.py with actors that are --lag updates behind the learner (D7). The older agents are in no checkpoint."""

import copy
from collections import deque
from dataclasses import dataclass

import torch

import a2c_sync

loss_fn, update, act = a2c_sync.loss_fn, a2c_sync.update, a2c_sync.ActorCritic.act
past = deque()  # the agents before the last updates, the oldest first


@dataclass
class Args(a2c_sync.Args):
    lag: int = 0  # updates between the parameters that act and those that learn
    old_gradient: bool = False  # take the gradient at the parameters that acted, as hogwild does; else at the newest


def acting(agent):
    """The one that acts while `agent` learns."""
    return past[0] if past else agent


def loss_at_old(agent, batch, args):
    loss, metrics = loss_fn(acting(agent), batch, args)
    grads = torch.autograd.grad(loss, list(acting(agent).parameters()))
    return sum((p * g).sum() for p, g in zip(agent.parameters(), grads)), metrics  # has these gradients at the new ones


def lagging_update(agent, optimizer, batch, args):
    a2c_sync.loss_fn = loss_at_old if args.old_gradient else loss_fn
    before = copy.deepcopy(agent)
    metrics = update(agent, optimizer, batch, args)
    past.append(before)
    while len(past) > args.lag:
        past.popleft()
    return metrics


a2c_sync.update = lagging_update
a2c_sync.ActorCritic.act = lambda agent, obs, greedy=False: act(agent if greedy else acting(agent), obs, greedy)
a2c_sync.__file__ = __file__  # a run's folder tells this from a2c_sync.py

if __name__ == "__main__":
    a2c_sync.run_cli(a2c_sync.train, Args)
