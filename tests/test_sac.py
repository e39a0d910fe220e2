"""sac.py: its densities and gradients against numbers from elsewhere, and one run as a whole."""

import copy
import json
import math

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import checkpoint, metrics, record_agents, record_initial_weights, results, same

import sac
from common.envs import make_envs
from common.errors import UserError
from common.evaluate import load_agent
from sac import (
    ActorCritic,
    Args,
    SquashedGaussian,
    actor_loss_fn,
    alpha_loss_fn,
    critic_loss_fn,
    polyak_update,
    score_loss_fn,
    soft_td_target,
    train,
)

SHORT = {
    "total_timesteps": 130, "learning_starts": 50, "batch_size": 16, "buffer_size": 1000, "eval_episodes": 1, "num_threads": 1,
}  # fmt: skip
SPACES = gym.spaces.Box(-1.0, 1.0, (3,), np.float32), gym.spaces.Box(-1.0, 1.0, (2,), np.float32)


def run(**flags):
    return train(Args(**({"run_dir": "run"} | SHORT | flags)))


# --- The squashed Gaussian (pitfall 15) -------------------------------------------------------------------------------


def test_log_density_against_a_mapped_normal_in_more_digits():
    """|u| up to 20, where 1 − tanh² u is 1e-17; float32 against the same in 50 digits."""
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    for u in (-20.0, -9.0, -3.0, -0.1, 0.0, 0.5, 4.0, 12.0, 20.0):
        mean, log_std = 0.8 * u, -0.5
        ours = SquashedGaussian(torch.tensor([mean]), torch.tensor([log_std])).log_prob(torch.tensor([u])).item()
        e2u = (2 * Decimal(u)).exp()
        log_derivative = (4 * e2u / (e2u + 1) ** 2).ln()  # 1 − tanh² u
        z = (u - mean) / math.exp(log_std)
        log_normal = -0.5 * z * z - log_std - 0.5 * math.log(2 * math.pi)
        assert ours == pytest.approx(log_normal - float(log_derivative), rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("mean, log_std", [(0.0, 0.0), (1.5, -0.7), (-0.4, 0.6)])
def test_density_integrates_to_one_and_matches_torchs(mean, log_std):
    a = torch.linspace(-1, 1, 2_000_001, dtype=torch.float64)[1:-1]
    policy = SquashedGaussian(*(torch.tensor([x], dtype=torch.float64) for x in (mean, log_std)))
    density = policy.log_prob(a.atanh().unsqueeze(-1)).exp()
    assert torch.trapezoid(density, a).item() == pytest.approx(1, abs=1e-3)
    theirs = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, math.exp(log_std)), torch.distributions.TanhTransform()
    )
    torch.testing.assert_close(density.float(), theirs.log_prob(a).exp().float(), rtol=1e-3, atol=1e-6)


def test_log_density_has_a_gradient_where_tanh_is_saturated():
    u = torch.tensor([20.0, -20.0], requires_grad=True)
    grads = [torch.autograd.grad(SquashedGaussian(u.new_zeros(1), u.new_zeros(1)).log_prob(x.view(1)), x)[0] for x in u]
    torch.testing.assert_close(torch.stack(grads), torch.tensor([-18.0, 18.0]))  # −u + 2 tanh u


def test_samples_are_the_squashed_gaussians():
    torch.manual_seed(0)
    policy = SquashedGaussian(torch.tensor([0.3, -1.0]), torch.tensor([0.2, -0.5]))
    u = policy.sample(200_000)
    assert u.shape == (200_000, 2) and policy.mode().tolist() == policy.mean.tolist()
    torch.testing.assert_close(u.mean(0), policy.mean, atol=0.01, rtol=0)
    torch.testing.assert_close(u.std(0), policy.log_std.exp(), atol=0.01, rtol=0)


# --- Losses -----------------------------------------------------------------------------------------------------------


def test_targets_by_hand():
    """The least critic; the entropy term inside (1 − terminated), pitfall 17; a time limit is no end."""
    next_q = torch.tensor([[10.0, 10.0], [8.0, 12.0]])
    target = soft_td_target(torch.ones(2), torch.tensor([0.0, 1.0]), next_q, torch.tensor([-2.0, -2.0]), 0.5, 0.9)
    torch.testing.assert_close(target, torch.tensor([1 + 0.9 * (8 + 1), 1.0]))
    loss = critic_loss_fn(torch.tensor([[1.0, 2.0], [3.0, 3.0]]), torch.tensor([1.0, 4.0]))
    assert loss.item() == pytest.approx(0.5 * (0 + 4) / 2 + 0.5 * (4 + 1) / 2)
    with pytest.raises(AssertionError):
        critic_loss_fn(torch.zeros(2, 3, 1), torch.zeros(3))
    with pytest.raises(AssertionError):
        actor_loss_fn(torch.zeros(3, 1), torch.zeros(2, 1, 3), 0.1)


