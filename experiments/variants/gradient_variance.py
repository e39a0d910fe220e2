"""How noisy the actor's gradient is: on four batches of a trained run's buffer, for several numbers K of samples.

    python -m experiments.variants.gradient_variance off_policy_ac --env-id Pendulum-v1 --total-timesteps 5000

results.json has, for each estimator, the variance over 50 draws of the actions, summed over all parameters, in units
of the squared length of the expected gradient: 1 says that a gradient is as much noise as signal. All estimators of a
script have the same expectation; it is taken from 50 draws of the one with baseline (score) and K = 64.
"""

import sys
from dataclasses import replace

import torch

import off_policy_ac
import sac

script = {"off_policy_ac": off_policy_ac, "sac": sac}[sys.argv.pop(1)]
SETTINGS = {
    "off_policy_ac": {
        f"{name} K = {K}": {"baseline": baseline, "num_action_samples": K, "ent_coef": 0.0}
        for name, baseline in (("plain Q,", "none"), ("baseline,", "samples"))
        for K in (1, 2, 8, 64)
        if baseline == "none" or K > 1
    },
    "sac": {
        f"{name}, K = {K}": {"estimator": name, "num_action_samples": K}
        for name, Ks in (("score", (2, 8, 64)), ("reparam", (1, 8)))
        for K in Ks
    },
}[script.__name__]
REFERENCE = {"off_policy_ac": "baseline, K = 64", "sac": "score, K = 64"}[script.__name__]


def gradients(agent, batch, args, draws=50):
    """(draws, parameters)"""
    params = list(agent.actor.parameters())
    grads = [torch.autograd.grad(script.loss_fn(agent, batch, args)[0], params) for _ in range(draws)]
    return torch.stack([torch.cat([g.flatten() for g in each]) for each in grads]).double()


class Run(script.Run):
    def finish(self):
        agent, buffer = self._parts["agent"], self._parts["buffer"]
        found = {name: 0.0 for name in SETTINGS}
        for _ in range(4):
            batch = buffer.sample(128)
            drawn = {name: gradients(agent, batch, replace(self.args, **flags)) for name, flags in SETTINGS.items()}
            signal = drawn[REFERENCE].mean(0).square().sum()
            for name, grads in drawn.items():
                found[name] += (grads.var(0).sum() / signal).item() / 4
        return super().finish(**found)


script.Run = Run
script.__file__ = __file__  # a run's folder tells this from the script

if __name__ == "__main__":
    script.run_cli(script.train, script.Args)
