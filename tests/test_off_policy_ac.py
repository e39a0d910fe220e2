"""off_policy_ac.py: what its critic and its actor converge to, what goes into the buffer, and one run as a whole."""

import copy
import itertools
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import replay
import torch
from mdp import exact_values
from torch import nn
from toy_envs import Counting

import off_policy_ac
from common.envs import make_envs
from off_policy_ac import Args, check_flags, leave_one_out, loss_fn, make_agent, make_optimizer, train, update

run, make_parts = partial(replay.short_run, off_policy_ac), partial(replay.make_parts, off_policy_ac)
NAIVE = {"critic": "v", "actor_actions": "buffer"}


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
true_values = partial(exact_values, P, R, gamma=GAMMA)  # of a policy: V (4,) with 0 behind the end, and Q (3, 2)
TABULAR = SimpleNamespace(obs_spec=((4,), np.float32), num_actions=2, discrete=True)  # one-hot states


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
    batch, gradients = enumerated(40), []
    for _ in range(50):
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
    ids=str,
)
def test_actor_gradient_is_that_of_the_current_policy_at_the_buffers_states(flags):
    """D11, D12, D13, D14, D15: Σ_s d_buffer(s) Σ_a ∇π(a|s) Q(s, a), in expectation."""
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


def losses_written_out(agent, batch, args):
    """A transition at a time; noise is drawn as loss_fn draws it."""
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
    losses = {"actor_loss": actor_loss, "critic_loss": critic_loss}
    return losses | {"value": sum(values) / B, "entropy": sum(entropies) / B}


@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "box"])
@pytest.mark.parametrize("baseline", ["samples", "none"])
@pytest.mark.parametrize(
    "critic, actor_actions, K",
    [("q", "policy", 2), ("q", "policy", 5), ("q", "buffer", 3), ("v", "buffer", 1), ("q", "importance", 4)]
    + [("v", "importance", 2)],
)
def test_every_update_is_the_one_written_out_plainly(double, critic, actor_actions, K, baseline, discrete):
    flags = {"critic": critic, "actor_actions": actor_actions, "num_action_samples": K, "baseline": baseline}
    replay.check_updates(off_policy_ac, losses_written_out, discrete, gamma=0.7, ent_coef=0.2, **flags)


@pytest.mark.parametrize(
    "discrete, flags", [(True, {}), (False, {}), (True, {"actor_actions": "importance"}), (False, NAIVE)]
)
def test_the_actors_loss_leaves_no_gradient_in_the_critic(monkeypatch, discrete, flags):
    """Pitfall 18."""
    replay.check_actor_leaves_the_critic_alone(off_policy_ac, monkeypatch, discrete, **flags)


@pytest.mark.parametrize("critic_lr", [1e-4, None])
def test_each_network_has_its_own_rate(critic_lr):
    """By default the critic has the actor's."""
    rates = {"actor": 3e-3, "critic": critic_lr or 3e-3}
    replay.check_rates(off_policy_ac, True, rates, actor_lr=3e-3, critic_lr=critic_lr)


def test_an_entropy_bonus_alone_does_not_let_sigma_run_away():
    args, agent = make_parts(False, actor_lr=0.5, ent_coef=1.0)
    for critic in (agent.critic, agent.target_critic):
        critic.head.weight.data.zero_(), critic.head.bias.data.zero_()
    optimizer, batch = make_optimizer(agent, args), replay.make_batch()
    batch.rewards.zero_()  # no value anywhere
    for _ in range(50):
        update(agent, optimizer, batch, args)
    assert (agent.actor.log_std == 1).all()


def test_shapes_that_would_broadcast_are_refused():
    """Pitfall 8."""
    for function, *shapes in (
        (off_policy_ac.td_target, [3], [3], [3, 1], []),
        (off_policy_ac.td_target, [3], [3, 1], [3], []),
        (off_policy_ac.critic_loss_fn, [3, 1], [3]),
        (off_policy_ac.actor_loss_fn, [4, 3], [3], [3], []),
    ):
        with pytest.raises(AssertionError):
            function(*map(torch.zeros, shapes))


def test_leave_one_out_adds_no_bias_and_variance_falls_with_the_number_of_samples():
    """D13, D14: all K-tuples of three actions, weighted by probability. As 1/K; with the baseline faster still."""
    pi, Q = torch.tensor([0.3, -0.5, 1.0]).softmax(-1), torch.tensor([11.0, 12.0, 14.0])
    score_function = torch.eye(3) - pi  # ∇ log π(a) by the logits
    exact, variance = (pi * Q) @ score_function, {}
    for K in (2, 4):
        actions = torch.tensor(list(itertools.product(range(3), repeat=K))).T  # (K, 3^K)
        p, q = pi[actions].prod(0), Q[actions]
        for baseline, scores in ((False, q), (True, q - leave_one_out(q))):
            gradients = (score_function[actions] * scores.unsqueeze(-1)).mean(0)  # (3^K, 3)
            torch.testing.assert_close(p @ gradients, exact)
            variance[K, baseline] = (p @ (gradients - exact) ** 2).sum().item()
    assert variance[2, False] == pytest.approx(2 * variance[4, False], rel=1e-4)
    assert variance[2, True] > 2.2 * variance[4, True] and variance[2, True] < variance[2, False] / 20