def test_actor_gradient_against_finite_differences():
    torch.manual_seed(0)
    agent = ActorCritic(*SPACES, Args()).double()
    obs, alpha = torch.randn(8, 3, dtype=torch.float64), 0.3

    def loss():
        torch.manual_seed(1)  # the same noise
        policy = agent.actor(obs)
        u = policy.sample(2)
        return actor_loss_fn(policy.log_prob(u), agent.critics(obs, u.tanh()), alpha)

    torch.set_default_dtype(torch.float64)
    try:
        for p in agent.actor.parameters():
            grad = torch.autograd.grad(loss(), p)[0].flatten()
            for i in (0, len(grad) // 2, len(grad) - 1):
                values = []
                for h in (1e-6, -2e-6):
                    p.data.view(-1)[i] += h
                    values.append(loss().item())
                p.data.view(-1)[i] += 1e-6
                assert (values[0] - values[1]) / 2e-6 == pytest.approx(grad[i].item(), rel=1e-4, abs=1e-8)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("estimator", [actor_loss_fn, score_loss_fn])
def test_the_optimum_is_the_boltzmann_policy(estimator):
    """One state with known Q, chosen so that exp(Q/α)/Z is a squashed Gaussian: that is where the policy must go."""
    torch.manual_seed(0)
    alpha, boltzmann = 0.5, SquashedGaussian(torch.tensor([0.5]), torch.tensor([-0.6]))
    mean, log_std = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    steps, lr = 500, 0.03
    optimizer = torch.optim.Adam([mean, log_std], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        policy = SquashedGaussian(mean.expand(1, 1), log_std.expand(1, 1))
        u = policy.sample(256)
        u = u if estimator is actor_loss_fn else u.detach()
        q = 7 + alpha * boltzmann.log_prob(u)  # (K, 1)
        optimizer.zero_grad()
        estimator(policy.log_prob(u), q.unsqueeze(0), alpha).backward()
        optimizer.step()
    assert mean.item() == pytest.approx(0.5, abs=0.02) and log_std.item() == pytest.approx(-0.6, abs=0.02)


def test_both_estimators_have_one_expectation_and_reparameterization_the_smaller_variance():
    """D16. One state, K = 2."""
    torch.manual_seed(0)
    num = 200_000
    gradients = {}
    for estimator in (actor_loss_fn, score_loss_fn):
        parameters = torch.tensor([0.2, -0.3]).expand(num, 2).clone().requires_grad_()
        policy = SquashedGaussian(parameters[:, :1], parameters[:, 1:])
        u = policy.sample(2)
        u = u if estimator is actor_loss_fn else u.detach()
        q = (-2 * (u.tanh().squeeze(-1) - 0.4) ** 2).unsqueeze(0)
        estimator(policy.log_prob(u), q, 0.1).backward()
        gradients[estimator] = parameters.grad * num  # of every repetition
    (mean_r, var_r), (mean_s, var_s) = ((g.mean(0), g.var(0)) for g in gradients.values())
    error = ((var_r + var_s) / num).sqrt()
    assert ((mean_r - mean_s).abs() < 4 * error).all() and (mean_r.abs() > 20 * error).all()
    assert (var_r < var_s / 2).all()


def test_temperature_rises_below_the_target_entropy_and_falls_above():
    """Fixed point at an entropy of −dim A; α stays positive, since log α is what is learned."""
    log_alpha = torch.tensor(0.5, requires_grad=True)
    for entropy, sign in ((-3.0, -1), (-1.0, 1), (-2.0, 0)):
        grad = torch.autograd.grad(alpha_loss_fn(log_alpha, torch.full((4, 5), -entropy), 2), log_alpha)[0]
        assert math.copysign(1, grad.item()) * bool(grad) == sign  # a descent step moves log α against it
    log_probs = torch.zeros(3, requires_grad=True)
    alpha_loss_fn(log_alpha, log_probs, 2).backward()
    assert log_probs.grad is None


def test_ensemble_equals_single_critics():
    agent = ActorCritic(*SPACES, Args(num_critics=3))
    obs, actions = torch.randn(5, 3), torch.rand(7, 5, 2)
    q = agent.critics(obs, actions)
    assert q.shape == (3, 7, 5) and agent.critics(obs, actions[0]).shape == (3, 5)
    linears = [m for m in agent.critics.net if isinstance(m, sac.Linears)]
    for i in range(3):
        x = torch.cat([obs.expand(7, 5, 3), actions], -1)
        for k, each in enumerate(linears):
            x = x @ each.weight[i] + each.bias[i]
            x = x.relu() if k < 2 else x
        torch.testing.assert_close(q[i], x.squeeze(-1))
    assert (q[0] != q[1]).any()


# --- One update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"estimator": "score", "num_action_samples": 3}, {"layer_norm": True}])
def test_the_actors_loss_leaves_no_gradient_in_the_critics(workdir, monkeypatch, flags):
    """Pitfall 18. The critics' gradients are those of their own loss alone; target networks have none."""
    parts, kept = {}, []
    original = sac.Run.open
    monkeypatch.setattr(sac.Run, "open", lambda run, **p: parts.update(p) or original(run, **p))

    def record(q, q_target):
        loss = critic_loss_fn(q, q_target)
        params = list(parts["agent"].critics.parameters())
        kept.append(torch.autograd.grad(loss, params, retain_graph=True))
        return loss

    def compare(target, source, tau):
        assert all(torch.equal(p.grad, g) for p, g in zip(source.parameters(), kept[-1]))
        assert all(p.grad is None and not p.requires_grad for p in target.parameters())
        assert all(p.grad.any() for p in parts["agent"].actor.parameters())
        polyak_update(target, source, tau)

    monkeypatch.setattr(sac, "critic_loss_fn", record)
    monkeypatch.setattr(sac, "polyak_update", compare)
    run(**flags)
    assert len(kept) == 80


def plain_critics(critics, obs, actions, layer_norm):
    """Q_i(s, a), one critic after the other, from the ensemble's weights: (M, B)."""
    linears, qs = [m for m in critics.net if isinstance(m, sac.Linears)], []
    for i in range(critics.num):
        x = torch.cat([critics.encoder(obs), actions], -1)
        for k, each in enumerate(linears):
            x = x @ each.weight[i] + each.bias[i, 0]
            if k < 2:
                x = (torch.nn.functional.layer_norm(x, x.shape[-1:]) if layer_norm else x).relu()
        qs.append(x.squeeze(-1))
    return torch.stack(qs)


def plain_log_prob(mean, log_std, u):
    """In float64, the Jacobian as 1/cosh² u."""
    mean, log_std, u = mean.double(), log_std.double(), u.double()
    return (torch.distributions.Normal(mean, log_std.exp()).log_prob(u) + 2 * torch.log(torch.cosh(u))).sum(-1).float()


def plain_gradients(agent, batch, args):
    """Gradients of critics, actor and log α, written out; draws the noise in the order in which learn() does."""

    def policy(obs):
        mean, log_std = agent.actor.head(agent.actor.body(agent.actor.encoder(obs))).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def q(critics, obs, u):
        return plain_critics(critics, obs, u.tanh(), args.layer_norm)

    alpha, K = agent.log_alpha.exp().item(), args.num_action_samples
    with torch.no_grad():
        mean, log_std = policy(batch.next_obs)
        u = mean + log_std.exp() * torch.randn_like(mean)
        soft_value = q(agent.target_critics, batch.next_obs, u).min(0)[0] - alpha * plain_log_prob(mean, log_std, u)
        q_target = batch.rewards + args.gamma * (1 - batch.terminated) * soft_value
    found = plain_critics(agent.critics, batch.obs, batch.actions, args.layer_norm)
    critic_loss = sum(0.5 * ((each - q_target) ** 2).mean() for each in found)

    mean, log_std = policy(batch.obs)
    us = [mean + log_std.exp() * noise for noise in torch.randn(K, *mean.shape)]
    if args.estimator == "score":
        us = [u.detach() for u in us]
    log_probs = [plain_log_prob(mean, log_std, u) for u in us]
    least = [q(agent.critics, batch.obs, u).min(0)[0] for u in us]
    if args.estimator == "reparam":
        actor_loss = sum((alpha * p - each).mean() for p, each in zip(log_probs, least)) / K
    else:
        scores = [(each - alpha * p).detach() for p, each in zip(log_probs, least)]
        others = [sum(scores[j] for j in range(K) if j != k) / (K - 1) for k in range(K)]
        actor_loss = -sum((p * (s - b)).mean() for p, s, b in zip(log_probs, scores, others)) / K
    return (
        torch.autograd.grad(critic_loss, list(agent.critics.parameters())),
        torch.autograd.grad(actor_loss, list(agent.actor.parameters())),
        -(torch.stack(log_probs) - batch.actions.shape[1]).mean().detach(),
    )


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"num_critics": 5, "num_action_samples": 2, "layer_norm": True},
        {"estimator": "score", "num_action_samples": 4, "alpha": 0.3},
        {"env_id": "toy_envs:ImagesBox-v0", "num_critics": 1, "total_timesteps": 56, "batch_size": 4},
    ],
    ids=str,
)
def test_every_update_is_the_one_written_out_plainly(workdir, monkeypatch, flags):
    """The gradient of every parameter, and the target network's step, at every update of a run."""
    flags = {"actor_lr": 1e-2, "critic_lr": 1e-2, "env_id": "toy_envs:TerminatingBox-v0"} | flags
    args, agents, drawn, updates = Args(**(SHORT | flags)), record_agents(monkeypatch, sac), [], []
    sample = sac.RingBuffer.sample

    def remember(buffer, size):
        batch = sample(buffer, size)
        drawn[:] = [batch, torch.get_rng_state(), copy.deepcopy(agents[0].state_dict())]
        return batch

    def compare(target, source, tau):
        batch, rng, before = drawn
        plain = ActorCritic(*spaces, args)
        plain.load_state_dict(before)
        with torch.random.fork_rng():
            torch.set_rng_state(rng)
            critic_grads, actor_grads, alpha_grad = plain_gradients(plain, batch, args)
        for ours, wanted in ((agents[0].critics, critic_grads), (agents[0].actor, actor_grads)):
            for p, grad in zip(ours.parameters(), wanted):
                assert (p.grad - grad).norm() <= 1e-3 * grad.norm() + 1e-6
        assert agents[0].log_alpha.grad.item() == pytest.approx(alpha_grad.item(), abs=1e-3)
        old = [p.clone() for p in target.parameters()]
        polyak_update(target, source, tau)
        for p, q, o in zip(target.parameters(), source.parameters(), old):
            torch.testing.assert_close(p, args.tau * q + (1 - args.tau) * o)
        updates.append(1)

    envs = make_envs(args, 1)
    spaces = envs.single_observation_space, envs.single_action_space
    monkeypatch.setattr(sac.RingBuffer, "sample", remember)
    monkeypatch.setattr(sac, "polyak_update", compare)
    end = run(**flags)
    assert len(updates) == end["updates"] == args.total_timesteps - 50


