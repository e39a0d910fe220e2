"""a2c_sync.py with RMSProp's ε outside the root; update clipping, and the mean square that begins at 1, stay."""

import a2c_sync
from experiments.variants.a2c_unclipped import Unclipped


class EpsilonOutside(Unclipped):
    def move(self, p, g, group):
        u = p.grad / (g.sqrt() + group["eps"])
        p.sub_(u / u.square().mean().sqrt().clamp_min(1.0), alpha=group["lr"])


a2c_sync.RMSpropA3C = EpsilonOutside
a2c_sync.__file__ = __file__  # a run's folder tells this from a2c_sync.py

if __name__ == "__main__":
    a2c_sync.run_cli(a2c_sync.train, a2c_sync.Args)
