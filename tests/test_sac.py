"""sac.py: its densities and gradients against numbers from elsewhere, and one run as a whole."""

import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import checkpoint, metrics, results, same
from replay import recorded, transitions_of_the_first, written_out_run
from torch import nn
from toy_envs import CountingBox

import common.compile
import sac
from common.envs import make_envs
from common.flags import UserError
from evaluate import load_agent, load_args
from sac import (
    ActorCritic,
    Args,
    BatchedLinear,
    SquashedGaussian,
    actor_loss_fn,
    alpha_loss_fn,
    check_flags,
    critic_loss_fn,
    leave_one_out,
    make_agent,
    make_optimizer,
    polyak_update,
    score_loss_fn,
    soft_td_target,
    train,
    update,
)

SHORT = {
    "total_timesteps": 130, "learning_starts": 50, "batch_size": 16, "buffer_size": 1000, "eval_episodes": 1,
    "num_threads": 1, "device": "cpu",
}  # fmt: skip


def run(**flags):
    return train(Args(**({"run_dir": "run"} | SHORT | flags)))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_parts(**flags):
    """Flags, and an agent whose policy prefers something and whose averaged critics are others than its critics."""
    torch.manual_seed(0)
    args = Args(**flags)
    check_flags(args)
    agent = make_agent(SimpleNamespace(obs_spec=((3,), np.float32), num_actions=2), args)
    with torch.no_grad():
        agent.actor.head.weight *= 50
        for p in agent.target_critics.parameters():
            p += 0.02 * torch.randn_like(p)
    return args, agent


def make_batch(B=12):
    """Random transitions, a few of which terminated."""
    return SimpleNamespace(
        obs=torch.randn(B, 3), actions=2 * torch.rand(B, 2) - 1, rewards=torch.randn(B), next_obs=torch.randn(B, 3),
        terminated=(torch.arange(B) % 4 == 0).to(torch.get_default_dtype()),
    )  # fmt: skip


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
    a = torch.linspace(-1, 1, 500_001, dtype=torch.float64)[1:-1]
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
    u = policy.sample_u(200_000)
    assert u.shape == (200_000, 2) and policy.mode().tolist() == policy.mean.tanh().tolist()
    torch.testing.assert_close(u.mean(0), policy.mean, atol=0.01, rtol=0)
    torch.testing.assert_close(u.std(0), policy.log_std.exp(), atol=0.01, rtol=0)
    torch.manual_seed(1)
    u = policy.sample_u(5)
    torch.manual_seed(1)
    assert torch.equal(policy.sample(5), u.tanh())


@pytest.mark.parametrize("reparam", [True, False])
def test_actions_come_with_their_own_log_density(reparam):
    """As functions of the policy's parameters, or, for the score function, of actions that are constants."""
    mean = torch.tensor([0.3, -1.0], requires_grad=True)
    policy = SquashedGaussian(mean, torch.tensor([0.2, -0.5]))
    torch.manual_seed(0)
    actions, log_probs = policy.sample_with_log_prob(7, reparam=reparam)
    torch.manual_seed(0)
    u = policy.sample_u(7)
    torch.testing.assert_close(actions, u.tanh())
    torch.testing.assert_close(log_probs, policy.log_prob(u))
    assert actions.requires_grad is reparam
    gradient = torch.autograd.grad(log_probs.sum(), mean, retain_graph=True)[0]
    # of log N(u; μ, σ) + the log-derivative of tanh's inverse at u = μ + σ ε, or at a constant u
    z = (u - mean) / policy.log_std.exp()
    wanted = 2 * u.tanh() if reparam else z / policy.log_std.exp()
    torch.testing.assert_close(gradient, wanted.sum(0).detach())


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