def test_greedy_actions_are_squashed_too():
    agent = ActorCritic(*SPACES, Args())
    with torch.no_grad():
        agent.actor.head.bias += 5.0
        obs = torch.randn(4, 3)
        actions = agent.act(obs, greedy=True)
        torch.testing.assert_close(actions, agent.actor(obs).mean.tanh())
    assert (actions > 0.9).all() and (actions <= 1).all()


def test_sigma_is_bounded():
    agent = ActorCritic(*SPACES, Args())
    for bias, log_std in ((100.0, 2.0), (-100.0, -20.0)):
        with torch.no_grad():
            agent.actor.head.bias.fill_(bias)
        assert (agent.actor(torch.randn(4, 3)).log_std == log_std).all()


@pytest.mark.parametrize("env_id", ["BrokenBox", "BrokenObsBox"])
def test_what_is_not_finite_never_gets_into_a_checkpoint(workdir, env_id):
    with pytest.raises(UserError, match="reward is not finite|observation is not finite"):
        run(env_id=f"toy_envs:{env_id}-v0", total_timesteps=400, checkpoint_every=20)
    parts = checkpoint("run")["parts"]
    assert all(field.isfinite().all() for field in parts["buffer"]["fields"].values())


def test_weights_that_are_not_finite_do_not_act(workdir):
    with pytest.raises(UserError, match="(action|loss) is not finite"):
        run(actor_lr=1e38, total_timesteps=2_000)


