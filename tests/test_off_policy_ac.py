"""off_policy_ac.py: what its critic and its actor converge to, what goes into the buffer, and one run as a whole."""

import copy
import itertools
import json
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import checkpoint, metrics, results, same
from mdp import exact_values
from replay import recorded, transitions_of_the_first, written_out_run
from torch import nn
from toy_envs import Counting

import off_policy_ac
from common.envs import make_envs
from common.flags import UserError
from evaluate import load_agent
from off_policy_ac import (
    ActorCritic,
    Args,
    Categorical,
    Critic,
    Gaussian,
    actor_loss_fn,
    check_flags,
    critic_loss_fn,
    importance_weights,
    leave_one_out,
    loss_fn,
    make_agent,
    make_optimizer,
    polyak_update,
    td_target,
    train,
    update,
)

SHORT = {
    "total_timesteps": 130, "learning_starts": 50, "batch_size": 16, "buffer_size": 1000, "eval_episodes": 1,
    "device": "cpu",
}  # fmt: skip


def run(**flags):
    return train(Args(**({"run_dir": "run"} | SHORT | flags)))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- A small MDP, enumerated exactly ----------------------------------------------------------------------------------
#
# Three states, two actions; entering state 3 terminates. All probabilities are multiples of 1/4, so a batch in which
# every (s, a, s') stands as often as its probability says is the buffer's distribution exactly: states uniform (D15),
# actions of an older policy mu.

GAMMA = 0.8
P = torch.tensor([[[0, 3, 1, 0], [1, 0, 2, 1]], [[0, 0, 1, 3], [3, 1, 0, 0]], [[2, 0, 1, 1], [0, 1, 3, 0]]]) / 4
R = torch.tensor([[1.0, -1.0], [0.5, 2.0], [-2.0, 1.0]])
MU = torch.tensor([[3, 1], [1, 3], [3, 1]]) / 4
PI_LOGITS = torch.tensor([[-1.0, 1.0], [1.0, -0.5], [-0.8, 0.8]])  # what mu does rarely, pi does often
TABULAR = SimpleNamespace(obs_spec=((4,), np.float32), num_actions=2, discrete=True)  # one-hot states


def true_values(pi):
    """V (4,) with 0 behind the end, and Q (3, 2)."""
    return exact_values(P, R, pi, GAMMA)


def enumerated(copies):
    """The buffer's distribution, `copies` times: rows of s, a, s', each as often as it is likely."""
    rows = [
        (s, a, t)
        for s, a, t in itertools.product(range(3), range(2), range(4))
        for _ in range(round(16 * (MU[s, a] * P[s, a, t]).item()))
    ]
    assert len(rows) == 48
    s, a, t = torch.tensor(rows * copies).T
    return SimpleNamespace(
        obs=torch.eye(4)[s], actions=a, old_log_probs=MU[s, a].log(),
        rewards=R[s, a], next_obs=torch.eye(4)[t], terminated=(t == 3).float(),
    )  # fmt: skip


def on_the_mdp(**flags):
    """Flags, and an agent with the policy PI_LOGITS and a critic of 32 units."""
    torch.manual_seed(0)
    args = Args(**({"gamma": GAMMA, "ent_coef": 0.0} | flags))
    check_flags(args)
    agent = make_agent(TABULAR, args)
    agent.actor.body, agent.actor.head = nn.Identity(), nn.Linear(4, 2, bias=False)
    agent.actor.head.weight.data = torch.cat([PI_LOGITS, torch.zeros(1, 2)]).T.contiguous()
    num_inputs = agent.critic.body[0].in_features
    agent.critic.body, agent.critic.head = nn.Sequential(nn.Linear(num_inputs, 32), nn.ReLU()), nn.Linear(32, 1)
    agent.target_critic = copy.deepcopy(agent.critic).requires_grad_(False)
    return args, agent


def values_of(critic):
    """(3, 2)"""
    with torch.no_grad():
        return critic(torch.eye(4)[:3], torch.tensor([[0, 0, 0], [1, 1, 1]])).T


def learned_values(**flags):
    """(3, 2), after 500 updates in which the actor stays what it is."""
    args, agent = on_the_mdp(actor_lr=1e-12, critic_lr=2e-2, tau=0.1, **flags)
    optimizer, batch = make_optimizer(agent, args), enumerated(4)
    for i in range(500):
        for group in optimizer.param_groups:
            group["lr"] *= 1 - 1 / (500 - i)  # linearly to 0
        update(agent, optimizer, batch, args)
    return values_of(agent.critic)