def test_actor_gradient_against_finite_differences(double):
    torch.manual_seed(0)
    agent = ActorCritic(3, 2, 2, 1.0)
    obs, alpha = torch.randn(8, 3), 0.3

    def loss():
        torch.manual_seed(1)  # the same noise
        actions, log_probs = agent.actor(obs).sample_with_log_prob(2)
        return actor_loss_fn(log_probs, agent.critics(obs, actions), alpha)

    for p in agent.actor.parameters():
        grad = torch.autograd.grad(loss(), p)[0].flatten()
        for i in (0, len(grad) // 2, len(grad) - 1):
            values = []
            for h in (1e-6, -2e-6):
                p.data.view(-1)[i] += h
                values.append(loss().item())
            p.data.view(-1)[i] += 1e-6
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(grad[i].item(), rel=1e-4, abs=1e-8)


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
        u = policy.sample_u(256)
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
        u = policy.sample_u(2)
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


def test_leave_one_out_by_hand():
    assert leave_one_out(torch.tensor([[1.0], [2.0], [6.0]])).flatten().tolist() == [4.0, 3.5, 1.5]


def test_polyak_weighs_the_new_parameters():
    target, source = nn.Linear(1, 1), nn.Linear(1, 1)
    a, b = target.weight.item(), source.weight.item()
    polyak_update(target, source, 0.1)
    assert target.weight.item() == pytest.approx(0.1 * b + 0.9 * a)


# --- Networks ---------------------------------------------------------------------------------------------------------


def plain_critics(critics, obs, actions):
    """Q_i(s, a), one critic after the other, from the ensemble's weights: (M, ...)."""
    layers, qs = [m for m in critics.modules() if isinstance(m, BatchedLinear)], []
    for i in range(critics.num):
        x = torch.cat([obs.expand(*actions.shape[:-1], -1), actions], -1)
        for k, layer in enumerate(layers):
            x = x @ layer.weight[i] + layer.bias[i, 0]
            x = x.relu() if k < 2 else x
        qs.append(x.squeeze(-1))
    return torch.stack(qs)


def test_ensemble_equals_single_critics():
    agent = ActorCritic(3, 2, 3, 1.0)
    obs, actions = torch.randn(5, 3), torch.rand(7, 5, 2)
    q = agent.critics(obs, actions)
    assert q.shape == (3, 7, 5) and agent.critics(obs, actions[0]).shape == (3, 5)
    torch.testing.assert_close(q, plain_critics(agent.critics, obs, actions))
    assert (q[0] != q[1]).any()


def test_layers_start_orthogonal_and_the_policy_nearly_the_same_everywhere():
    torch.manual_seed(0)
    agent = ActorCritic(3, 2, 2, 1.0)
    assert [type(layer) for layer in agent.actor.body] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU]
    layers = [(agent.actor.body[0], 2**0.5), (agent.actor.body[2], 2**0.5), (agent.actor.head, 0.01)]
    weights = [(layer.weight, layer.bias, gain) for layer, gain in layers]
    for i in range(2):
        layers = (agent.critics.body[0], 2**0.5), (agent.critics.body[2], 2**0.5), (agent.critics.head, 1.0)
        weights += [(layer.weight[i].T, layer.bias[i], gain) for layer, gain in layers]
    for weight, bias, gain in weights:
        assert not bias.any()
        W = weight if len(weight) <= weight.shape[1] else weight.T
        torch.testing.assert_close(W @ W.T, gain**2 * torch.eye(len(W)), atol=1e-5, rtol=0)
    policy = agent.actor(torch.randn(100, 3))
    assert policy.mean.abs().max() < 0.05 and policy.log_std.abs().max() < 0.05
    assert same(dict(agent.critics.state_dict()), dict(agent.target_critics.state_dict()))


def test_greedy_actions_are_squashed_too():
    agent = ActorCritic(3, 2, 2, 1.0)
    with torch.no_grad():
        agent.actor.head.bias += 5.0
        obs = torch.randn(4, 3)
        actions = agent.act(obs, greedy=True)
        torch.testing.assert_close(actions, agent.actor(obs).mean.tanh())
    assert (actions > 0.9).all() and (actions <= 1).all()
    assert not torch.equal(agent.act(obs), actions) and not agent.act(obs).requires_grad


