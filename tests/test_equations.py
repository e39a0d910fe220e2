"""The equations of a2c_sync.py against brute force, exact enumeration and numbers worked out by hand."""

import copy
import math
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import same
from mdp import MDP, TERMINAL, A, S, exact_values
from test_compile import CASES, random_batch
from torch import nn

import a2c_sync
import a3c_async
import off_policy_ac
import sac
from a2c_sync import Actor, ActorCritic, Critic, Rollout, gae, loss_fn, masked_mean, update
from common.optim import RMSpropA3C


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


# --- Advantages -------------------------------------------------------------------------------------------------------


def brute_force(rewards, values, terminated, done, gamma, lam):
    """Â_t as the λ-weighted sum of n-step advantages, O(T²) and worse; every sum stops at the episode's end."""
    T = len(rewards)
    result = []
    for t in range(T):
        end = next((k for k in range(t, T) if done[k]), T - 1)  # last step of this episode inside the rollout
        n_step = []
        for last in range(t, end + 1):
            ret = sum(gamma ** (k - t) * rewards[k] for k in range(t, last + 1))
            ret += gamma ** (last - t + 1) * (1 - terminated[last]) * values[last + 1]
            n_step.append(ret - values[t])
        n = len(n_step)
        weights = [(1 - lam) * lam**i for i in range(n - 1)] + [lam ** (n - 1)]
        result.append(sum(w * a for w, a in zip(weights, n_step)))
    return result


@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (0.9, 1.0), (1.0, 0.0), (0.7, 0.5)])
def test_gae_is_the_lambda_weighted_sum_of_n_step_advantages(gamma, lam):
    rng = np.random.default_rng(0)
    T, N = 12, 50
    rewards, values = torch.tensor(rng.normal(size=(T, N))), torch.tensor(rng.normal(size=(T + 1, N)))
    terminated = torch.tensor((rng.random((T, N)) < 0.2).astype(float))
    truncated = torch.tensor((rng.random((T, N)) < 0.2).astype(float))
    done = torch.maximum(terminated, truncated)
    assert (terminated * truncated).any()  # both at once: terminated counts
    advantages, returns = gae(values, rewards, terminated, done, gamma, lam)
    expected = torch.tensor(
        [brute_force(*(x[:, n].tolist() for x in (rewards, values, terminated, done)), gamma, lam) for n in range(N)]
    ).T
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values[:-1])


def test_two_episodes_in_one_rollout_equal_each_alone():
    """Episode one is truncated after step 2; step 3 only resets; episode two runs on (pitfalls 2 and 4)."""
    rewards, values = torch.randn(7, 1), torch.randn(8, 1)
    terminated, done = torch.zeros(7, 1), torch.zeros(7, 1)
    done[2] = 1
    both, _ = gae(values, rewards, terminated, done, 0.9, 0.8)
    first, _ = gae(values[:4], rewards[:3], terminated[:3], done[:3], 0.9, 0.8)
    second, _ = gae(values[4:], rewards[4:], terminated[4:], done[4:], 0.9, 0.8)
    torch.testing.assert_close(both[:3], first)
    torch.testing.assert_close(both[4:], second)


def test_rollouts_of_one_step():
    """T = 1, pitfall 5: Â = r + γV(s') − V(s), without the bootstrap only if terminated."""
    rewards, values = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[2.0, 2.0, 2.0], [10.0, 10.0, 10.0]])
    terminated, done = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    advantages, _ = gae(values, rewards, terminated, done, 0.5, 0.95)
    assert advantages.tolist() == [[4.0, 4.0, -1.0]]


# --- A small MDP, enumerated exactly ----------------------------------------------------------------------------------


