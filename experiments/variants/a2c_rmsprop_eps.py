"""a2c_sync.py with ε outside the root, the mean square beginning at 1 as in A3C's RMSProp."""

import torch

import a2c_sync


def rmsprop(groups, eps):
    optimizer = torch.optim.RMSprop(groups, alpha=0.99, eps=eps)
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"step": torch.zeros(()), "square_avg": torch.ones_like(p)}
    return optimizer


a2c_sync.RMSpropA3C = rmsprop
a2c_sync.__file__ = __file__  # a run's folder tells this from a2c_sync.py

if __name__ == "__main__":
    a2c_sync.run_cli(a2c_sync.train, a2c_sync.Args)