@pytest.mark.parametrize("discrete", [True, False])
def test_layers_start_orthogonal_and_the_policy_nearly_the_same_everywhere(discrete):
    torch.manual_seed(0)
    agent = off_policy_ac.ActorCritic(4, 3, discrete, sees_actions=True)
    replay.check_initial_weights(agent)
    policy = agent.actor(torch.randn(100, 4))
    outputs = policy.log_probs.exp() - 1 / 3 if discrete else policy.mean
    assert outputs.abs().max() < 0.05 and (discrete or (policy.log_std == 0).all())


@pytest.mark.parametrize("discrete", [True, False])
def test_greedy_actions_are_the_likeliest_ones(discrete):
    _, agent = make_parts(discrete)
    obs = torch.randn(20, 4)
    policy = agent.actor(obs)
    likeliest = policy.log_probs.argmax(-1) if discrete else policy.mean
    assert torch.equal(agent.act(obs, greedy=True), likeliest)
    assert not torch.equal(agent.act(obs), likeliest) and not agent.act(obs).requires_grad


# --- One run (pitfalls 1 to 4, 19, 22) --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", [1, 3])
def test_what_is_stored_is_what_happened(workdir, num_envs):
    """With the log-probability of the policy that acted."""
    stored, args = replay.check_stored(off_policy_ac, Counting, num_envs), Args(env_id="toy_envs:Counting-v0")
    torch.manual_seed(args.seed)
    agent = make_agent(make_envs(args), args)  # never updated
    log_probs = agent.actor(stored["obs"]).log_prob(stored["actions"])
    torch.testing.assert_close(stored["old_log_probs"], log_probs.detach())
    assert 0.2 < stored["actions"].float().mean() < 0.8  # it acts by chance: a new policy is nearly even


@pytest.mark.parametrize(
    "flags",
    [
        {"env_id": "toy_envs:Counting-v0", "num_envs": 3, "updates_per_step": 0.7, "critic_lr": 3e-3},
        {"env_id": "toy_envs:CountingBox-v0", "actor_actions": "importance", "buffer_size": 40},
    ],
    ids=["discrete", "box"],
)
def test_a_run_is_the_loop_written_out_plainly(workdir, flags):
    def act(agent, obs, env_steps):
        with torch.no_grad():
            policy = agent.actor(obs)
            actions = policy.sample()
            return {"actions": actions, "old_log_probs": policy.log_prob(actions)}

    replay.check_run(off_policy_ac, act, **flags)


@pytest.mark.parametrize(
    "env_id, flags, value",
    [("Constant", {}, 10.0), ("Constant", NAIVE, 10.0), ("Terminating", {}, (1 - 0.9**10) / (1 - 0.9))],
)
def test_value_under_a_time_limit_is_that_of_going_on(workdir, env_id, flags, value):
    """1/(1 − γ) where episodes are only cut, the finite sum where they end."""
    flags = flags | {"ent_coef": 0.0, "tau": 0.2, "critic_lr": 5e-3, "num_action_samples": 2}
    found = replay.value_of_constant(off_policy_ac, env_id, torch.zeros(1, dtype=torch.int64), **flags)
    assert found == pytest.approx([value], abs=0.5)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"actor_actions": "buffer", "num_envs": 3},
        {"actor_actions": "importance", "env_id": "Pendulum-v1", "num_envs": 2, "buffer_size": 40},
        {"actor_actions": "importance", "tau": 1.0, "ent_coef": 0.0, "env_id": "toy_envs:SmallInts-v0"},
        {"critic": "v", "actor_actions": "buffer", "env_id": "Pendulum-v1"},
        {"critic": "v", "actor_actions": "importance", "baseline": "none", "env_id": "toy_envs:Shifted-v0"},
        {"baseline": "none", "num_action_samples": 1, "env_id": "toy_envs:Doubles-v0"},
    ],
    ids=str,
)
def test_flags(workdir, flags):
    """Every weight moves; results and metrics are written."""
    replay.check_every_weight_moves(off_policy_ac, "actor_loss critic_loss value entropy", **flags)


@pytest.mark.parametrize("num_envs, updates_per_step", [(1, 1.0), (4, 1.0), (3, 0.25), (2, 2.0)])
def test_updates_are_counted_per_transition(workdir, monkeypatch, num_envs, updates_per_step):
    """Pitfall 19."""
    replay.check_update_count(off_policy_ac, monkeypatch, num_envs, updates_per_step)


def test_it_learns(workdir):
    """A random policy gets -21; the best, which looks at the observation, 0. Continuous, by the score function only."""
    end = run(
        env_id="toy_envs:Target-v0", num_envs=4, total_timesteps=1_000, updates_per_step=0.7, actor_lr=5e-3,
        batch_size=64, buffer_size=10_000, eval_episodes=50,
    )  # fmt: skip
    assert end["eval_return_mean"] > -4


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_pendulum_is_learned_by_the_score_function_alone(workdir, seed):
    end = train(Args(env_id="Pendulum-v1", total_timesteps=15_000, seed=seed, run_dir="run"))
    assert end["eval_return_mean"] > -200