def enumerated_rollouts(mdp, actor, T):
    """All rollouts of T steps as one batch: obs one-hot (T + 1, N, S + 1), and each rollout's probability (N,)."""
    states, actions, p = mdp.rollouts(T)
    obs = torch.nn.functional.one_hot(states, S + 1).to(torch.float64)
    with torch.no_grad():
        p = p * actor(obs[:-1]).log_prob(actions).sum(0).exp()
    assert math.isclose(p.sum().item(), 1.0)
    resets = (states[:-1] == TERMINAL).double()  # step t only resets
    terminated = (states[1:] == TERMINAL).double()
    rewards = mdp.R[states[:-1].clamp(max=S - 1), actions] * (1 - resets)
    return obs, actions, rewards, terminated, resets, p


def make_tabular():
    actor = Actor(nn.Identity(), S + 1, A, discrete=True)
    critic = Critic(nn.Identity(), S + 1)
    nn.init.normal_(actor.head.weight)
    nn.init.normal_(critic.head.weight)
    return actor, critic


@pytest.mark.parametrize("gamma, lam, T", [(0.9, 0.95, 3), (0.9, 0.0, 1), (1.0, 1.0, 3), (0.8, 0.5, 3)])
def test_actor_gradient_is_the_policy_gradient_in_expectation(gamma, lam, T):
    """With the exact V, E[∇L_actor] = −Σ_s d(s) Σ_a ∇π(a|s) Q(s, a) for every λ, d the states of the rollouts."""
    mdp = MDP()
    actor, _ = make_tabular()
    pi = actor(torch.eye(S + 1)).log_probs.exp()
    V, Q = exact_values(mdp.P, mdp.R, pi[:S].detach(), gamma)
    obs, actions, rewards, terminated, resets, p = enumerated_rollouts(mdp, actor, T)
    valid = (1 - resets) * p  # weighted so, the mean over `valid` is the expectation

    values = obs @ V
    advantages, _ = gae(values, rewards, terminated, terminated, gamma, lam)
    policy = actor(obs[:-1])
    loss = a2c_sync.actor_loss_fn(policy.log_prob(actions), advantages, policy.entropy(), 0.0, valid)
    ours = torch.autograd.grad(loss, actor.head.weight)[0]

    d = (obs[:-1] * valid.unsqueeze(-1)).sum((0, 1))[:S] / valid.sum()
    exact = torch.autograd.grad(-(d[:, None] * pi[:S] * Q).sum(), actor.head.weight)[0]
    assert exact.norm() > 0.01
    torch.testing.assert_close(ours, exact)


def test_actor_gradient_is_that_of_the_return_whatever_the_critic():
    """Whole episodes (γ = λ = 1, three steps, then terminated): the gradient of J itself, whatever the baseline V."""
    mdp = MDP(1)
    actor, critic = make_tabular()
    obs, actions, rewards, terminated, resets, p = enumerated_rollouts(mdp, actor, 3)
    # An episode of at most 3 steps: what runs on is terminated there, and what follows a termination does not count
    alive = torch.cat([torch.ones(1, p.shape[0]), (1 - terminated[:-1]).cumprod(0)])
    terminated[-1] = 1.0
    # J = Σ_paths p(path) Σ_t alive r, with p(path) differentiable in the policy
    states_p = p / actor(obs[:-1]).log_prob(actions).sum(0).exp().detach()
    path_p = states_p * actor(obs[:-1]).log_prob(actions).sum(0).exp()
    J = (path_p * (alive * rewards).sum(0)).sum()
    exact = torch.autograd.grad(-J, actor.head.weight)[0]

    values = critic(obs).detach()
    advantages, _ = gae(values, rewards, terminated, terminated, 1.0, 1.0)
    policy = actor(obs[:-1])
    valid = alive * p
    loss = a2c_sync.actor_loss_fn(policy.log_prob(actions), advantages, policy.entropy(), 0.0, valid)
    ours = torch.autograd.grad(loss, actor.head.weight)[0] * valid.sum()  # a mean over steps -> a sum over an episode's
    assert exact.norm() > 0.01
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_critic_fixed_point_is_the_exact_value(lam):
    mdp, gamma = MDP(2), 0.9
    actor, critic = make_tabular()
    V, _ = exact_values(mdp.P, mdp.R, actor(torch.eye(S + 1)).log_probs.exp()[:S].detach(), gamma)
    obs, actions, rewards, terminated, resets, p = enumerated_rollouts(mdp, actor, 3)
    valid = (1 - resets) * p  # weighted so, the mean over `valid` is the expectation
    for _ in range(60):  # targets from the current V, then regression on them
        _, returns = gae(critic(obs).detach(), rewards, terminated, terminated, gamma, lam)
        optimizer = torch.optim.LBFGS(critic.parameters(), max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-14)

        def closure():
            optimizer.zero_grad()
            loss = a2c_sync.critic_loss_fn(critic(obs)[:-1], returns, valid)
            loss.backward()
            return loss

        optimizer.step(closure)
    # The terminal state's V is never trained and never used: bootstraps from it are masked
    torch.testing.assert_close(critic(torch.eye(S + 1))[:S], V[:S], atol=1e-6, rtol=1e-6)


