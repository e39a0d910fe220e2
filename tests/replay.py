"""What the tests of off_policy_ac.py and sac.py share: short runs, and updates and runs written out plainly."""

import copy
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import checkpoint, metrics
from toy_envs import Counting, CountingBox

from common.checkpoint import env_seed
from common.envs import make_envs
from evaluate import load_agent

SHORT = dict(total_timesteps=130, learning_starts=50, batch_size=16, buffer_size=1000, eval_episodes=1, device="cpu")


def short_run(script, **flags):
    return script.train(script.Args(**({"run_dir": "run"} | SHORT | flags)))


# --- Updates ----------------------------------------------------------------------------------------------------------


def make_parts(script, discrete=False, **flags):
    """Flags, and an agent whose policy prefers something and whose averaged critic is another one than its critic."""
    torch.manual_seed(0)
    args = script.Args(**flags)
    script.check_flags(args)
    agent = script.make_agent(SimpleNamespace(obs_spec=((4,), np.float32), num_actions=3, discrete=discrete), args)
    with torch.no_grad():
        agent.actor.head.weight *= 50
        for p in agent.target_critic.parameters():
            p += 0.02 * torch.randn_like(p)
    return args, agent


def make_batch(discrete=False, B=12):
    """Random transitions, a few of which terminated, with actions of another policy, some beyond the bounds."""
    return SimpleNamespace(
        obs=torch.randn(B, 4), actions=torch.randint(3, (B,)) if discrete else 1.5 * torch.randn(B, 3),
        old_log_probs=torch.randn(B) - 2, rewards=torch.randn(B), next_obs=torch.randn(B, 4),
        terminated=(torch.arange(B) % 4 == 0).to(torch.get_default_dtype()),
    )  # fmt: skip


def check_updates(script, written_out, discrete=False, **flags):
    """Metrics, the gradient of every parameter, the step along it, and those of averaged copies; five updates.

    written_out(agent, batch, args) gives the metrics; the losses among them have gradients.
    """
    args, agent = make_parts(script, discrete, tau=0.3, **flags)
    params = {"actor": list(agent.actor.parameters()), "critic": list(agent.critic.parameters())}
    params |= {"alpha": [agent.log_alpha]} if hasattr(agent, "log_alpha") else {}
    rates = {"actor": 0.02, "critic": 0.05, "alpha": 0.04}
    copies = [(copy_, *each) for name, *each in (("target_critic", "critic", 0.3), ("averaged_actor", "actor", 0.2))
              if (copy_ := getattr(agent, name, None))]  # fmt: skip
    optimizer = torch.optim.SGD([{"params": each, "lr": rates[name]} for name, each in params.items()])
    for _ in range(5):
        batch, rng = make_batch(discrete), torch.get_rng_state()
        wanted = written_out(agent, batch, args)
        gradients = {n: torch.autograd.grad(wanted[f"{n}_loss"], params[n], retain_graph=True) for n in params}
        before = copy.deepcopy(params), copy.deepcopy(copies)
        torch.set_rng_state(rng)
        found = script.update(agent, optimizer, batch, args)
        assert {n: x.item() for n, x in found.items()} == pytest.approx(
            {n: torch.as_tensor(x).item() for n, x in wanted.items()}
        )
        assert not any(x.requires_grad for x in found.values())
        for name, each in params.items():
            for p, gradient, old in zip(each, gradients[name], before[0][name]):
                assert gradient.any()
                torch.testing.assert_close(p.grad, gradient)
                torch.testing.assert_close(p, old - rates[name] * gradient)
        for (averaged, name, tau), (old, *_) in zip(copies, before[1]):
            for p, source, q in zip(averaged.parameters(), params[name], old.parameters(), strict=True):
                torch.testing.assert_close(p, tau * source + (1 - tau) * q)
                assert p.grad is None and not p.requires_grad


def check_rates(script, discrete, rates, **flags):
    """Adam's first step is the rate itself, along the sign of the gradient; averaged copies are in no group."""
    args, agent = make_parts(script, discrete, tau=1e-9, **flags)
    before = copy.deepcopy(dict(agent.named_parameters()))
    script.update(agent, script.make_optimizer(agent, args), make_batch(discrete), args)
    for name, p in agent.named_parameters():
        rate = (rates | {"target_critic": 0.0, "averaged_actor": 0.0})[name.partition(".")[0]]
        assert (p - before[name]).abs().max().item() == pytest.approx(rate, rel=0.01, abs=1e-8), name