def test_the_critic_becomes_q_of_the_current_policy():
    """D10: whoever filled the buffer."""
    _, Q = true_values(PI_LOGITS.softmax(-1))
    _, Q_mu = true_values(MU)
    assert (Q - Q_mu).abs().min() > 0.2
    torch.testing.assert_close(learned_values(), Q, atol=0.12, rtol=0)


def test_the_naive_critic_becomes_v_of_the_old_policy():
    """D9a."""
    V, V_mu = true_values(PI_LOGITS.softmax(-1))[0][:3], true_values(MU)[0][:3]
    assert (V - V_mu).abs().min() > 0.3
    learned = learned_values(critic="v", actor_actions="buffer")
    torch.testing.assert_close(learned[:, 0], learned[:, 1])  # V ignores the action
    torch.testing.assert_close(learned[:, 0], V_mu, atol=0.12, rtol=0)


def actor_gradient(**flags):
    """Gradient (3, 2) of the actor's logits: mean over 2000 draws at every row, its standard error; and the agent.

    The averaged critic is another one than the critic: the actor must take its values from the right one.
    """
    args, agent = on_the_mdp(**flags)
    agent.target_critic.head.bias += 1.0
    batch, gradients = enumerated(10), []
    for _ in range(200):
        agent.zero_grad()
        loss_fn(agent, batch, args)[0].backward()
        gradients.append(agent.actor.head.weight.grad.T[:3].clone())
    gradients = torch.stack(gradients)
    return gradients.mean(0), gradients.std(0).mean() / len(gradients) ** 0.5, agent


def exact_gradient(agent):
    """−Σ_s d(s) Σ_a ∇π(a|s) Q(s, a); the buffer's states are uniform, Q is a constant."""
    logits = PI_LOGITS.clone().requires_grad_()
    return -torch.autograd.grad((values_of(agent.critic) * logits.softmax(-1)).sum() / 3, logits)[0]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"baseline": "none"},
        {"num_action_samples": 1, "baseline": "none"},
        {"num_action_samples": 2},
        {"actor_actions": "importance"},
        {"actor_actions": "importance", "baseline": "none"},
    ],
    ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()) or "default",
)
def test_actor_gradient_is_that_of_the_current_policy_at_the_buffers_states(flags):
    """D11, D12, D13, D14: Σ_s d_buffer(s) Σ_a ∇π(a|s) Q(s, a), in expectation."""
    ours, error, agent = actor_gradient(**flags)
    exact = exact_gradient(agent)
    assert exact.norm() > 20 * error
    torch.testing.assert_close(ours, exact, atol=5 * error.item() + 1e-6, rtol=0)


@pytest.mark.parametrize("critic", ["q", "v"])
@pytest.mark.parametrize("baseline", ["none", "samples"])
def test_naive_actor_gradient_is_another_one(critic, baseline):
    """D9b: with the buffer's actions it is Σ_s d(s) Σ_a μ(a|s) ∇log π(a|s) A; A is Q, or r + γV̄(s') (less V(s))."""
    ours, error, agent = actor_gradient(actor_actions="buffer", baseline=baseline, critic=critic)
    pi, Q = PI_LOGITS.softmax(-1), values_of(agent.critic)
    V = (pi * Q).sum(1, keepdim=True)
    if critic == "v":  # what V̄ says of the state behind the end does not matter
        Q = R + GAMMA * (P[..., :3] @ values_of(agent.target_critic)[:, 0])
    A = Q - V if baseline == "samples" else Q
    # Σ_a μ(a) (1{a = b} − π(b)) A(a)
    formula = -(MU * A - pi * (MU * A).sum(1, keepdim=True)) / 3
    torch.testing.assert_close(ours, formula, atol=5 * error.item() + 1e-6, rtol=0)
    exact = exact_gradient(agent)
    assert critic == "v" or (ours - exact).norm() > 0.2 * exact.norm() > 10 * error


# --- One update, written out plainly ----------------------------------------------------------------------------------