# --- Where gradients flow ---------------------------------------------------------------------------------------------


def test_losses_reach_only_what_they_should():
    """Pitfall 7: no gradient through advantages or targets."""
    agent = ActorCritic((3,), 2, True, False)
    loss, _ = loss_fn(agent, make_batch(True), make_args(value_coef=0.0))
    loss.backward()
    assert agent.actor.head.weight.grad.any() and not any(p.grad.any() for p in agent.critic.parameters())


def test_reset_steps_carry_no_gradient():
    values, log_probs = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    valid = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    loss = a2c_sync.critic_loss_fn(values, torch.randn(3, 2), valid)
    loss = loss + a2c_sync.actor_loss_fn(log_probs, torch.randn(3, 2), torch.randn(3, 2), 0.1, valid)
    loss.backward()
    assert ((values.grad != 0) == (valid == 1)).all() and ((log_probs.grad != 0) == (valid == 1)).all()


def test_images_are_scaled_in_the_network():
    network, seen = a2c_sync.NatureCNN(4, 84, 84), []
    network.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(torch.full((2, 4, 84, 84), 255, dtype=torch.uint8))
    assert seen[0].min() == seen[0].max() == 1.0


def test_shapes_that_would_broadcast_are_refused():
    """Pitfall 8: (N, 1) against (N,), whichever argument has it."""
    assert Critic(nn.Identity(), 5)(torch.zeros(3, 2, 5)).shape == (3, 2)
    functions = [
        (a2c_sync.masked_mean, [(3,)] * 2),
        (gae, [(4, 3)] + [(3, 3)] * 3),
        (a2c_sync.critic_loss_fn, [(3,)] * 3),
    ]
    functions += [(off_policy_ac.td_target, [(3,)] * 3), (sac.td_target, [(3,)] * 3)]
    for function, shapes in functions:
        more = {"gae": (0.9, 0.9), "td_target": (0.9,)}.get(function.__name__, ())
        function(*map(torch.zeros, shapes), *more)
        for i, shape in enumerate(shapes):
            wrong = [*shapes[:i], (*shape, 1), *shapes[i + 1 :]]
            with pytest.raises(AssertionError):
                function(*map(torch.zeros, wrong), *more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flags_may_be_bool(dtype):
    """And give the numbers that those of 0.0 and 1.0 give, bit for bit; a float64 between them keeps its digits."""
    values, (x, y), flags = torch.randn(6, 4, dtype=dtype), torch.randn(2, 5, 4, dtype=dtype), torch.rand(2, 5, 4) < 0.4
    functions = [lambda a, b: gae(values, x, a, b, 0.9, 0.8)[0], lambda a, b: gae(values, x, a, b, 0.9, 0.8)[1]]
    functions += [lambda a, b: masked_mean(x, a), lambda a, b: off_policy_ac.td_target(x, a, y, 0.9)]
    functions += [lambda a, b: sac.td_target(x, a, y, 0.9)]
    for function in functions:
        found = function(*flags)
        assert found.dtype == dtype and torch.equal(found, function(*flags.to(dtype)))
    if dtype == torch.float64:
        a, b = torch.rand(2, 5, 4)
        assert torch.equal(gae(values, x, a, b, 0.9, 0.0)[0], x + 0.9 * (1 - a) * values[1:] - values[:-1])
        for script in (off_policy_ac, sac):
            assert torch.equal(script.td_target(x, a, y, 0.9), x + 0.9 * (1 - a) * y)
        torch.testing.assert_close(masked_mean(x, a), (x * a).sum() / a.sum(), rtol=1e-14, atol=0)
    assert masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=bool)).item() == 0  # of nothing