def check_actor_leaves_the_critic_alone(script, monkeypatch, discrete=False, **flags):
    """Where the critic's own loss is 0, its gradient is 0; the target network has none at all."""
    monkeypatch.setattr(script, "critic_loss_fn", lambda q, q_target: 0 * q.sum())
    args, agent = make_parts(script, discrete, **flags)
    script.loss_fn(agent, make_batch(discrete), args)[0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in agent.critic.parameters())
    assert all(p.grad.any() for p in agent.actor.parameters())
    assert all(p.grad is None and not p.requires_grad for p in agent.target_critic.parameters())


def check_initial_weights(agent):
    """Orthogonal, with gain √2 in the bodies, a small one in the actor's head; the target network is a copy."""
    for network, gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        assert [type(layer) for layer in list(network.body)[1::2]] == [torch.nn.ReLU] * 2
        for layer, scale in ((network.body[0], 2**0.5), (network.body[2], 2**0.5), (network.head, gain)):
            assert not layer.bias.any()
            for W in layer.weight.mT if layer.weight.ndim == 3 else [layer.weight]:  # (outputs, inputs)
                W = W if len(W) <= W.shape[1] else W.T
                torch.testing.assert_close(W @ W.T, scale**2 * torch.eye(len(W)), atol=1e-5, rtol=0)
    for p, target in zip(agent.critic.parameters(), agent.target_critic.parameters()):
        assert torch.equal(p, target) and p is not target


# --- Runs -------------------------------------------------------------------------------------------------------------


def recorded(cls):
    """A subclass of a toy environment whose list `happened` gets every step: environment, transition, whether it ended.

    It is registered as Recorded<name>-v0.
    """

    class Recorded(cls):
        happened: list = []

        def step(self, action):
            obs = self._obs()
            next_obs, reward, terminated, truncated, infos = super().step(action)
            row = {"obs": obs, "actions": action, "rewards": reward, "next_obs": next_obs, "terminated": terminated}
            self.happened.append((self, row, terminated or truncated))
            return next_obs, reward, terminated, truncated, infos

    gym.register(f"Recorded{cls.__name__}-v0", Recorded)
    return Recorded


RECORDED = {cls: recorded(cls) for cls in (Counting, CountingBox)}


def as_fields(rows):
    """Transitions as the buffer holds them: a tensor for every field, all of float32 but discrete actions."""
    fields = {name: torch.as_tensor(np.array([row[name] for row in rows])) for name in rows[0]}
    return {name: x if x.dtype == torch.int64 else x.float() for name, x in fields.items()}


def check_stored(script, cls, num_envs) -> dict:
    """All transitions in their order and no reset step, though every 7 steps all environments start anew; and every
    episode that ended is logged. Returns what is stored."""
    RECORDED[cls].happened.clear()
    flags = {"env_id": f"Recorded{cls.__name__}-v0", "num_envs": num_envs, "updates_per_step": 1e-9}
    end = short_run(script, checkpoint_every=7, total_timesteps=200, **flags)
    stored, happened = checkpoint("run")["parts"]["buffer"]["fields"], RECORDED[cls].happened
    first = list(dict.fromkeys(env for env, *_ in happened))[:num_envs]  # those of the evaluation come later
    happened = [(row, ended) for env, row, ended in happened if env in first]
    assert len(happened) == len(stored["obs"]) == end["env_steps"] >= 200 and end["updates"] == 0
    for name, values in as_fields([row for row, _ in happened]).items():
        assert torch.equal(stored[name], values), name
    lengths = [float(row["next_obs"][1]) for row, ended in happened if ended]
    assert [float(x) for _, tag, x in metrics("run") if tag == "charts/episodic_length"] == lengths
    returns = [length * (length + 1) / 2 for length in lengths]
    assert [float(x) for _, tag, x in metrics("run") if tag == "charts/episodic_return"] == returns
    assert 0 < stored["terminated"].sum() < len(lengths)  # some are only truncated
    return stored