def make_batch(discrete, B=12, num_obs=4, A=3):
    """Random transitions, a few of which terminated, with actions of another policy, some beyond the bounds."""
    return SimpleNamespace(
        obs=torch.randn(B, num_obs), actions=torch.randint(A, (B,)) if discrete else 1.5 * torch.randn(B, A),
        old_log_probs=torch.randn(B) - 2, rewards=torch.randn(B), next_obs=torch.randn(B, num_obs),
        terminated=(torch.arange(B) % 4 == 0).to(torch.get_default_dtype()),
    )  # fmt: skip


def make_parts(discrete, **flags):
    """Flags, and an agent whose policy prefers something and whose averaged critic is another one than its critic."""
    torch.manual_seed(0)
    args = Args(**flags)
    check_flags(args)
    agent = make_agent(SimpleNamespace(obs_spec=((4,), np.float32), num_actions=3, discrete=discrete), args)
    with torch.no_grad():
        agent.actor.head.weight *= 50
        for p in agent.target_critic.parameters():
            p += 0.02 * torch.randn_like(p)
    return args, agent


def losses_written_out(agent, batch, args):
    """Actor's loss, critic's loss, mean Q, mean entropy, a transition at a time; noise is drawn as loss_fn draws it."""
    (B, K), discrete = (len(batch.obs), args.num_action_samples), batch.actions.ndim == 1

    def policy(obs):
        outputs = agent.actor.head(agent.actor.body(obs))
        if discrete:
            return torch.distributions.Categorical(logits=outputs)
        return torch.distributions.Independent(torch.distributions.Normal(outputs.tanh(), agent.actor.log_std.exp()), 1)

    def noise(*num):
        return torch.empty(*num, B, 3).exponential_() if discrete else torch.randn(*num, B, 3)

    def draw(policy, noise):
        return (policy.probs / noise).argmax() if discrete else (policy.mean + policy.stddev * noise).detach()

    def q(critic, obs, action):
        action = torch.eye(3)[action] if discrete else action.clamp(-1, 1)
        return critic.head(critic.body(torch.cat([obs, action]) if args.critic == "q" else obs))[0]

    next_noise, pi_noise = noise(), noise(K)
    actor_loss, critic_loss, values, entropies = 0.0, 0.0, [], []
    for i in range(B):
        # (1), (2)
        next_obs, obs, action = batch.next_obs[i], batch.obs[i], batch.actions[i]
        next_q = q(agent.target_critic, next_obs, draw(policy(next_obs), next_noise[i])).item()
        y = batch.rewards[i].item() + (0.0 if batch.terminated[i] else args.gamma * next_q)
        found = q(agent.critic, obs, action)
        critic_loss = critic_loss + 0.5 * (found - y) ** 2 / B
        # (3), (4), (5)
        pi = policy(obs)
        fresh = [draw(pi, pi_noise[k, i]) for k in range(K)]
        qs = [q(agent.critic, obs, each).item() for each in fresh]
        if args.actor_actions == "policy":
            for k in range(K):
                b = sum(qs[j] for j in range(K) if j != k) / (K - 1) if args.baseline == "samples" else 0.0
                actor_loss = actor_loss - pi.log_prob(fresh[k]) * (qs[k] - b) / (K * B)
        else:
            score = found.item() if args.critic == "q" else y
            b = sum(qs) / K if args.baseline == "samples" else 0.0
            log_prob, w = pi.log_prob(action), 1.0
            if args.actor_actions == "importance":
                w = min(math.exp(log_prob.item() - batch.old_log_probs[i].item()), 10.0)
            actor_loss = actor_loss - log_prob * w * (score - b) / B
        actor_loss = actor_loss - args.ent_coef * pi.entropy() / B
        values.append(found.item())
        entropies.append(pi.entropy().item())
    return actor_loss, critic_loss, torch.tensor(sum(values) / B), torch.tensor(sum(entropies) / B)