@pytest.mark.parametrize("script", [a2c_sync, a3c_async], ids=lambda script: script.__name__)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 36, 36)], ids=str)
def test_layers_begin_orthogonal_with_the_gains_of_the_table(script, shared, shape):
    """By singular values: √2, so that ReLU and tanh keep the size of signals; heads 0.01 and 1. σ begins at 1."""
    agent, image = script.ActorCritic(shape, 2, False, shared), len(shape) == 3
    body = [f"net.0.{i}" for i in (0, 2, 4)] + ["net.1"] if image else ["0", "2"]
    gains = {"actor.head": 0.01, "critic.head": 1.0}
    for place in ["encoder"] if shared else ["actor.body", "critic.body"]:  # which share nothing (D1)
        gains |= {f"{place}.{layer}": 2**0.5 for layer in body}
    parameters = dict(agent.named_parameters())
    assert (parameters.pop("actor.log_std") == 0).all()
    for layer, gain in gains.items():
        weight, bias = parameters.pop(f"{layer}.weight"), parameters.pop(f"{layer}.bias")
        singular = torch.linalg.svdvals(weight.flatten(1))
        torch.testing.assert_close(singular, torch.full_like(singular, gain))
        assert not bias.any()
    assert not parameters


# --- One update, written out plainly ----------------------------------------------------------------------------------


def make_args(**flags):
    defaults = {"gamma": 0.9, "gae_lambda": 0.7, "ent_coef": 0.03, "value_coef": 0.4, "max_grad_norm": None}
    return SimpleNamespace(**(defaults | flags))


def make_batch(discrete, T=7, N=8):
    """A random rollout with ends of both kinds and the resets that follow them."""
    terminated, truncated, done = torch.zeros(T, N), torch.zeros(T, N), torch.zeros(T + 1, N)
    for t in range(T):
        terminated[t] = (torch.rand(N) < 0.2) * (1 - done[t])
        truncated[t] = (torch.rand(N) < 0.2) * (1 - done[t])
        done[t + 1] = torch.maximum(terminated[t], truncated[t])
    assert done[:-1].any() and (done[1:] > terminated).any() and terminated.any()
    actions = torch.randint(2, (T, N)) if discrete else torch.randn(T, N, 2)
    return Rollout(torch.randn(T + 1, N, 3), actions, torch.randn(T, N), terminated, done)