def test_sigma_is_bounded():
    agent = ActorCritic(3, 2, 2, 1.0)
    for bias, log_std in ((100.0, 2.0), (-100.0, -20.0)):
        with torch.no_grad():
            agent.actor.head.bias.fill_(bias)
        assert (agent.actor(torch.randn(4, 3)).log_std == log_std).all()


# --- One update -------------------------------------------------------------------------------------------------------


def groups(agent, actor, critics, alpha):
    """Parameter groups, each with its rate."""
    networks = ((agent.actor.parameters(), actor), (agent.critics.parameters(), critics), ([agent.log_alpha], alpha))
    return [{"params": list(params), "lr": lr} for params, lr in networks]


@pytest.mark.parametrize("flags", [{}, {"estimator": "score", "num_action_samples": 3}])
def test_the_actors_loss_leaves_no_gradient_in_the_critics(flags):
    """Pitfall 18: theirs is that of their own loss alone, and without a rate of their own they do not move."""
    args, agent = make_parts(**flags)
    optimizer = torch.optim.SGD(groups(agent, 0.1, 0.0, 0.1))
    for _ in range(3):
        batch, rng, before = make_batch(), torch.get_rng_state(), copy.deepcopy(agent)
        with torch.no_grad():
            next_actions, next_log_probs = agent.actor(batch.next_obs).sample_with_log_prob()
            next_q, alpha = agent.target_critics(batch.next_obs, next_actions), agent.log_alpha.exp()
        q_target = soft_td_target(batch.rewards, batch.terminated, next_q, next_log_probs, alpha, args.gamma)
        loss = critic_loss_fn(agent.critics(batch.obs, batch.actions), q_target)
        wanted = torch.autograd.grad(loss, list(agent.critics.parameters()))
        torch.set_rng_state(rng)
        update(agent, optimizer, batch, args)
        assert all(torch.equal(p.grad, g) for p, g in zip(agent.critics.parameters(), wanted))
        assert same(dict(before.critics.state_dict()), dict(agent.critics.state_dict()))
        assert not any(torch.equal(p, q) for p, q in zip(agent.actor.parameters(), before.actor.parameters()))
        assert all(p.grad is None and not p.requires_grad for p in agent.target_critics.parameters())


def plain_log_prob(mean, log_std, u):
    """The Jacobian as 1/cosh² u."""
    return (torch.distributions.Normal(mean, log_std.exp()).log_prob(u) + 2 * torch.log(torch.cosh(u))).sum(-1)


