"""a2c_sync.py with RMSProp's ε outside the root; update clipping, and the mean square that begins at 1, stay."""

import torch

import a2c_sync


class EpsilonOutside(a2c_sync.RMSpropA3C):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                g = self.state[p]["square_avg"]
                g.mul_(group["alpha"]).addcmul_(p.grad, p.grad, value=1 - group["alpha"])
                u = p.grad / (g.sqrt() + group["eps"])
                p.sub_(u / u.square().mean().sqrt().clamp_min(1.0), alpha=group["lr"])


a2c_sync.RMSpropA3C = EpsilonOutside
a2c_sync.__file__ = __file__  # a run's folder tells this from a2c_sync.py

if __name__ == "__main__":
    a2c_sync.run_cli(a2c_sync.train, a2c_sync.Args)