@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "box"])
@pytest.mark.parametrize("baseline", ["samples", "none"])
@pytest.mark.parametrize(
    "critic, actor_actions, K",
    [("q", "policy", 2), ("q", "policy", 5), ("q", "buffer", 3), ("v", "buffer", 1), ("q", "importance", 4)]
    + [("v", "importance", 2)],
)
def test_every_update_is_the_one_written_out_plainly(double, critic, actor_actions, K, baseline, discrete):
    """Metrics, the gradient of every parameter, the step along it, and that of the target network; three updates."""
    args, agent = make_parts(
        discrete, critic=critic, actor_actions=actor_actions, num_action_samples=K, baseline=baseline,
        gamma=0.7, tau=0.3, ent_coef=0.2,
    )  # fmt: skip
    networks = {agent.actor: 0.02, agent.critic: 0.05}
    optimizer = torch.optim.SGD([{"params": list(net.parameters()), "lr": lr} for net, lr in networks.items()])
    for _ in range(3):
        batch, rng = make_batch(discrete), torch.get_rng_state()
        actor_loss, critic_loss, value, entropy = losses_written_out(agent, batch, args)
        gradients = {
            net: torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
            for net, loss in zip(networks, (actor_loss, critic_loss))
        }
        before = copy.deepcopy([list(net.parameters()) for net in (*networks, agent.target_critic)])
        torch.set_rng_state(rng)
        found = update(agent, optimizer, batch, args)
        wanted = {"actor_loss": actor_loss, "critic_loss": critic_loss, "value": value, "entropy": entropy}
        assert {name: x.item() for name, x in found.items()} == pytest.approx(
            {name: x.item() for name, x in wanted.items()}
        )
        assert not any(x.requires_grad for x in found.values())
        for (net, lr), old in zip(networks.items(), before):
            for p, gradient, q in zip(net.parameters(), gradients[net], old):
                assert gradient.any()
                torch.testing.assert_close(p.grad, gradient)
                torch.testing.assert_close(p, q - lr * gradient)
        for p, source, old in zip(agent.target_critic.parameters(), agent.critic.parameters(), before[2]):
            torch.testing.assert_close(p, 0.3 * source + 0.7 * old)
            assert p.grad is None and not p.requires_grad


NAIVE = {"critic": "v", "actor_actions": "buffer"}


@pytest.mark.parametrize(
    "discrete, flags", [(True, {}), (False, {}), (True, {"actor_actions": "importance"}), (False, NAIVE)]
)
def test_the_actors_loss_leaves_no_gradient_in_the_critic(discrete, flags):
    """Pitfall 18: the critic's gradient is that of its own loss alone; without a rate of its own it does not move."""
    args, agent = make_parts(discrete, **flags)
    batch = make_batch(discrete)
    rng = torch.get_rng_state()
    with torch.no_grad():
        next_value = agent.target_critic(batch.next_obs, agent.actor(batch.next_obs).sample())
    q_target = td_target(batch.rewards, batch.terminated, next_value, args.gamma)
    loss = critic_loss_fn(agent.critic(batch.obs, batch.actions), q_target)
    wanted = torch.autograd.grad(loss, list(agent.critic.parameters()))
    before = copy.deepcopy(agent)
    params = [{"params": list(agent.actor.parameters())}, {"params": list(agent.critic.parameters()), "lr": 0.0}]
    torch.set_rng_state(rng)
    update(agent, torch.optim.SGD(params, lr=0.1), batch, args)
    assert all(torch.equal(p.grad, g) for p, g in zip(agent.critic.parameters(), wanted))
    assert same(dict(before.critic.state_dict()), dict(agent.critic.state_dict()))
    assert not any(torch.equal(p, q) for p, q in zip(agent.actor.parameters(), before.actor.parameters()))
    assert not any(p.requires_grad or p.grad is not None for p in agent.target_critic.parameters())


def test_each_network_has_its_own_rate():
    """Adam's first step is the rate itself, along the sign of the gradient; the target network is in no group."""
    for flags, critic_lr in (({"critic_lr": 1e-4}, 1e-4), ({}, 3e-3)):
        args, agent = make_parts(True, actor_lr=3e-3, tau=1e-9, **flags)
        optimizer = make_optimizer(agent, args)
        assert [group["lr"] for group in optimizer.param_groups] == [3e-3, critic_lr]
        before = copy.deepcopy(agent)
        update(agent, optimizer, make_batch(True), args)
        for net, old, lr in ((agent.actor, before.actor, 3e-3), (agent.critic, before.critic, critic_lr)):
            for p, q in zip(net.parameters(), old.parameters()):
                assert (p - q).abs().max().item() == pytest.approx(lr, rel=0.01)
        torch.testing.assert_close(agent.target_critic.state_dict(), before.target_critic.state_dict())


