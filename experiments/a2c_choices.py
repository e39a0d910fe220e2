"""The choices that a2c_sync.py made by measurement (docs/a2c_sync.md holds what came out):

    python experiments/a2c_choices.py --choice order        is the advantage better evaluated after the critic's step?
    python experiments/a2c_choices.py --choice optimizer    Adam or A3C's RMSProp, each at several learning rates?

A variant is the script with one passage replaced, so that the script needs no switch for it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from runs import ROOT, mean_std, run_all, variant

# D4 to the letter: a step of the critic, then the advantage of the critic just fitted, then a step of the actor.
# Both optimizers pass over parameters without a gradient, so one optimizer can make both steps.
CRITIC = "    critic_loss = critic_loss_fn(values[:-1], returns, valid)\n"
D4 = {
    "def loss_fn(agent, batch, args):\n": "def loss_fn(agent, batch, args, optimizer=None):\n",
    CRITIC: CRITIC
    + """    optimizer.zero_grad()
    critic_loss.backward()
    optimizer.step()
    with torch.no_grad():
        values_now = agent.critic(features)
        advantages, _ = gae(values_now, batch.rewards, batch.terminated, done, args.gamma, args.gae_lambda)
""",
    "    loss = actor_loss + args.value_coef * critic_loss  # (6)\n": "    loss = actor_loss\n",
    "    loss, metrics = loss_fn(agent, batch, args)\n": "    loss, metrics = loss_fn(agent, batch, args, optimizer)\n",
}
TASKS = {  # flags, and the training return that counts as solved
    "CartPole-v1": ("--total-timesteps 300000", 475),
    "Acrobot-v1": ("--env-id Acrobot-v1 --total-timesteps 200000", -100),
}


@dataclass
class Options:
    choice: Literal["order", "optimizer"] = "order"
    """what to compare"""
    seeds: int = 10
    """seeds 1 to this"""
    at_a_time: int = 2
    """runs in parallel, one thread each"""
    out: str = "runs/a2c_choices"
    """folder of the runs; those that are there are not run again"""


def compare(options: Options, variants: dict[str, tuple[Path, str]]):
    """variants: name -> (script, flags). Prints a table."""
    out, seeds = Path(options.out).absolute() / options.choice, range(1, options.seeds + 1)
    print("| task | variant | greedy return | solved | after steps | steps/s |\n|---|---|---|---|---|---|")
    for task, (flags, threshold) in TASKS.items():
        jobs = [
            (script, f"{flags} {extra}", seed, out / f"{task}__{name}__{seed}", threshold)
            for seed in seeds
            for name, (script, extra) in variants.items()
        ]
        results = run_all(jobs, options.at_a_time)
        for i, name in enumerate(variants):
            runs = results[i :: len(variants)]
            solved = [run["solved_steps"] for run in runs if run["solved_steps"]]
            steps = mean_std(solved, 0) if solved else ""
            returns, speed = mean_std([r["eval_return_mean"] for r in runs]), mean_std([r["sps"] for r in runs], 0)
            print(f"| {task} | {name} | {returns} | {len(solved)} of {len(runs)} | {steps} | {speed} |", flush=True)


def main(options: Options):
    script = ROOT / "a2c_sync.py"
    if options.choice == "order":
        d4 = variant(Path(options.out).absolute(), "a2c_sync", "d4", D4)
        compare(options, {"one step for both": (script, ""), "critic, then advantage, then actor": (d4, "")})
    else:
        rates = {"adam": ("1e-3", "2e-3", "5e-3", "1e-2"), "rmsprop": ("7e-4", "2e-3", "5e-3", "1e-2")}
        compare(
            options,
            {f"{o} {lr}": (script, f"--optimizer {o} --actor-lr {lr}") for o, each in rates.items() for lr in each},
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