def written_out(agent, batch, args):
    """Actor's loss, critic's loss, mean value, mean entropy of a rollout, a transition at a time."""
    T, N = batch.rewards.shape
    V = [[agent.critic(agent.encoder(batch.obs[t, n])) for n in range(N)] for t in range(T + 1)]
    v = [[V[t][n].item() for n in range(N)] for t in range(T + 1)]
    advantages = []
    for n in range(N):
        rewards, terminated, done = (x[:, n].tolist() for x in (batch.rewards, batch.terminated, batch.done[1:]))
        column = [row[n] for row in v]
        advantages.append(brute_force(rewards, column, terminated, done, args.gamma, args.gae_lambda))
    actor, critic, values, entropies, count = 0.0, 0.0, 0.0, 0.0, 0
    for t in range(T):
        for n in range(N):
            if batch.done[t, n]:  # step t only reset
                continue
            features = agent.encoder(batch.obs[t, n])
            outputs = agent.actor.head(agent.actor.body(features))
            if agent.actor.log_std is None:
                policy = torch.distributions.Categorical(logits=outputs)
                log_prob, entropy = policy.log_prob(batch.actions[t, n]), policy.entropy()
            else:
                policy = torch.distributions.Normal(outputs.tanh(), agent.actor.log_std.exp())
                log_prob, entropy = policy.log_prob(batch.actions[t, n]).sum(), policy.entropy().sum()
            advantage = advantages[n][t]
            critic = critic + 0.5 * (V[t][n] - (advantage + v[t][n])) ** 2
            actor = actor - log_prob * advantage - args.ent_coef * entropy
            values, entropies, count = values + v[t][n], entropies + entropy.item(), count + 1
    return actor / count, critic / count, values / count, entropies / count


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("shared", [False, True])
def test_the_loss_is_the_one_written_out_plainly(discrete, shared):
    """D4: loss, metrics and the gradient of every parameter; step by step, from the rollout's own rows."""
    agent, args, batch = ActorCritic((3,), 2, discrete, shared), make_args(), make_batch(discrete)
    actor, critic, value, entropy = written_out(agent, batch, args)
    expected = torch.autograd.grad(actor + args.value_coef * critic, list(agent.parameters()))
    loss, metrics = loss_fn(agent, batch, args)
    assert loss.item() == pytest.approx((actor + args.value_coef * critic).item())
    wanted = {"actor_loss": actor.item(), "critic_loss": critic.item(), "value": value, "entropy": entropy}
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(wanted)
    assert not any(x.requires_grad for x in metrics.values())
    for ours, theirs in zip(torch.autograd.grad(loss, list(agent.parameters())), expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("max_grad_norm", [None, 0.1, 100.0])
@pytest.mark.parametrize("shared", [False, True])
def test_an_update_is_one_step_along_the_clipped_gradient(shared, max_grad_norm):
    """Each network is clipped on its own; gradients of earlier updates do not add up."""
    agent, args, batch = ActorCritic((3,), 2, True, shared), make_args(max_grad_norm=max_grad_norm), make_batch(True)
    groups = [list(agent.parameters())] if shared else [list(agent.actor.parameters()), list(agent.critic.parameters())]
    optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=0.5)
    for _ in range(3):
        loss, _ = loss_fn(agent, batch, args)
        expected = []
        for group in groups:
            grads = torch.autograd.grad(loss, group, retain_graph=True)
            norm = torch.cat([g.flatten() for g in grads]).norm().item()
            scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / norm)
            expected += [(p.detach() - 0.5 * scale * g).clone() for p, g in zip(group, grads)]
        metrics = update(agent, optimizer, batch, args)
        assert metrics.keys() == {"critic_loss", "actor_loss", "value", "entropy"}
        for p, wanted in zip([p for group in groups for p in group], expected):
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-5, atol=1e-7)


def test_a_network_without_gradient_is_passed_over():
    """As a user's own network may have parameters that a loss does not reach."""
    agent = ActorCritic((3,), 2, True, False)
    idle, before = nn.Parameter(torch.zeros(1)), agent.actor.head.weight.detach().clone()
    optimizer = RMSpropA3C([{"params": [*agent.actor.parameters(), idle]}, {"params": [nn.Parameter(torch.ones(1))]}])
    update(agent, optimizer, make_batch(True), make_args(max_grad_norm=0.5))
    assert idle.item() == 0 and (agent.actor.head.weight != before).any()