def test_polyak_weighs_the_new_parameters(workdir):
    target, source = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    a, b = target.weight.item(), source.weight.item()
    polyak_update(target, source, 0.1)
    assert target.weight.item() == pytest.approx(0.1 * b + 0.9 * a)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_what_is_stored_is_what_happened(workdir, num_envs):
    """All transitions, no reset step, every (s, s') consecutive, only true ends terminate (pitfalls 1 to 4)."""
    end = run(
        env_id="toy_envs:CountingBox-v0", num_envs=num_envs, checkpoint_every=10**9, total_timesteps=400,
        updates_per_step=1e-9,
    )  # fmt: skip
    stored = checkpoint("run")["parts"]["buffer"]["fields"]
    assert len(stored["obs"]) == end["env_steps"] >= 400 and end["updates"] == 0
    (episode, t), (next_episode, next_t) = stored["obs"].T, stored["next_obs"].T
    assert torch.equal(episode, next_episode) and torch.equal(t + 1, next_t) and torch.equal(stored["rewards"], next_t)
    lengths = [float(value) for _, tag, value in metrics("run") if tag == "charts/episodic_length"]
    assert 0 <= end["env_steps"] - sum(lengths) < 5 * num_envs  # those that were going on
    assert 0 < stored["terminated"].sum() < len(lengths)
    assert not (stored["terminated"].bool() & (episode % 3 == 0)).any()  # those are only truncated


