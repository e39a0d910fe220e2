"""a2c_sync.py without update clipping: RMSProp as published, whose step after a long calm is up to 10 η."""

import torch

import a2c_sync


class Unclipped(a2c_sync.RMSpropA3C):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                g = self.state[p]["square_avg"]
                g.mul_(group["alpha"]).addcmul_(p.grad, p.grad, value=1 - group["alpha"])
                self.move(p, g, group)

    def move(self, p, g, group):
        p.addcdiv_(p.grad, (g + group["eps"]).sqrt(), value=-group["lr"])


a2c_sync.RMSpropA3C = Unclipped
a2c_sync.__file__ = __file__  # a run's folder tells this from a2c_sync.py

if __name__ == "__main__":
    a2c_sync.run_cli(a2c_sync.train, a2c_sync.Args)
