"""How noisy the actor's gradient is: on four batches of a trained run's buffer, for several numbers K of samples.

    python -m experiments.variants.gradient_variance off_policy_ac --env-id Pendulum-v1 --total-timesteps 5000

results.json has, for each estimator, the variance over 50 draws of the actions, summed over all parameters, in units
of the squared length of the mean gradient: 1 says that a gradient is as much noise as signal.
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


def variance(agent, batch, args, draws=50) -> float:
    params = list(agent.actor.parameters())
    grads = []
    for _ in range(draws):
        loss, _ = script.loss_fn(agent, batch, args)
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]))
    grads = torch.stack(grads).double()
    return (grads.var(0).sum() / grads.mean(0).square().sum()).item()


class Run(script.Run):
    def finish(self):
        agent, buffer = self._parts["agent"], self._parts["buffer"]
        batches = [buffer.sample(128) for _ in range(4)]
        found = {}
        for name, flags in SETTINGS.items():
            args = replace(self.args, **flags)
            found[name] = sum(variance(agent, batch, args) for batch in batches) / len(batches)
        return super().finish(**found)


script.Run = Run

if __name__ == "__main__":
    script.run_cli(script.train, script.Args)
