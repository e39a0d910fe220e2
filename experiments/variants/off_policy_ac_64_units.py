"""off_policy_ac.py with layers of 64 units."""

import torch.nn as nn

import off_policy_ac
from off_policy_ac import orthogonal


class MLP(nn.Sequential):
    num_features = 64

    def __init__(self, num_inputs):
        hidden = orthogonal(nn.Linear(num_inputs, 64))
        super().__init__(hidden, nn.ReLU(), orthogonal(nn.Linear(64, 64)), nn.ReLU())


off_policy_ac.MLP = MLP
off_policy_ac.__file__ = __file__  # a run's folder tells this from off_policy_ac.py

if __name__ == "__main__":
    off_policy_ac.run_cli(off_policy_ac.train, off_policy_ac.Args)