def losses_written_out(agent, batch, args):
    """Losses of critics, actor and log α, and the mean Q and entropy; draws the noise in the order of loss_fn."""

    def policy(obs):
        mean, log_std = agent.actor.head(agent.actor.body(obs)).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    alpha, K = agent.log_alpha.exp().item(), args.num_action_samples
    with torch.no_grad():  # (3)
        mean, log_std = policy(batch.next_obs)
        u = mean + log_std.exp() * torch.randn_like(mean)
        least = plain_critics(agent.target_critics, batch.next_obs, u.tanh()).min(0)[0]
        soft_value = least - alpha * plain_log_prob(mean, log_std, u)
        q_target = batch.rewards + args.gamma * (1 - batch.terminated) * soft_value
    found = plain_critics(agent.critics, batch.obs, batch.actions)
    critic_loss = sum(0.5 * ((each - q_target) ** 2).mean() for each in found)  # (4)

    mean, log_std = policy(batch.obs)
    us = [mean + log_std.exp() * noise for noise in torch.randn(K, *mean.shape)]
    if args.estimator == "score":
        us = [u.detach() for u in us]
    log_probs = [plain_log_prob(mean, log_std, u) for u in us]
    least = [plain_critics(agent.critics, batch.obs, u.tanh()).min(0)[0] for u in us]
    if args.estimator == "reparam":  # (5)
        actor_loss = sum((alpha * p - each).mean() for p, each in zip(log_probs, least)) / K
    else:  # (6), (7)
        scores = [(each - alpha * p).detach() for p, each in zip(log_probs, least)]
        others = [sum(scores[j] for j in range(K) if j != k) / (K - 1) for k in range(K)]
        actor_loss = -sum((p * (s - b)).mean() for p, s, b in zip(log_probs, scores, others)) / K
    log_prob = torch.stack(log_probs).mean().detach()
    alpha_loss = -agent.log_alpha * (log_prob - 2)  # (8): two action dimensions
    return critic_loss, actor_loss, alpha_loss, found.mean(), -log_prob


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"num_critics": 5, "num_action_samples": 2},
        {"estimator": "score", "num_action_samples": 4, "alpha": 0.3},
        {"num_critics": 1, "estimator": "score", "num_action_samples": 2},
    ],
    ids=str,
)
def test_every_update_is_the_one_written_out_plainly(double, flags):
    """Metrics, the gradient of every parameter, the step along it, and that of the target networks; eight updates."""
    args, agent = make_parts(gamma=0.7, tau=0.3, **flags)
    optimizer = torch.optim.SGD(groups(agent, 0.02, 0.03, 0.04))
    for _ in range(8):
        batch, rng, alpha = make_batch(), torch.get_rng_state(), agent.log_alpha.exp().item()
        critic_loss, actor_loss, alpha_loss, value, entropy = losses_written_out(agent, batch, args)
        parts = ((agent.critics, critic_loss, 0.03), (agent.actor, actor_loss, 0.02))
        gradients = [torch.autograd.grad(loss, list(net.parameters())) for net, loss, _ in parts]
        alpha_gradient = torch.autograd.grad(alpha_loss, agent.log_alpha)[0]
        before = copy.deepcopy(agent)
        torch.set_rng_state(rng)
        found = update(agent, optimizer, batch, args)
        wanted = {"critic_loss": critic_loss, "actor_loss": actor_loss, "alpha_loss": alpha_loss, "value": value}
        wanted = {name: x.item() for name, x in wanted.items()} | {"entropy": entropy.item(), "alpha": alpha}
        assert {name: x.item() for name, x in found.items()} == pytest.approx(wanted)
        assert not any(x.requires_grad for x in found.values())
        for (net, _, lr), expected, old in zip(parts, gradients, (before.critics, before.actor)):
            for p, gradient, q in zip(net.parameters(), expected, old.parameters()):
                torch.testing.assert_close(p.grad, gradient)
                torch.testing.assert_close(p, q - lr * gradient)
        assert agent.log_alpha.grad.item() == pytest.approx(alpha_gradient.item())
        assert agent.log_alpha.item() == pytest.approx((before.log_alpha - 0.04 * alpha_gradient).item())
        sources = zip(agent.critics.parameters(), before.target_critics.parameters())
        for p, (source, old) in zip(agent.target_critics.parameters(), sources):
            torch.testing.assert_close(p, 0.3 * source + 0.7 * old)


@pytest.mark.parametrize("alpha", ["auto", 0.3])
def test_each_network_has_its_own_rate(alpha):
    """Adam's first step is the rate itself. log α has the actor's, or is fixed; the target networks are in no group."""
    args, agent = make_parts(actor_lr=3e-3, critic_lr=1e-4, tau=1e-9, alpha=alpha)
    before = copy.deepcopy(agent)
    update(agent, make_optimizer(agent, args), make_batch(), args)
    for net, old, lr in ((agent.actor, before.actor, 3e-3), (agent.critics, before.critics, 1e-4)):
        for p, q in zip(net.parameters(), old.parameters()):
            assert (p - q).abs().max().item() == pytest.approx(lr, rel=0.01)
    moved = (agent.log_alpha - before.log_alpha).abs().item()
    assert moved == pytest.approx(3e-3, rel=0.01) if alpha == "auto" else moved == 0
    assert before.log_alpha.exp().item() == pytest.approx(1.0 if alpha == "auto" else 0.3)
    torch.testing.assert_close(agent.target_critics.state_dict(), before.target_critics.state_dict())


# --- What goes into the buffer (pitfalls 1 to 4) ----------------------------------------------------------------------