# --- Equations --------------------------------------------------------------------------------------------------------


def test_targets_by_hand():
    """A time limit is no end."""
    target = td_target(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([10.0, 10.0]), 0.5)
    assert target.tolist() == [6.0, 1.0]
    with pytest.raises(AssertionError):  # pitfall 8
        critic_loss_fn(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(AssertionError):
        actor_loss_fn(torch.zeros(4, 3), torch.zeros(3), torch.zeros(3), 0.0)
    assert critic_loss_fn(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 5.0])).item() == 2.5


def test_actor_loss_by_hand():
    """Good actions become likelier, and entropy is rewarded."""
    log_probs, entropy = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([3.0, 5.0], requires_grad=True)
    loss = actor_loss_fn(log_probs, torch.tensor([2.0, -4.0]), entropy, 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-(-2.0 + 8.0) / 2 - 0.4)
    assert log_probs.grad.tolist() == [-1.0, 2.0]
    torch.testing.assert_close(entropy.grad, torch.tensor([-0.05, -0.05]))


def test_an_entropy_bonus_alone_does_not_let_sigma_run_away():
    args, agent = make_parts(False, actor_lr=0.5, ent_coef=1.0)
    for critic in (agent.critic, agent.target_critic):
        critic.head.weight.data.zero_(), critic.head.bias.data.zero_()
    optimizer, batch = make_optimizer(agent, args), make_batch(False)
    batch.rewards.zero_()  # no value anywhere
    for _ in range(50):
        update(agent, optimizer, batch, args)
    assert (agent.actor.log_std == 1).all()


def test_leave_one_out_by_hand():
    assert leave_one_out(torch.tensor([[1.0], [2.0], [6.0]])).flatten().tolist() == [4.0, 3.5, 1.5]


def test_leave_one_out_adds_no_bias_and_takes_variance_away():
    """All 27 triples of three actions, weighted by their probability."""
    logits, Q = torch.tensor([0.3, -0.5, 1.0], requires_grad=True), torch.tensor([11.0, 12.0, 14.0])
    actions = torch.tensor(list(itertools.product(range(3), repeat=3))).T  # (K, 27)
    policy = Categorical(logits.expand(27, 3))
    log_probs = policy.log_prob(actions)
    p = log_probs.sum(0).exp().detach()
    exact = torch.autograd.grad((logits.softmax(-1) * Q).sum(), logits)[0]
    q, variances = Q[actions], []
    for scores in (q, q - leave_one_out(q)):
        rows = torch.stack(
            [torch.autograd.grad((log_probs * scores).mean(0)[i], logits, retain_graph=True)[0] for i in range(27)]
        )
        torch.testing.assert_close((p[:, None] * rows).sum(0), exact)
        variances.append((p[:, None] * (rows - exact) ** 2).sum())
    assert variances[1] < variances[0] / 20


@pytest.mark.parametrize("baseline", [False, True])
def test_variance_falls_with_the_number_of_samples(baseline):
    """D14: as 1/K without baseline; faster still with the leave-one-out baseline, which itself gets better."""
    torch.manual_seed(0)
    logits, Q = torch.tensor([0.3, -0.5, 1.0]), torch.tensor([1.0, 2.0, 4.0])
    variance = {}
    for K in (4, 16):
        policy = Categorical(logits.expand(50_000, 3))
        actions = policy.sample(K)
        q = Q[actions]
        scores = q - leave_one_out(q) if baseline else q
        # ∇ log π(a) = one_hot(a) − π
        gradient = ((nn.functional.one_hot(actions, 3) - logits.softmax(-1)) * scores.unsqueeze(-1)).mean(0)
        variance[K] = gradient.var(0).sum().item()
    ratio = variance[4] / variance[16]
    assert ratio > 4.2 if baseline else ratio == pytest.approx(4, rel=0.1)


def test_importance_weights_by_hand():
    log_probs = torch.tensor([0.5, 0.1, 0.9]).log().requires_grad_()
    weights = importance_weights(log_probs, torch.tensor([0.25, 0.2, 1e-6]).log(), 3.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.5, 3.0]))
    assert not weights.requires_grad


