"""sac.py: its densities and gradients against numbers from elsewhere, and one run as a whole."""

import dataclasses
import inspect
import math
from functools import partial

import pytest
import replay
import torch
from helpers import checkpoint
from torch import nn
from toy_envs import CountingBox

import common.compile
import off_policy_ac
import sac
from evaluate import load_args
from sac import ActorCritic, BatchedLinear, SquashedGaussian, soft_value, train, update

run = partial(replay.short_run, sac)


@pytest.mark.parametrize("name", ["orthogonal", "MLP", "td_target", "leave_one_out", "polyak_update"])
def test_what_does_the_same_as_in_off_policy_ac_is_the_same_text(name):
    """Equation numbers included: what the tests of off_policy_ac.py say of it holds here."""
    assert inspect.getsource(getattr(sac, name)) == inspect.getsource(getattr(off_policy_ac, name))


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


# --- Losses -----------------------------------------------------------------------------------------------------------


def test_targets_by_hand():
    """The least critic (D17); the entropy term inside (1 − terminated), pitfall 17; a time limit is no end."""
    next_value = soft_value(torch.tensor([[10.0, 10.0], [8.0, 12.0]]), torch.tensor([-2.0, -2.0]), 0.5)
    target = sac.td_target(torch.ones(2), torch.tensor([False, True]), next_value, 0.9)
    torch.testing.assert_close(target, torch.tensor([1 + 0.9 * (8 + 1), 1.0]))
    loss = sac.critic_loss_fn(torch.tensor([[1.0, 2.0], [3.0, 3.0]]), torch.tensor([1.0, 4.0]))
    assert loss.item() == pytest.approx(0.5 * (0 + 4) / 2 + 0.5 * (4 + 1) / 2)
    zeros = torch.zeros
    for call in (  # pitfall 8: shapes that would broadcast
        lambda: sac.critic_loss_fn(zeros(2, 3, 1), zeros(3)),
        lambda: soft_value(zeros(2, 1, 3), zeros(3, 1), 0.1),
        lambda: sac.score_loss_fn(zeros(3, 1), zeros(3)),
    ):
        with pytest.raises(AssertionError):
            call()


def actor_loss(estimator, policy, q, alpha, num):
    """Of `num` samples; q(u) is Q of the action tanh u."""
    u = policy.sample(num)
    u = u if estimator == "reparam" else u.detach()
    log_probs = policy.log_prob(u)
    scores = soft_value(q(u).unsqueeze(0), log_probs, alpha)
    return sac.actor_loss_fn(scores) if estimator == "reparam" else sac.score_loss_fn(log_probs, scores.detach())