RecordedCounting = recorded(CountingBox)
gym.register("RecordedCountingBox-v0", RecordedCounting)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_what_is_stored_is_what_happened(workdir, num_envs):
    """All transitions in their order and no reset step, though every 7 steps all environments start anew."""
    RecordedCounting.happened.clear()
    end = run(
        env_id="RecordedCountingBox-v0", num_envs=num_envs, checkpoint_every=7, total_timesteps=200,
        updates_per_step=1e-9,
    )  # fmt: skip
    stored = checkpoint("run")["parts"]["buffer"]["fields"]
    happened = transitions_of_the_first(RecordedCounting.happened, num_envs)
    assert len(happened["obs"]) == end["env_steps"] >= 200 and end["updates"] == 0
    assert set(stored) == set(happened)
    assert all(torch.equal(stored[name], happened[name]) for name in happened)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_every_transition_belongs_to_an_episode_that_is_logged(workdir, num_envs):
    """Every (s, s') is consecutive, only true ends terminate; with what was going on at the end, nothing is missing."""
    end = run(
        env_id="toy_envs:CountingBox-v0", num_envs=num_envs, checkpoint_every=10**9, total_timesteps=400,
        updates_per_step=1e-9,
    )  # fmt: skip
    stored = checkpoint("run")["parts"]["buffer"]["fields"]
    assert len(stored["obs"]) == end["env_steps"] >= 400
    (episode, t), (next_episode, next_t) = stored["obs"].T, stored["next_obs"].T
    assert torch.equal(episode, next_episode) and torch.equal(t + 1, next_t) and torch.equal(stored["rewards"], next_t)
    lengths = [float(value) for _, tag, value in metrics("run") if tag == "charts/episodic_length"]
    assert 0 <= end["env_steps"] - sum(lengths) < 5 * num_envs  # those that were going on
    assert 0 < stored["terminated"].sum() < len(lengths)
    assert not (stored["terminated"].bool() & (episode % 3 == 0)).any()  # those are only truncated


@pytest.mark.parametrize("env_id", ["BrokenBox", "BrokenObsBox"])
def test_what_is_not_finite_never_gets_into_a_checkpoint(workdir, env_id):
    with pytest.raises(UserError, match="reward is not finite|observation is not finite"):
        run(env_id=f"toy_envs:{env_id}-v0", total_timesteps=400, checkpoint_every=20, updates_per_step=0.2)
    parts = checkpoint("run")["parts"]
    assert all(field.isfinite().all() for field in parts["buffer"]["fields"].values())


def test_weights_that_are_not_finite_do_not_act(workdir):
    with pytest.raises(UserError, match="(action|loss) is not finite"):
        run(actor_lr=1e38, total_timesteps=2_000)


def test_warm_up_is_uniform_and_seeded(workdir):
    """The first --learning-starts actions are the generator's, the next one is the policy's at what it saw."""
    flags = {"env_id": "toy_envs:Target-v0", "total_timesteps": 600, "learning_starts": 590}
    end, args = run(**flags), Args(**(SHORT | flags))
    stored = checkpoint("run")["parts"]["buffer"]["fields"]
    assert end["updates"] == len(stored["obs"]) - 590 == 10
    torch.manual_seed(args.seed)
    agent = make_agent(make_envs(args), args)
    # An episode is one step; the action of the step after it, which only resets, is drawn, too
    random = torch.cat([2 * torch.rand(1, 1) - 1 for _ in range(2 * 590 - 1)])[::2]
    actions, _ = stored["actions"], agent.act(stored["next_obs"][589:590])
    assert torch.equal(actions[:590], random)
    assert random.min() < -0.95 and random.max() > 0.95 and abs(random.mean()) < 0.1
    assert random.std() == pytest.approx(1 / math.sqrt(3), abs=0.05)
    torch.testing.assert_close(actions[590], agent.act(stored["obs"][590:591])[0])


