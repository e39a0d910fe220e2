"""sac.py with one σ for all states, a parameter as in a2c_sync.py."""

import torch

import sac


class Actor(sac.Actor):
    def __init__(self, body, num_features, num_actions):
        super().__init__(body, num_features, num_actions)
        self.log_std = torch.nn.Parameter(torch.zeros(num_actions))

    def forward(self, x):
        mean, _ = self.head(self.body(x)).chunk(2, -1)
        return sac.SquashedGaussian(mean, self.log_std.clamp(-20, 2).expand_as(mean))


sac.Actor = Actor
sac.__file__ = __file__  # a run's folder tells this from sac.py

if __name__ == "__main__":
    sac.run_cli(sac.train, sac.Args)