@pytest.mark.parametrize("env_id, value", [("ConstantBox", 10.0), ("TerminatingBox", (1 - 0.9**10) / (1 - 0.9))])
def test_value_under_a_time_limit_is_that_of_going_on(workdir, env_id, value):
    """Reward 1, γ = 0.9, hardly any entropy: 1/(1 − γ) where episodes are only cut, the finite sum where they end."""
    flags = {
        "gamma": 0.9,
        "alpha": 1e-6,
        "tau": 0.05,
        "critic_lr": 3e-3,
        "total_timesteps": 1_000,
        "buffer_size": 5_000,
    }
    run(env_id=f"toy_envs:{env_id}-v0", **flags)
    agent, args, _, _ = load_agent("run")
    obs = torch.as_tensor(make_envs(args, 1).reset(seed=0)[0])
    with torch.no_grad():
        q = agent.critics(obs, torch.zeros(1, 2))
    assert q.flatten().tolist() == pytest.approx([value, value], abs=0.5)


def test_what_an_update_is_made_of(workdir, monkeypatch):
    """Targets from the target network and γ of the flags; a target entropy of −dim A, whatever the batch (pitfall 16)."""
    agents, critics_called, gammas, dims = record_agents(monkeypatch, sac), [], [], []
    forward = sac.Critics.forward
    monkeypatch.setattr(sac.Critics, "forward", lambda c, *x: critics_called.append(c) or forward(c, *x))
    monkeypatch.setattr(sac, "soft_td_target", lambda *x: gammas.append(x[-1]) or soft_td_target(*x))
    monkeypatch.setattr(sac, "alpha_loss_fn", lambda *x: dims.append(x[-1]) or alpha_loss_fn(*x))
    run(env_id="toy_envs:ConstantBox-v0", total_timesteps=52, gamma=0.7)
    assert critics_called[0] is agents[0].target_critics and critics_called[1] is agents[0].critics
    frozen = critics_called[2]
    for own, shared in zip(frozen.parameters(), agents[0].critics.parameters()):
        assert own.data_ptr() == shared.data_ptr() and not own.requires_grad
    assert set(gammas) == {0.7} and set(dims) == {2}


def test_a_resumed_run_takes_new_rates_and_a_new_alpha(workdir):
    run(alpha=0.2)
    train(Args(resume="run", total_timesteps=150, alpha=0.5, actor_lr=1e-5, critic_lr=2e-5))
    parts = checkpoint("run")["parts"]
    assert [group["lr"] for group in parts["optimizer"]["param_groups"]] == [1e-5, 2e-5, 0.0]
    assert parts["agent"]["log_alpha"].exp().item() == pytest.approx(0.5)


def test_a_resumed_run_may_begin_and_end_to_tune_alpha(workdir):
    run(alpha=0.2)
    train(Args(resume="run", total_timesteps=150, alpha="auto"))
    tuned = checkpoint("run")["parts"]["agent"]["log_alpha"].exp().item()
    assert tuned != 0.2 and tuned == pytest.approx(0.2, rel=0.1)
    train(Args(resume="run", total_timesteps=170, alpha=0.3))
    assert checkpoint("run")["parts"]["agent"]["log_alpha"].exp().item() == pytest.approx(0.3)


def test_alpha_may_be_any_number(workdir):
    run(alpha=1)
    assert checkpoint("run")["parts"]["agent"]["log_alpha"] == 0