def test_importance_weights_are_clipped_at_ten_by_default():
    weights = importance_weights(torch.tensor([0.9, 0.5]).log(), torch.tensor([1e-6, 0.1]).log())
    torch.testing.assert_close(weights, torch.tensor([10.0, 5.0]))


def test_polyak_average_by_hand():
    target, source = nn.Linear(1, 1), nn.Linear(1, 1)
    a, b = target.weight.item(), source.weight.item()
    polyak_update(target, source, 0.1)
    assert target.weight.item() == pytest.approx(0.1 * b + 0.9 * a)  # τ weighs the new ones
    polyak_update(target, source, 1.0)
    assert target.weight.item() == b and source.weight.item() == b


# --- Networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [True, False])
def test_layers_start_orthogonal_and_the_policy_nearly_the_same_everywhere(discrete):
    torch.manual_seed(0)
    agent = ActorCritic(4, 3, discrete, sees_actions=True)
    for network, gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        assert [type(layer) for layer in network.body] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU]
        for layer, scale in ((network.body[0], 2**0.5), (network.body[2], 2**0.5), (network.head, gain)):
            assert not layer.bias.any()
            W = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
            torch.testing.assert_close(W @ W.T, scale**2 * torch.eye(len(W)), atol=1e-5, rtol=0)
    policy = agent.actor(torch.randn(100, 4))
    outputs = policy.log_probs.exp() - 1 / 3 if discrete else policy.mean
    assert outputs.abs().max() < 0.05 and (discrete or (policy.log_std == 0).all())
    assert same(dict(agent.critic.state_dict()), dict(agent.target_critic.state_dict()))


@pytest.mark.parametrize("K", [2, 7])
@pytest.mark.parametrize("discrete", [True, False])
def test_critic_gives_every_action_of_a_state_its_q(discrete, K):
    """(K, B) actions for (B,) states equal K passes; shapes stay those of the actions."""
    critic = Critic(4, 3, discrete, sees_actions=True)
    obs = torch.randn(5, 4)
    actions = torch.arange(K * 5).view(K, 5) % 3 if discrete else torch.randn(K, 5, 3).clamp(-1, 1)
    together = critic(obs, actions)
    assert together.shape == (K, 5) and critic(obs, actions[0]).shape == (5,)
    torch.testing.assert_close(together, torch.stack([critic(obs, a) for a in actions]))
    assert (together[0] != together[1]).any()


def test_q_takes_the_clipped_action_that_the_environment_takes():
    critic = Critic(4, 2, discrete=False, sees_actions=True)
    obs = torch.randn(1, 4)
    assert torch.equal(critic(obs, torch.tensor([[3.0, -0.5]])), critic(obs, torch.tensor([[1.0, -0.5]])))


@pytest.mark.parametrize(
    "make", [lambda: Categorical(torch.randn(4, 3)), lambda: Gaussian(torch.randn(4, 2), torch.randn(2))]
)
def test_many_samples_of_a_policy(make):
    torch.manual_seed(1)
    policy = make()
    samples = policy.sample(6)
    assert samples.shape[:2] == (6, 4) and policy.sample().shape == samples.shape[1:]
    assert len({s.numpy().tobytes() for s in samples}) > 1
    torch.testing.assert_close(policy.log_prob(samples), torch.stack([policy.log_prob(a) for a in samples]))


@pytest.mark.parametrize("discrete", [True, False])
def test_greedy_actions_are_the_likeliest_ones(discrete):
    _, agent = make_parts(discrete)
    obs = torch.randn(20, 4)
    policy = agent.actor(obs)
    likeliest = policy.log_probs.argmax(-1) if discrete else policy.mean
    assert torch.equal(agent.act(obs, greedy=True), likeliest)
    assert not torch.equal(agent.act(obs), likeliest) and not agent.act(obs).requires_grad


# --- What goes into the buffer (pitfalls 1 to 4) ----------------------------------------------------------------------