@pytest.mark.parametrize("script", [a2c_sync, a3c_async, "hogwild"], ids=["a2c_sync", "a3c_async", "hogwild"])
def test_sigma_is_bounded_after_an_update_and_finds_back(script):
    """However large the entropy bonus; and at once when entropy is punished."""
    agent, batch = ActorCritic((3,), 2, False, False), make_batch(False)
    optimizer = torch.optim.SGD(agent.actor.parameters(), lr=0.1)
    agent.actor.log_std.data.fill_(0.999)
    for ent_coef in (5.0, -5.0):
        args = make_args(ent_coef=ent_coef)
        if script == "hogwild":
            a3c_async.hogwild_update(copy.deepcopy(agent), optimizer, batch, args, agent, lambda: True)
        else:
            script.update(agent, optimizer, batch, args)
        assert (agent.actor.log_std == 1).all() if ent_coef > 0 else (agent.actor.log_std < 1).all()


def test_learning_rates_fall_to_zero_each_from_its_own():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "initial_lr": lr} for lr in (1e-3, 1e-2)])
    for progress, share in ((0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (1.0, 0.0), (1.1, 0.0)):
        a2c_sync.decay_learning_rates(optimizer, progress)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3 * share, 1e-2 * share])


def test_trunk_gradients_measure_the_conflict():
    """D2, the value coefficient included; the losses written out a transition at a time."""
    agent, args, batch = ActorCritic((3,), 2, True, True), make_args(value_coef=0.3), make_batch(True)
    actor, critic, _, _ = written_out(agent, batch, args)
    trunk, flat = list(agent.encoder.parameters()), []
    for loss in (actor, args.value_coef * critic):
        flat.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trunk, retain_graph=True)]))
    result = a2c_sync.trunk_gradients(agent, batch, args)
    assert result["trunk_actor_grad"].item() == pytest.approx(flat[0].norm().item())
    assert result["trunk_critic_grad"].item() == pytest.approx(flat[1].norm().item())
    assert result["trunk_grad_cosine"].item() == pytest.approx(torch.cosine_similarity(*flat, dim=0).item())
    assert args.value_coef == 0.3 and all(p.grad is None for p in agent.parameters())  # it leaves nothing behind


# --- Policies and optimizer -------------------------------------------------------------------------------------------


def test_categorical_equals_torchs():
    logits = torch.randn(5, 4, 3)
    ours, theirs = a2c_sync.Categorical(logits), torch.distributions.Categorical(logits=logits)
    actions = theirs.sample()
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert (ours.mode() == theirs.mode).all()
    counts = torch.bincount(a2c_sync.Categorical(logits[0, 0].expand(200_000, 3)).sample(), minlength=3) / 200_000
    torch.testing.assert_close(counts, logits[0, 0].softmax(-1), atol=0.005, rtol=0)


def test_gaussian_equals_torchs():
    mean, log_std = torch.randn(5, 4, 3), torch.randn(3)
    ours = a2c_sync.Gaussian(mean, log_std)
    theirs = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    actions = theirs.sample()
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    samples = a2c_sync.Gaussian(mean[0, 0].expand(200_000, 3), log_std).sample()
    torch.testing.assert_close(samples.mean(0), mean[0, 0], atol=0.03, rtol=0)
    torch.testing.assert_close(samples.std(0), log_std.exp(), atol=0.03, rtol=0.01)