@pytest.mark.parametrize("estimator", ["reparam", "score"])
def test_the_optimum_is_the_boltzmann_policy(estimator):
    """D18. One state with known Q, such that exp(Q/α)/Z is a squashed Gaussian: that is where the policy must go."""
    torch.manual_seed(0)
    alpha, boltzmann = 0.5, SquashedGaussian(torch.tensor([0.5]), torch.tensor([-0.6]))
    mean, log_std = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    steps, lr = 500, 0.03
    optimizer = torch.optim.Adam([mean, log_std], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        policy = SquashedGaussian(mean.expand(1, 1), log_std.expand(1, 1))
        optimizer.zero_grad()
        actor_loss(estimator, policy, lambda u: 7 + alpha * boltzmann.log_prob(u), alpha, 256).backward()
        optimizer.step()
    assert mean.item() == pytest.approx(0.5, abs=0.02) and log_std.item() == pytest.approx(-0.6, abs=0.02)


def test_both_estimators_have_one_expectation_and_reparameterization_the_smaller_variance():
    """D16. One state, K = 2."""
    torch.manual_seed(0)
    num, gradients = 200_000, {}
    for estimator in ("reparam", "score"):
        parameters = torch.tensor([0.2, -0.3]).expand(num, 2).clone().requires_grad_()
        policy = SquashedGaussian(parameters[:, :1], parameters[:, 1:])
        actor_loss(estimator, policy, lambda u: -2 * (u.tanh().squeeze(-1) - 0.4) ** 2, 0.1, 2).backward()
        gradients[estimator] = parameters.grad * num  # of every repetition
    (mean_r, var_r), (mean_s, var_s) = ((g.mean(0), g.var(0)) for g in gradients.values())
    error = ((var_r + var_s) / num).sqrt()
    assert ((mean_r - mean_s).abs() < 4 * error).all() and (mean_r.abs() > 20 * error).all()
    assert (var_r < var_s / 2).all()


def test_temperature_rises_below_the_target_entropy_and_falls_above():
    """Fixed point at an entropy of −dim A; α stays positive, since log α is what is learned."""
    log_alpha = torch.tensor(0.5, requires_grad=True)
    for entropy, sign in ((-3.0, -1), (-1.0, 1), (-2.0, 0)):
        grad = torch.autograd.grad(sac.alpha_loss_fn(log_alpha, torch.full((4, 5), -entropy), 2), log_alpha)[0]
        assert math.copysign(1, grad.item()) * bool(grad) == sign  # a descent step moves log α against it
    log_probs = torch.zeros(3, requires_grad=True)
    sac.alpha_loss_fn(log_alpha, log_probs, 2).backward()
    assert log_probs.grad is None


# --- Networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 2), (7, 5, 2)], ids=["B, A", "K, B, A"])
@pytest.mark.parametrize("M", [1, 2, 3])
def test_the_batched_critic_is_m_plain_ones(M, shape):
    """Values and gradients are those of M critics of off_policy_ac.py with the same weights (D17)."""
    torch.manual_seed(0)
    critic, obs, ours = ActorCritic(3, 2, M, 1.0).critic, torch.randn(5, 3), 1.8 * torch.rand(shape) - 0.9
    theirs, weights = ours.clone().requires_grad_(), torch.randn(M, *shape[:-1])
    q = critic(obs, ours.requires_grad_())
    assert q.shape == weights.shape
    (weights * q).sum().backward()
    for i in range(M):
        single = off_policy_ac.ActorCritic(3, 2, discrete=False, sees_actions=True).critic
        pairs = list(zip((single.body[0], single.body[2], single.head), (critic.body[0], critic.body[2], critic.head)))
        for linear, batched in pairs:
            linear.weight.data, linear.bias.data = batched.weight[i].T.detach(), batched.bias[i, 0].detach()
        q_i = single(obs, theirs)
        torch.testing.assert_close(q[i], q_i)
        (weights[i] * q_i).sum().backward()
        for linear, batched in pairs:
            torch.testing.assert_close(batched.weight.grad[i].T, linear.weight.grad)
            torch.testing.assert_close(batched.bias.grad[i, 0], linear.bias.grad)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert M == 1 or (q[0] != q[1]).all()


@pytest.mark.parametrize("kind", ["discrete", "box", "sac"])
def test_any_body_and_an_image_encoder_in_front(kind):
    """Features of images into Actor and Critic of both scripts, with bodies of another size: shapes and gradients."""
    torch.manual_seed(0)
    B, K, A, D, H = 5, 3, 2, 6, 7
    encoder = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(18, D))
    features, body = encoder(torch.rand(B, 1, 8, 8)), nn.Sequential(nn.Linear(D, H), nn.Tanh())
    if kind == "sac":
        actor = sac.Actor(body, H, A)
        critic = sac.Critic(nn.Sequential(BatchedLinear(4, D + A, H), nn.Tanh()), H, 4)
    else:
        actor = off_policy_ac.Actor(body, H, A, kind == "discrete")
        critic = off_policy_ac.Critic(nn.Sequential(nn.Linear(D + A, H), nn.Tanh()), H, A, kind == "discrete", True)
    samples = actor(features).sample(K).detach()
    actions = samples.tanh() if kind == "sac" else samples
    log_probs, q = actor(features).log_prob(samples), critic(features, actions)
    assert log_probs.shape == (K, B) and q.shape == ((4, K, B) if kind == "sac" else (K, B))
    torch.testing.assert_close(critic(features, actions[0]), q.select(-2, 0))
    for outputs, network in ((log_probs, actor), (q, critic)):
        params = [*encoder.parameters(), *network.parameters()]
        assert all(g.any() for g in torch.autograd.grad(outputs.square().sum(), params, retain_graph=True))


def test_layers_start_orthogonal_and_the_policy_nearly_the_same_everywhere():
    torch.manual_seed(0)
    agent = ActorCritic(3, 2, 2, 1.0)
    replay.check_initial_weights(agent)
    policy = agent.actor(torch.randn(100, 3))
    assert policy.mean.abs().max() < 0.05 and policy.log_std.abs().max() < 0.05


