"""sac.py without the entropy in the critics' targets; the actor is still paid for it."""

import torch

import sac

soft_value = sac.soft_value
sac.soft_value = lambda q, log_probs, alpha: soft_value(q, log_probs, alpha if torch.is_grad_enabled() else 0.0)
sac.__file__ = __file__  # a run's folder tells this from sac.py

if __name__ == "__main__":
    sac.run_cli(sac.train, sac.Args)