RecordedCounting = recorded(Counting)
gym.register("RecordedCounting-v0", RecordedCounting)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_what_is_stored_is_what_happened(workdir, num_envs):
    """All transitions in their order and no reset step, though every 7 steps all environments start anew."""
    RecordedCounting.happened.clear()
    end = run(
        env_id="RecordedCounting-v0", num_envs=num_envs, checkpoint_every=7, total_timesteps=200, updates_per_step=1e-9
    )
    stored = checkpoint("run")["parts"]["buffer"]["fields"]
    happened = transitions_of_the_first(RecordedCounting.happened, num_envs)
    assert len(happened["obs"]) == end["env_steps"] >= 200 and end["updates"] == 0
    assert set(stored) == set(happened) | {"old_log_probs"}
    assert all(torch.equal(stored[name], happened[name]) for name in happened)
    args = Args(env_id="RecordedCounting-v0")
    torch.manual_seed(args.seed)
    agent = make_agent(make_envs(args), args)  # never updated
    log_probs = agent.actor(stored["obs"]).log_prob(stored["actions"])
    torch.testing.assert_close(stored["old_log_probs"], log_probs.detach())
    assert 0.2 < stored["actions"].float().mean() < 0.8  # it acts by chance: a new policy is nearly even


@pytest.mark.parametrize("num_envs", [1, 3])
def test_every_transition_belongs_to_an_episode_that_is_logged(workdir, num_envs):
    """Every (s, s') is consecutive, only true ends terminate; with what was going on at the end, nothing is missing."""
    end = run(
        env_id="toy_envs:Counting-v0", num_envs=num_envs, checkpoint_every=10**9, total_timesteps=500,
        updates_per_step=1e-9,
    )  # fmt: skip
    stored = checkpoint("run")["parts"]["buffer"]["fields"]
    assert len(stored["obs"]) == end["env_steps"] >= 500
    (episode, t), (next_episode, next_t) = stored["obs"].T, stored["next_obs"].T
    assert torch.equal(episode, next_episode) and torch.equal(t + 1, next_t) and torch.equal(stored["rewards"], next_t)
    lengths = [float(value) for _, tag, value in metrics("run") if tag == "charts/episodic_length"]
    assert 0 <= end["env_steps"] - sum(lengths) < 5 * num_envs  # those that were going on
    starts = int((t == 0).sum())
    assert len(lengths) <= starts <= len(lengths) + num_envs
    assert 0 < stored["terminated"].sum() < len(lengths)
    assert not (stored["terminated"].bool() & (episode % 3 == 0)).any()  # those are only truncated


def test_a_nan_reward_does_not_get_into_a_checkpoint(workdir):
    with pytest.raises(UserError, match="reward is not finite at environment step 200"):
        run(env_id="toy_envs:Broken-v0", total_timesteps=300, checkpoint_every=40, learning_starts=250)
    assert checkpoint("run")["parts"]["buffer"]["fields"]["rewards"].isfinite().all()


def test_what_is_not_finite_is_not_stored(workdir):
    with pytest.raises(UserError, match="observation is not finite"):
        run(env_id="toy_envs:BrokenObsBox-v0", checkpoint_every=20)
    assert checkpoint("run")["parts"]["buffer"]["fields"]["next_obs"].isfinite().all()


def value_of_constant(env_id, **flags):
    flags = {"gamma": 0.9, "ent_coef": 0.0, "total_timesteps": 600, "tau": 0.2, "critic_lr": 5e-3} | flags
    run(env_id=env_id, buffer_size=10_000, **flags)
    agent, args, _, _ = load_agent("run")
    obs = torch.as_tensor(make_envs(args, 1).reset(seed=0)[0])
    with torch.no_grad():
        return agent.critic(obs, torch.zeros(1, dtype=torch.int64)).item()


@pytest.mark.parametrize("flags", [{}, NAIVE], ids=["q", "v"])
def test_value_under_a_time_limit_is_that_of_going_on(workdir, flags):
    assert value_of_constant("toy_envs:Constant-v0", **flags) == pytest.approx(10, abs=0.1)


def test_value_of_what_terminates_is_the_finite_sum(workdir):
    value = value_of_constant("toy_envs:Terminating-v0")
    assert value == pytest.approx((1 - 0.9**10) / (1 - 0.9), abs=0.1)  # 6.5