def test_greedy_actions_are_the_averaged_actors_and_squashed_too_and_sigma_is_bounded():
    agent, obs = replay.make_parts(sac)[1], torch.randn(4, 4)
    greedy, sampled = agent.act(obs, greedy=True), agent.act(obs)
    torch.testing.assert_close(greedy, agent.averaged_actor(obs).mean.tanh())
    assert not torch.equal(sampled, greedy) and (sampled.abs() <= 1).all() and not sampled.requires_grad
    for bias, log_std in ((100.0, 2.0), (-100.0, -20.0)):
        agent.actor.head.bias.data.fill_(bias)
        assert (agent.actor(obs).log_std == log_std).all()
        assert (agent.act(obs) == bias / 100).all() and torch.equal(agent.act(obs, greedy=True), greedy)


# --- One update, written out plainly ----------------------------------------------------------------------------------


def plain_q(critic, obs, actions):
    """Q_i(s, a) one after the other: (M, B)."""
    layers, qs = (critic.body[0], critic.body[2], critic.head), []
    for i in range(critic.num_critics):
        x = torch.cat([obs, actions], -1)
        for k, layer in enumerate(layers):
            x = x @ layer.weight[i] + layer.bias[i, 0]
            x = x.relu() if k < 2 else x
        qs.append(x.squeeze(-1))
    return torch.stack(qs)


def plain_log_prob(mean, log_std, u):
    """The Jacobian as 1/cosh² u."""
    return (torch.distributions.Normal(mean, log_std.exp()).log_prob(u) + 2 * torch.log(torch.cosh(u))).sum(-1)


def losses_written_out(agent, batch, args):
    """Draws the noise in the order of loss_fn."""

    def policy(obs):
        mean, log_std = agent.actor.head(agent.actor.body(obs)).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    alpha, K = agent.log_alpha.exp().item(), args.num_action_samples
    with torch.no_grad():  # (1)
        mean, log_std = policy(batch.next_obs)
        u = mean + log_std.exp() * torch.randn_like(mean)
        least = plain_q(agent.target_critic, batch.next_obs, u.tanh()).min(0)[0]
        soft = least - alpha * plain_log_prob(mean, log_std, u)
        q_target = batch.rewards + args.gamma * (1 - batch.terminated) * soft
    found = plain_q(agent.critic, batch.obs, batch.actions)
    critic_loss = sum(0.5 * ((each - q_target) ** 2).mean() for each in found)  # (2)

    mean, log_std = policy(batch.obs)
    us = [mean + log_std.exp() * noise for noise in torch.randn(K, *mean.shape)]
    if args.estimator == "score":
        us = [u.detach() for u in us]
    log_probs = [plain_log_prob(mean, log_std, u) for u in us]
    least = [plain_q(agent.critic, batch.obs, u.tanh()).min(0)[0] for u in us]
    if args.estimator == "reparam":  # (4), (5)
        actor_loss = sum((alpha * p - each).mean() for p, each in zip(log_probs, least)) / K
    else:  # (3), (10)
        scores = [(each - alpha * p).detach() for p, each in zip(log_probs, least)]
        others = [sum(scores[j] for j in range(K) if j != k) / (K - 1) for k in range(K)]
        actor_loss = -sum((p * (s - b)).mean() for p, s, b in zip(log_probs, scores, others)) / K
    log_prob = torch.stack(log_probs).mean().detach()
    alpha_loss = -agent.log_alpha * (log_prob - 3)  # (9): three action dimensions
    losses = {"critic_loss": critic_loss, "actor_loss": actor_loss, "alpha_loss": alpha_loss}
    return losses | {"value": found.mean(), "entropy": -log_prob, "alpha": alpha}


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
    replay.check_updates(sac, losses_written_out, gamma=0.7, actor_tau=0.2, **flags)


@pytest.mark.parametrize("flags", [{}, {"estimator": "score", "num_action_samples": 3}], ids=str)
def test_the_actors_loss_leaves_no_gradient_in_the_critics(monkeypatch, flags):
    """Pitfall 18."""
    replay.check_actor_leaves_the_critic_alone(sac, monkeypatch, **flags)


@pytest.mark.parametrize("alpha, critic_lr", [("auto", 1e-4), (0.3, 1e-4), ("auto", None)])
def test_each_network_has_its_own_rate(alpha, critic_lr):
    """log α has the actor's, or is fixed."""
    rates = {"actor": 3e-3, "critic": critic_lr or 3e-3, "log_alpha": 3e-3 if alpha == "auto" else 0.0}
    replay.check_rates(sac, False, rates, actor_lr=3e-3, critic_lr=critic_lr, alpha=alpha, actor_tau=1e-9)
    agent = replay.make_parts(sac, alpha=alpha)[1]
    assert agent.log_alpha.exp().item() == pytest.approx(1.0 if alpha == "auto" else alpha)


