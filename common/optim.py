"""A3C's RMSProp, with clipped updates."""

import torch


class RMSpropA3C(torch.optim.Optimizer):
    """g ← αg + (1 − α)Δ², U = Δ/√(g + ε), θ ← θ − ηU / max(1, RMS(U)), with RMS(U) that of each tensor.

    arXiv 1602.01783 section 4 and eq. 8-9, with the update clipping of arXiv 1804.04235 section 6: after a long calm g
    is tiny, and one surprise would take a step of up to η/√(1 − α) = 10 η, in all weights at once; the policy that had
    solved its task is gone (docs/a2c_sync.md). g starts at 1, as TensorFlow's did. In torch.optim.RMSprop it starts at
    0 and ε is outside the root. Where gradients are far below √ε this is plain SGD with a rate of η/√ε.
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
            updates = torch._foreach_div(grads, roots)
            rms = torch._foreach_div(torch._foreach_norm(updates), [p.numel() ** 0.5 for p in params])
            torch._foreach_clamp_min_(rms, 1.0)
            torch._foreach_addcdiv_(params, updates, rms, -group["lr"])