def check_update_count(script, monkeypatch, num_envs, updates_per_step):
    calls = []
    monkeypatch.setattr(script, "update", lambda *_: calls.append(1) or {"critic_loss": torch.zeros(())})
    end = short_run(script, num_envs=num_envs, updates_per_step=updates_per_step)
    assert end["updates"] == pytest.approx((end["env_steps"] - 50) * updates_per_step, abs=num_envs * 2)
    assert end["updates"] == len(calls)


def check_every_weight_moves(script, losses, unmoved=(), **flags):
    """And results and metrics are written (pitfall 22). Returns the agent's state."""
    end = short_run(script, **flags)
    args = script.Args(**(SHORT | flags))
    torch.manual_seed(args.seed)
    initial = dict(script.make_agent(make_envs(args, 1), args).named_parameters())
    trained = checkpoint("run")["parts"]["agent"]
    assert [name for name in initial if torch.equal(initial[name], trained[name])] == list(unmoved)
    assert end["updates"] >= 70 and math.isfinite(end["eval_return_mean"])
    assert json.loads(Path("run/results.json").read_text()) == end
    assert {f"losses/{name}" for name in losses.split()} <= {tag for _, tag, _ in metrics("run")}
    return trained


def value_of_constant(script, env_id, action, **flags):
    """Of an environment with reward 1 for ever, γ = 0.9, at its start."""
    short_run(script, env_id=f"toy_envs:{env_id}-v0", gamma=0.9, total_timesteps=400, **flags)
    agent, args, _, _ = load_agent("run")
    obs = torch.as_tensor(make_envs(args, 1).reset(seed=0)[0])
    with torch.no_grad():
        return agent.critic(obs, action).flatten().tolist()


def written_out_run(script, args, act):
    """The agent at the end of a run, and the number of updates: a list in place of the buffer, environments one by one.

    The bounds of continuous actions must be -1 and 1. Matrix products are of precision "highest", which a run must
    have, too: what auto chooses may round otherwise.

    act(agent, obs (N, ...), env_steps) gives the fields of a transition that acting yields, (N, ...) each.
    """
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    envs = [gym.make(args.env_id) for _ in range(args.num_envs)]
    space = envs[0].action_space
    discrete = isinstance(space, gym.spaces.Discrete)
    num_actions = int(space.n) if discrete else space.shape[0]
    spec = (envs[0].observation_space.shape, np.float32)
    agent = script.make_agent(SimpleNamespace(obs_spec=spec, num_actions=num_actions, discrete=discrete), args)
    optimizer = script.make_optimizer(agent, args)
    buffer, env_steps, next_reset, updates = {}, 0, 0, 0
    while env_steps < args.total_timesteps:
        if env_steps >= next_reset:
            seed = env_seed(args.seed, env_steps, 0)
            obs = [env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]
            ended = [False] * len(envs)
            next_reset = (env_steps // args.checkpoint_every + 1) * args.checkpoint_every
        chosen, before = act(agent, torch.as_tensor(np.array(obs)), env_steps), env_steps
        for i, env in enumerate(envs):
            if ended[i]:  # a step that only resets
                obs[i], ended[i] = env.reset()[0], False
                continue
            action = chosen["actions"][i].numpy()
            next_obs, reward, terminated, truncated, _ = env.step(int(action) if discrete else action.clip(-1, 1))
            row = {"obs": obs[i], "rewards": reward, "next_obs": next_obs, "terminated": terminated}
            buffer[env_steps % args.buffer_size] = row | {name: x[i].numpy() for name, x in chosen.items()}
            env_steps += 1
            obs[i], ended[i] = next_obs, terminated or truncated
        if env_steps <= args.learning_starts:
            continue
        for _ in range(int(env_steps * args.updates_per_step) - int(before * args.updates_per_step)):
            index = torch.randint(len(buffer), (args.batch_size,)).tolist()
            script.update(agent, optimizer, SimpleNamespace(**as_fields([buffer[i] for i in index])), args)
            updates += 1
    return agent, updates


def check_run(script, act, **flags):
    """Bit-identical weights: seeds, resets, acting, rates, what is stored and sampled, and when it is learned from."""
    flags |= {"checkpoint_every": 20, "matmul_precision": "highest"}
    end = short_run(script, **flags)
    agent, updates = written_out_run(script, script.Args(**(SHORT | flags)), act)
    assert updates == end["updates"] > 50
    trained = checkpoint("run")["parts"]["agent"]
    assert all(torch.equal(p, trained[name]) for name, p in agent.named_parameters())