# --- One run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {"env_id": "toy_envs:Counting-v0", "num_envs": 3, "updates_per_step": 0.7, "critic_lr": 3e-3},
        {"env_id": "toy_envs:CountingBox-v0", "actor_actions": "importance", "buffer_size": 40},
    ],
    ids=["discrete", "box"],
)
def test_a_run_is_the_loop_written_out_plainly(workdir, flags):
    """Bit-identical weights: seeds, resets, acting, rates, what is stored and sampled, and when it is learned from."""
    flags |= {"checkpoint_every": 20, "matmul_precision": "highest"}
    end = run(**flags)

    def act(agent, optimizer, obs, env_steps):
        with torch.no_grad():
            policy = agent.actor(obs)
            actions = policy.sample()
            return {"actions": actions, "old_log_probs": policy.log_prob(actions)}

    args = Args(**(SHORT | flags))
    agent, updates = written_out_run(off_policy_ac, args, act)
    assert updates == end["updates"] > 50
    assert same(dict(agent.state_dict()), checkpoint("run")["parts"]["agent"])


FLAGS = [
    {},
    {"actor_actions": "buffer", "num_envs": 3},
    {"actor_actions": "importance", "env_id": "Pendulum-v1", "num_envs": 2, "buffer_size": 40},
    {"actor_actions": "importance", "baseline": "none", "tau": 1.0, "ent_coef": 0.0, "env_id": "toy_envs:SmallInts-v0"},
    {"critic": "v", "actor_actions": "buffer", "env_id": "Pendulum-v1"},
    {"critic": "v", "actor_actions": "importance", "baseline": "none", "env_id": "toy_envs:Shifted-v0"},
    {"baseline": "none", "num_action_samples": 1, "env_id": "toy_envs:Doubles-v0"},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()) or "default")
def test_flags(workdir, flags):
    """Every weight moves; results and metrics are written."""
    end = run(**flags)
    args = Args(**(SHORT | flags))
    torch.manual_seed(args.seed)
    initial = make_agent(make_envs(args), args).state_dict()
    trained = checkpoint("run")["parts"]["agent"]
    assert [name for name in initial if torch.equal(initial[name], trained[name])] == []
    assert end["updates"] >= 70 and math.isfinite(end["eval_return_mean"])
    saved = json.loads(open("run/results.json").read())
    assert saved == end
    tags = {tag for _, tag, _ in metrics("run")}
    assert {"losses/actor_loss", "losses/critic_loss", "losses/value", "losses/entropy"} <= tags


@pytest.mark.parametrize("num_envs, updates_per_step", [(1, 1.0), (4, 1.0), (3, 0.25), (2, 2.0)])
def test_updates_are_counted_per_transition(workdir, monkeypatch, num_envs, updates_per_step):
    """Pitfall 19."""
    calls = []
    monkeypatch.setattr(off_policy_ac, "update", lambda *_: calls.append(1) or {"critic_loss": torch.zeros(())})
    end = run(num_envs=num_envs, updates_per_step=updates_per_step, total_timesteps=400, learning_starts=100)
    assert end["updates"] == pytest.approx((end["env_steps"] - 100) * updates_per_step, abs=num_envs * 2)
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


@pytest.mark.parametrize(
    "flags, part",
    [
        ({"env_id": "toy_envs:Images-v0"}, "takes vectors; for images use a2c_sync.py"),
        ({"env_id": "toy_envs:ImagesBox-v0"}, "takes vectors; for images use a2c_sync.py"),
        ({"critic": "v"}, "--actor-actions buffer, or importance"),
        ({"num_action_samples": 1}, "--num-action-samples 2"),
        ({"buffer_size": 2, "num_envs": 3}, "--buffer-size must be at least --num-envs"),
        ({"learning_starts": 30_000}, "nothing would be learned"),
    ],
    ids=str,
)
def test_bad_input(workdir, flags, part):
    """One sentence, before anything is written."""
    with pytest.raises(UserError, match=part):
        train(Args(**flags))
    assert not list(workdir.iterdir())


def test_it_learns(workdir):
    """A random policy gets -21; the best, which looks at the observation, 0. Continuous, by the score function only."""
    end = run(
        env_id="toy_envs:Target-v0", num_envs=4, total_timesteps=1_000, updates_per_step=0.7, actor_lr=5e-3,
        batch_size=64, buffer_size=10_000, eval_episodes=50,
    )  # fmt: skip
    assert end["eval_return_mean"] > -4


# --- Slow: learning ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_pendulum_is_learned_by_the_score_function_alone(workdir, seed):
    end = train(Args(env_id="Pendulum-v1", total_timesteps=15_000, seed=seed, run_dir="run"))
    assert end["eval_return_mean"] > -200
