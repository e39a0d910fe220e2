"""a2c_sync.py with torch's RMSprop: a mean square that begins at 0, and ε outside the root."""

import torch

import a2c_sync

a2c_sync.RMSpropA3C = lambda groups, eps: torch.optim.RMSprop(groups, alpha=0.99, eps=eps)
a2c_sync.__file__ = __file__  # a run's folder tells this from a2c_sync.py

if __name__ == "__main__":
    a2c_sync.run_cli(a2c_sync.train, a2c_sync.Args)