@pytest.mark.parametrize("flags", [{}, {"lr": 0.1, "alpha": 0.9, "eps": 0.01}, {"alpha": 0.0}], ids=str)
def test_rmsprop_has_epsilon_inside_the_root(flags):
    """Pitfall 9, by hand: g ← αg + (1 − α)Δ², θ ← θ − ηΔ/√(g + ε); A3C's η, α and ε where none are given."""
    theta = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer, g, x = RMSpropA3C([theta], **flags), torch.ones(2), theta.detach().clone()
    lr, alpha, eps = ({"lr": 7e-4, "alpha": 0.99, "eps": 1e-5} | flags).values()
    for gradient in (torch.tensor([0.5, 0.0]), torch.tensor([-0.2, 1e-4])):
        theta.grad, before = gradient.clone(), x
        optimizer.step()
        g = alpha * g + (1 - alpha) * gradient**2
        x = x - lr * gradient / torch.sqrt(g + eps)
        torch.testing.assert_close(theta.detach() - before, x - before, rtol=1e-6, atol=0)
    # the first step with a tiny gradient stays tiny; torch.optim.RMSprop would move by 10 η
    assert abs(theta[1].item() + 2.0) < lr * 0.05


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_a_surprise_after_a_long_calm_moves_no_tensor_by_more_than_the_rate(shared):
    """Update clipping: 1,400 updates without an error, then a rollout that is all wrong. As published, RMSProp would
    take a step of 10 η in every weight; a policy that had solved its task was gone after it."""
    agent, args = ActorCritic((3,), 2, True, shared), a2c_sync.Args(network="shared" if shared else "separate")
    optimizer, before = a2c_sync.make_optimizer(agent, args), copy.deepcopy(agent)
    for p in agent.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(1400):
        optimizer.step()
    assert same(agent.state_dict(), before.state_dict())
    batch = make_batch(True)
    update(agent, optimizer, batch._replace(rewards=batch.rewards + 10_000), args)
    for p, old in zip(agent.parameters(), before.parameters()):
        unclipped = p.grad / (optimizer.state[p]["square_avg"] + args.rmsprop_eps).sqrt()
        assert unclipped.square().mean().sqrt() > 5
        assert (p - old).square().mean().sqrt().item() == pytest.approx(args.actor_lr, rel=1e-3)
        cosine = torch.cosine_similarity(unclipped.flatten(), (old - p).flatten(), dim=0)
        assert cosine.item() == pytest.approx(1, abs=1e-3)


# --- The sections by themselves ---------------------------------------------------------------------------------------

OF_A2C = [case for case in CASES if CASES[case][0] is a2c_sync]
PASTED = [(script, case) for script in (a2c_sync, a3c_async) for case in OF_A2C]
PASTED += [(CASES[case][0], case) for case in CASES if case not in OF_A2C]


def pasted(script):
    """Networks, Equations and Update, with those imports of the script that are torch's or the standard library's."""
    source = Path(script.__file__).read_text()
    parts = re.split(r"^# --- (\w+) -+\n", source, flags=re.MULTILINE)
    imports = re.findall(r"^(?:import|from) (?!common|numpy).*", parts[0], re.MULTILINE)
    roots = {words.split()[1].split(".")[0] for words in imports}
    assert roots - {"torch"} <= sys.stdlib_module_names
    module = types.ModuleType("pasted")
    text = "\n".join(imports + [parts[parts.index(name) + 1] for name in ("Networks", "Equations", "Update")])
    exec(compile(text, "pasted", "exec"), vars(module))
    return module


@pytest.mark.parametrize("script, case", PASTED, ids=[f"{script.__name__} {case}" for script, case in PASTED])
def test_networks_equations_and_update_work_when_they_are_pasted(script, case):
    """Two updates, bit for bit those of the script."""
    torch.set_default_dtype(torch.float32)
    args, states = script.Args(**{k: v for k, v in CASES[case][1].items() if k in script.Args.__annotations__}), []
    for module in (script, pasted(script)):
        torch.manual_seed(0)
        agent = CASES[case][2](module)
        batch, optimizer = random_batch(agent), script.make_optimizer(agent, args)
        for _ in range(2):
            metrics = module.update(agent, optimizer, batch, args)
            if script is a2c_sync and args.network == "shared":
                metrics |= module.trunk_gradients(agent, batch, args)
            if script is a3c_async:
                module.hogwild_update(copy.deepcopy(agent), optimizer, batch, args, agent, lambda: True)
            if case in OF_A2C:
                module.decay_learning_rates(optimizer, 0.5)
        states.append((agent.state_dict(), metrics, agent.act(batch.obs[0]), agent.act(batch.obs[0], greedy=True)))
    assert same(*states)