# --- One run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{"num_envs": 3, "updates_per_step": 0.7}, {"buffer_size": 40, "critic_lr": 1e-2}])
def test_a_run_is_the_loop_written_out_plainly(workdir, flags):
    """Bit-identical weights: seeds, resets, warm-up, acting, what is stored and sampled, when it is learned from."""
    flags |= {"env_id": "toy_envs:CountingBox-v0", "checkpoint_every": 20, "matmul_precision": "highest"}
    end = run(**flags)

    def act(agent, optimizer, obs, env_steps):
        at_random = env_steps < args.learning_starts
        return {"actions": 2 * torch.rand(len(obs), 1) - 1 if at_random else agent.act(obs)}

    args = Args(**(SHORT | flags))
    agent, updates = written_out_run(sac, args, act)
    assert updates == end["updates"] > 50
    assert same(dict(agent.state_dict()), checkpoint("run")["parts"]["agent"])


@pytest.mark.parametrize("env_id, value", [("ConstantBox", 10.0), ("TerminatingBox", (1 - 0.9**10) / (1 - 0.9))])
def test_value_under_a_time_limit_is_that_of_going_on(workdir, env_id, value):
    """Reward 1, γ = 0.9, hardly any entropy: 1/(1 − γ) where episodes are only cut, the finite sum where they end."""
    flags = {"gamma": 0.9, "alpha": 1e-6, "tau": 0.1, "critic_lr": 3e-3}
    run(env_id=f"toy_envs:{env_id}-v0", total_timesteps=600, **flags)
    agent, args, _, _ = load_agent("run")
    obs = torch.as_tensor(make_envs(args, 1).reset(seed=0)[0])
    with torch.no_grad():
        q = agent.critics(obs, torch.zeros(1, 2))
    assert q.flatten().tolist() == pytest.approx([value, value], abs=0.3)


def resume(**flags):
    return train(dataclasses.replace(load_args("run"), **flags))


def test_a_resumed_run_takes_new_rates_and_may_begin_and_end_to_tune_alpha(workdir):
    run(alpha=0.2)
    resume(total_timesteps=150, alpha=0.5, actor_lr=1e-5, critic_lr=2e-5)
    parts = checkpoint("run")["parts"]
    assert [group["lr"] for group in parts["optimizer"]["param_groups"]] == [1e-5, 2e-5, 0.0]
    assert parts["agent"]["log_alpha"].exp().item() == pytest.approx(0.5)
    resume(total_timesteps=170, alpha="auto", actor_lr=3e-4)
    tuned = checkpoint("run")["parts"]["agent"]["log_alpha"].exp().item()
    assert tuned != 0.5 and tuned == pytest.approx(0.5, rel=0.1)
    resume(total_timesteps=190, alpha=0.3)
    assert checkpoint("run")["parts"]["agent"]["log_alpha"].exp().item() == pytest.approx(0.3)


FLAGS = [
    {},
    {"num_envs": 2, "vectorization": "async", "num_critics": 3, "updates_per_step": 0.5, "total_timesteps": 200},
    {"num_critics": 1, "alpha": 0.2, "env_id": "toy_envs:Target-v0"},
    {"estimator": "score", "num_action_samples": 4, "env_id": "InvertedPendulum-v5"},
    {"num_envs": 3, "num_action_samples": 2, "tau": 1.0, "buffer_size": 40},
    {"alpha": 1, "total_timesteps": 121},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()) or "default")
def test_flags(workdir, flags):
    """Every weight moves, α where it is tuned; results and metrics are written."""
    end = run(**flags)
    args = Args(**(SHORT | flags))
    torch.manual_seed(args.seed)
    initial = dict(make_agent(make_envs(args, 1), args).named_parameters())
    trained = checkpoint("run")["parts"]["agent"]
    unmoved = [name for name in initial if torch.equal(initial[name], trained[name])]
    assert unmoved == (["log_alpha"] if "alpha" in flags else [])
    assert "alpha" not in flags or trained["log_alpha"].exp().item() == pytest.approx(flags["alpha"])
    assert end["updates"] >= 70 and math.isfinite(end["eval_return_mean"])
    assert json.loads(open("run/results.json").read()) == end
    tags = {tag for _, tag, _ in metrics("run")}
    assert {f"losses/{name}" for name in "actor_loss critic_loss value entropy alpha alpha_loss".split()} <= tags


