"""RMSProp as the published A3C and A2C results used it."""

import torch


class RMSpropA3C(torch.optim.Optimizer):
    """g ← αg + (1 − α)Δ², θ ← θ − ηΔ/√(g + ε) (arXiv 1602.01783 section 4 and eq. 8-9).

    g starts at 1, as TensorFlow's did. In torch.optim.RMSprop it starts at 0 and ε is outside the root, so a first step
    is up to 10 η, of however small a gradient; it is the start that ruins runs (docs/claims.md, mistakes). Where
    gradients are far below √ε this is plain SGD with a rate of η/√ε.
    """

    def __init__(self, params, lr: float = 7e-4, alpha: float = 0.99, eps: float = 1e-5):
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["square_avg"] = torch.ones_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            square_avgs = [self.state[p]["square_avg"] for p in params]
            torch._foreach_mul_(square_avgs, group["alpha"])
            torch._foreach_addcmul_(square_avgs, grads, grads, 1 - group["alpha"])
            roots = torch._foreach_add(square_avgs, group["eps"])
            torch._foreach_sqrt_(roots)
            torch._foreach_addcdiv_(params, grads, roots, -group["lr"])