def test_compile_without_a_compiler_says_so(workdir, monkeypatch):
    def fail(*_):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(sac.torch, "compile", lambda *_, **__: fail)
    with pytest.raises(UserError, match="--compile needs"):
        run(compile=True)
    assert not list(Path(".").iterdir())


FLAGS = [
    {},
    {"num_envs": 3},
    {"num_envs": 2, "vectorization": "async"},
    {"num_critics": 1},
    {"num_critics": 3, "layer_norm": True},
    {"alpha": 0.2},
    {"estimator": "score", "num_action_samples": 4},
    {"num_action_samples": 2},
    {"tau": 1.0, "buffer_size": 40},
    {"env_id": "toy_envs:Target-v0", "updates_per_step": 0.5, "total_timesteps": 200},
    {"env_id": "InvertedPendulum-v5"},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()) or "default")
def test_flags(workdir, monkeypatch, flags):
    initial = record_initial_weights(monkeypatch, sac)
    end = run(**flags)
    trained = checkpoint("run")["parts"]["agent"]
    unmoved = [name for name in initial if torch.equal(initial[name], trained[name])]
    assert unmoved == (["log_alpha"] if "alpha" in flags else [])
    assert end["updates"] >= 70 and math.isfinite(end["eval_return_mean"])
    assert json.loads(open("run/results.json").read()) == end
    tags = {tag for _, tag, _ in metrics("run")}
    assert {f"losses/{name}" for name in "actor_loss critic_loss value entropy alpha alpha_loss".split()} <= tags


@pytest.mark.parametrize("num_envs, updates_per_step", [(1, 1.0), (4, 1.0), (3, 0.25)])
def test_updates_are_counted_per_transition(workdir, num_envs, updates_per_step):
    """Pitfall 19."""
    end = run(num_envs=num_envs, updates_per_step=updates_per_step)
    assert end["updates"] == pytest.approx((end["env_steps"] - 50) * updates_per_step, abs=num_envs)


def test_warm_up_is_uniform_and_seeded(workdir):
    stored = []
    for name in ("a", "b"):
        run(run_dir=name, env_id="toy_envs:Target-v0", total_timesteps=600, learning_starts=599)
        stored.append(checkpoint(name)["parts"]["buffer"]["fields"]["actions"].flatten())
    assert torch.equal(*stored)
    assert stored[0].min() < -0.95 and stored[0].max() > 0.95 and abs(stored[0].mean()) < 0.1
    assert stored[0].std() == pytest.approx(1 / math.sqrt(3), abs=0.05)


def test_same_seed_same_metrics_and_weights(workdir):
    runs = []
    for seed in (1, 1, 2):
        name = str(len(runs))
        run(run_dir=name, seed=seed)
        runs.append((metrics(name), checkpoint(name)["parts"], results(name)))
    assert runs[0][0] == runs[1][0] and runs[0][0] != runs[2][0]
    assert same(runs[0][1], runs[1][1]) and not same(runs[0][1], runs[2][1])


def test_compiled_is_the_same_to_rounding(workdir):
    """Same noise, same batches: 40 updates later the losses agree."""
    values = {}
    for compile in (False, True):
        run(run_dir=str(compile), compile=compile, total_timesteps=90)
        rows = [row for row in metrics(str(compile)) if row[1].startswith("losses/")]
        parts = checkpoint(str(compile))["parts"]["agent"]
        values[compile] = {tag: float(value) for _, tag, value in rows} | {"weights": parts["actor.head.weight"]}
    for tag in values[False]:
        torch.testing.assert_close(values[True][tag], values[False][tag], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "words, part",
    [
        ({"env_id": "CartPole-v1"}, "off_policy_ac.py"),
        ({"env_id": "toy_envs:UnboundedActions-v0"}, "bounded"),
        ({"alpha": 0.0}, "--alpha"),
        ({"alpha": math.nan}, "--alpha"),
        ({"estimator": "score"}, "--num-action-samples 2"),
        ({"num_critics": 0}, "--num-critics"),
        ({"tau": 0.0}, "--tau"),
    ],
)
def test_bad_input(workdir, words, part):
    with pytest.raises(UserError, match=part):
        train(Args(**words))


def test_it_learns(workdir):
    """A random policy gets -21; the best, which looks at the observation, 0."""
    end = run(
        env_id="toy_envs:Target-v0", total_timesteps=1_200, learning_starts=200, actor_lr=3e-3, critic_lr=3e-3,
        batch_size=64, eval_episodes=50,
    )  # fmt: skip
    assert end["eval_return_mean"] > -2