@pytest.mark.parametrize("num_envs, updates_per_step", [(1, 1.0), (4, 1.0), (3, 0.25)])
def test_updates_are_counted_per_transition(workdir, monkeypatch, num_envs, updates_per_step):
    """Pitfall 19."""
    calls = []
    monkeypatch.setattr(sac, "update", lambda *_: calls.append(1) or {"critic_loss": torch.zeros(())})
    end = run(num_envs=num_envs, updates_per_step=updates_per_step)
    assert end["updates"] == pytest.approx((end["env_steps"] - 50) * updates_per_step, abs=num_envs)
    assert end["updates"] == len(calls)


def test_losses_are_logged_at_least_every_1000_steps(workdir):
    run(total_timesteps=3_300, num_envs=4, updates_per_step=0.01, learning_starts=0)
    logged = sorted({steps for steps, tag, _ in metrics("run") if tag == "losses/critic_loss"})
    assert max(np.diff([0, *logged, 3_300])) <= 1000


def test_same_seed_same_metrics_and_weights(workdir):
    runs = []
    for seed in (1, 1, 2):
        name = str(len(runs))
        run(run_dir=name, seed=seed)
        runs.append((metrics(name), checkpoint(name)["parts"], results(name)))
    assert runs[0][0] == runs[1][0] and runs[0][0] != runs[2][0]
    assert same(runs[0][1], runs[1][1]) and not same(runs[0][1], runs[2][1])
    assert runs[0][2] == runs[1][2]


def test_compile_without_a_compiler_says_so(workdir, monkeypatch):
    def fail(*_):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(common.compile.torch, "compile", lambda *_, **__: fail)
    with pytest.raises(UserError, match="--compile needs .* no C"):
        run(compile=True)
    assert not list(workdir.iterdir())


def test_compile_is_for_the_update(workdir, monkeypatch):
    """With the same noise as without: torch.compile has a generator of its own if nobody says otherwise."""
    asked, called = [], []

    def compile(function, **options):
        asked.append((function, options))
        return lambda *inputs: called.append(function) or function(*inputs)

    monkeypatch.setattr(common.compile.torch, "compile", compile)
    run(compile=True, total_timesteps=60)
    function, options = asked[-1]
    assert function.__code__ == update.__code__  # a copy, so that torch keeps what it compiles apart
    assert options == {"fullgraph": True, "options": {"fallback_random": True}}
    assert called.count(function) == 10
    asked.clear()
    run(run_dir="plain", total_timesteps=60)
    assert not asked


@pytest.mark.parametrize(
    "words, part",
    [
        ({"env_id": "CartPole-v1"}, "off_policy_ac.py"),
        ({"env_id": "toy_envs:ImagesBox-v0"}, "takes vectors; for images use a2c_sync.py"),
        ({"env_id": "toy_envs:Images-v0"}, "takes vectors; for images use a2c_sync.py"),
        ({"env_id": "toy_envs:UnboundedActions-v0"}, "bounded"),
        ({"alpha": 0.0}, "--alpha"),
        ({"alpha": math.nan}, "--alpha"),
        ({"estimator": "score"}, "--num-action-samples 2"),
        ({"num_critics": 0}, "--num-critics"),
        ({"tau": 0.0}, "--tau"),
        ({"buffer_size": 2, "num_envs": 3}, "--buffer-size must be at least --num-envs"),
        ({"learning_starts": 20_000}, "nothing would be learned"),
    ],
    ids=str,
)
def test_bad_input(workdir, words, part):
    """One sentence, before anything is written."""
    with pytest.raises(UserError, match=part):
        train(Args(**words))
    assert not list(workdir.iterdir())


def test_it_learns(workdir):
    """A random policy gets -21; the best, which looks at the observation, 0."""
    end = run(
        env_id="toy_envs:Target-v0", num_envs=4, total_timesteps=1_000, learning_starts=200, updates_per_step=0.7,
        actor_lr=5e-3, critic_lr=5e-3, batch_size=64, eval_episodes=50,
    )  # fmt: skip
    assert end["eval_return_mean"] > -2


# --- Slow -------------------------------------------------------------------------------------------------------------