# --- One run (pitfalls 1 to 4, 19, 22) --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", [1, 3])
def test_what_is_stored_is_what_happened(workdir, num_envs):
    replay.check_stored(sac, CountingBox, num_envs)


@pytest.mark.parametrize("flags", [{"num_envs": 3, "updates_per_step": 0.7}, {"buffer_size": 40, "critic_lr": 1e-2}])
def test_a_run_is_the_loop_written_out_plainly(workdir, flags):
    """Actions of the first --learning-starts steps are uniform in [-1, 1]."""

    def act(agent, obs, env_steps):
        return {"actions": 2 * torch.rand(len(obs), 1) - 1 if env_steps < 50 else agent.act(obs)}

    replay.check_run(sac, act, env_id="toy_envs:CountingBox-v0", **flags)


@pytest.mark.parametrize("env_id, value", [("ConstantBox", 10.0), ("TerminatingBox", (1 - 0.9**10) / (1 - 0.9))])
def test_value_under_a_time_limit_is_that_of_going_on(workdir, env_id, value):
    """With hardly any entropy 1/(1 − γ) where episodes are only cut, the finite sum where they end."""
    found = replay.value_of_constant(sac, env_id, torch.zeros(1, 2), alpha=1e-6, tau=0.1, critic_lr=3e-3)
    assert found == pytest.approx([value, value], abs=0.5)


def test_a_resumed_run_takes_new_rates_and_may_begin_and_end_to_tune_alpha(workdir):
    def resume(**flags):
        train(dataclasses.replace(load_args("run"), **flags))
        parts = checkpoint("run")["parts"]
        return parts["agent"]["log_alpha"].exp().item(), [g["lr"] for g in parts["optimizer"]["param_groups"]]

    run(alpha=0.2)
    alpha, rates = resume(total_timesteps=150, alpha=0.5, actor_lr=1e-5, critic_lr=2e-5)
    assert alpha == pytest.approx(0.5) and rates == [1e-5, 2e-5, 0.0]
    tuned, _ = resume(total_timesteps=170, alpha="auto", actor_lr=3e-4)
    assert tuned != alpha and tuned == pytest.approx(0.5, rel=0.1)
    assert resume(total_timesteps=190, alpha=0.3)[0] == pytest.approx(0.3)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"num_envs": 2, "num_critics": 3, "updates_per_step": 0.5, "total_timesteps": 200},
        {"num_critics": 1, "alpha": 0.2, "env_id": "toy_envs:Target-v0"},
        {"estimator": "score", "num_action_samples": 4, "env_id": "InvertedPendulum-v5"},
        {"num_envs": 3, "num_action_samples": 2, "tau": 1.0, "buffer_size": 40},
        {"alpha": 1, "total_timesteps": 121},
    ],
    ids=str,
)
def test_flags(workdir, flags):
    """Every weight moves, α where it is tuned; results and metrics are written."""
    losses, fixed = "actor_loss critic_loss value entropy alpha alpha_loss", ["log_alpha"] if "alpha" in flags else []
    trained = replay.check_every_weight_moves(sac, losses, unmoved=fixed, **flags)
    assert not fixed or trained["log_alpha"].exp().item() == pytest.approx(flags["alpha"])


@pytest.mark.parametrize("num_envs, updates_per_step", [(1, 1.0), (4, 1.0), (3, 0.25)])
def test_updates_are_counted_per_transition(workdir, monkeypatch, num_envs, updates_per_step):
    """Pitfall 19, D19."""
    replay.check_update_count(sac, monkeypatch, num_envs, updates_per_step)


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
    how = {"fallback_random": True, "cpp_wrapper": True, "unroll_reductions_threshold": 1}
    assert options == {"fullgraph": True, "dynamic": False, "options": how}
    assert called.count(function) == 10
    asked.clear()
    run(run_dir="plain", total_timesteps=60)
    assert not asked


def test_it_learns(workdir):
    """A random policy gets -21; the best, which looks at the observation, 0."""
    end = run(
        env_id="toy_envs:Target-v0", num_envs=4, total_timesteps=1_000, learning_starts=200, updates_per_step=0.7,
        actor_lr=5e-3, critic_lr=5e-3, actor_tau=0.02, batch_size=64, eval_episodes=50,
    )  # fmt: skip
    assert end["eval_return_mean"] > -2
