"""off_policy_ac.py: what its critic and its actor converge to, what goes into the buffer, and one run as a whole."""

import itertools
import json
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import checkpoint, metrics, record_agents, record_initial_weights, results, same
from mdp import exact_values
from torch import nn

import off_policy_ac
from common.errors import UserError
from off_policy_ac import (
    ActorCritic,
    Args,
    Categorical,
    Critic,
    Gaussian,
    actor_loss_fn,
    critic_loss_fn,
    importance_weights,
    leave_one_out,
    polyak_update,
    td_target,
    train,
)

SHORT = {"total_timesteps": 300, "learning_starts": 50, "batch_size": 16, "buffer_size": 1000, "eval_episodes": 2}


def run(**flags):
    return train(Args(**({"run_dir": "run"} | SHORT | flags)))


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


def true_values(pi):
    """V (4,) with 0 behind the end, and Q (3, 2)."""
    return exact_values(P, R, pi, GAMMA)


def buffer_rows():
    """Indices (B,) of s, a, s', each as often as it is likely."""
    rows = [
        (s, a, t)
        for s, a, t in itertools.product(range(3), range(2), range(4))
        for _ in range(round(16 * (MU[s, a] * P[s, a, t]).item()))
    ]
    assert len(rows) == 48
    return torch.tensor(rows).T


class Tabular(gym.Env):
    """Only its spaces matter: states one-hot."""

    observation_space = gym.spaces.Box(0.0, 1.0, (4,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.eye(4, dtype=np.float32)[0], {}

    def step(self, action):
        return np.eye(4, dtype=np.float32)[0], 0.0, False, True, {}


gym.register("Tabular-v0", Tabular)


def run_on_the_mdp(monkeypatch, **flags):
    """train() with the enumerated buffer in place of the sampled one; the actor starts, and nearly stays, at PI_LOGITS."""
    s, a, t = buffer_rows()
    enumerated = {
        "obs": torch.eye(4)[s], "actions": a, "rewards": R[s, a], "next_obs": torch.eye(4)[t],
        "terminated": (t == 3).float(), "old_log_probs": MU[s, a].log(),
    }  # fmt: skip

    def sample(buffer, batch_size):
        assert set(buffer.fields) == set(enumerated)
        return SimpleNamespace(**enumerated)

    monkeypatch.setattr(off_policy_ac.RingBuffer, "sample", sample)
    original = ActorCritic.__init__

    def with_policy(agent, *args):
        original(agent, *args)
        actor = agent.actor
        actor.body = nn.Identity()
        actor.head = nn.Linear(4, 2, bias=False)
        actor.head.weight.data = torch.cat([PI_LOGITS, torch.zeros(1, 2)]).T.contiguous()

    monkeypatch.setattr(ActorCritic, "__init__", with_policy)
    kept = {}
    original_open = off_policy_ac.Run.open
    monkeypatch.setattr(off_policy_ac.Run, "open", lambda run, **p: kept.update(p) or original_open(run, **p))
    defaults = {"env_id": "Tabular-v0", "gamma": GAMMA, "ent_coef": 0.0, "eval_episodes": 1, "learning_starts": 0}
    run(**(defaults | flags))
    return kept["agent"]


def values_of(agent):
    """(3, 2)"""
    with torch.no_grad():
        return agent.critic(torch.eye(4)[:3], torch.tensor([[0, 0, 0], [1, 1, 1]])).T


LEARN_CRITIC = {"total_timesteps": 2_000, "actor_lr": 1e-12, "critic_lr": 5e-3, "tau": 0.02}


def test_the_critic_becomes_q_of_the_current_policy(workdir, monkeypatch):
    """D10: whoever filled the buffer."""
    agent = run_on_the_mdp(monkeypatch, **LEARN_CRITIC)
    _, Q = true_values(PI_LOGITS.softmax(-1))
    _, Q_mu = true_values(MU)
    assert (Q - Q_mu).abs().min() > 0.2
    torch.testing.assert_close(values_of(agent), Q, atol=0.12, rtol=0)


def test_the_naive_critic_becomes_v_of_the_old_policy(workdir, monkeypatch):
    """D9a."""
    agent = run_on_the_mdp(monkeypatch, critic="v", actor_actions="buffer", **LEARN_CRITIC)
    V, V_mu = true_values(PI_LOGITS.softmax(-1))[0][:3], true_values(MU)[0][:3]
    assert (V - V_mu).abs().min() > 0.3
    learned = values_of(agent)
    torch.testing.assert_close(learned[:, 0], learned[:, 1])  # V ignores the action
    torch.testing.assert_close(learned[:, 0], V_mu, atol=0.12, rtol=0)


def actor_gradients(monkeypatch, with_agent=False, **flags):
    """Mean gradient (3, 2) of the actor's logits over the updates of a run, and what it should be, with the same Q."""
    gradients = []
    original = off_policy_ac.polyak_update

    def record(target, source, tau):
        original(target, source, tau)
        gradients.append(agents[0].actor.head.weight.grad.T[:3].clone())

    monkeypatch.setattr(off_policy_ac, "polyak_update", record)
    agents = record_agents(monkeypatch, off_policy_ac)
    agent = run_on_the_mdp(monkeypatch, total_timesteps=1_000, actor_lr=1e-12, critic_lr=1e-12, **flags)
    logits = PI_LOGITS.clone().requires_grad_()
    J = (values_of(agent) * logits.softmax(-1)).sum() / 3  # d_buffer is uniform; Q is a constant
    exact = -torch.autograd.grad(J, logits)[0]
    found = torch.stack(gradients).mean(0), exact, torch.stack(gradients).std(0).mean() / len(gradients) ** 0.5
    return (*found, agent) if with_agent else found


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
def test_actor_gradient_is_that_of_the_current_policy_at_the_buffers_states(workdir, monkeypatch, flags):
    """D11, D12, D13, D14: Σ_s d_buffer(s) Σ_a ∇π(a|s) Q(s, a), in expectation."""
    ours, exact, error = actor_gradients(monkeypatch, **flags)
    assert exact.norm() > 20 * error
    torch.testing.assert_close(ours, exact, atol=5 * error.item() + 1e-6, rtol=0)


@pytest.mark.parametrize("critic", ["q", "v"])
@pytest.mark.parametrize("baseline", ["none", "samples"])
def test_naive_actor_gradient_is_another_one(workdir, monkeypatch, critic, baseline):
    """D9b: with the buffer's actions it is Σ_s d(s) Σ_a μ(a|s) ∇log π(a|s) A; A is Q, or r + γV(s') (less V(s))."""
    flags = {"actor_actions": "buffer", "baseline": baseline, "critic": critic}
    ours, exact, error, agent = actor_gradients(monkeypatch, with_agent=True, **flags)
    pi, Q = PI_LOGITS.softmax(-1), values_of(agent)
    V = (pi * Q).sum(1, keepdim=True)
    if critic == "v":
        V_next = torch.cat([V.flatten(), torch.zeros(1)])
        with torch.no_grad():  # what V says of the state behind the end does not matter
            Q = R + GAMMA * (P[..., :3] @ V_next[:3])
    A = Q - V if baseline == "samples" else Q
    # Σ_a μ(a) (1{a = b} − π(b)) A(a)
    formula = -(MU * A - pi * (MU * A).sum(1, keepdim=True)) / 3
    torch.testing.assert_close(ours, formula, atol=5 * error.item() + 1e-6, rtol=0)
    assert critic == "v" or (ours - exact).norm() > 0.2 * exact.norm() > 10 * error


def test_each_loss_reaches_its_own_network_only(workdir, monkeypatch):
    """Pitfall 18: neither loss reaches the other network, none the target network."""
    agents, losses, checked = record_agents(monkeypatch, off_policy_ac), [], []
    monkeypatch.setattr(off_policy_ac, "critic_loss_fn", lambda *x: losses.append(critic_loss_fn(*x)) or losses[-1])

    def check(*inputs):
        actor_loss, critic_loss = actor_loss_fn(*inputs), losses[-1]
        actor, critic = list(agents[-1].actor.parameters()), list(agents[-1].critic.parameters())
        for own, other, loss in ((critic, actor, critic_loss), (actor, critic, actor_loss)):
            grads = torch.autograd.grad(loss, own + other, retain_graph=True, allow_unused=True)
            assert all(g is not None for g in grads[: len(own)]) and all(g is None for g in grads[len(own) :])
        checked.append(True)
        return actor_loss

    monkeypatch.setattr(off_policy_ac, "actor_loss_fn", check)
    naive = {"critic": "v", "actor_actions": "buffer"}
    for flags in ({}, {"env_id": "Pendulum-v1"}, {"actor_actions": "importance"}, {"env_id": "Pendulum-v1"} | naive):
        run(run_dir=str(len(checked)), total_timesteps=60, **flags)
        assert not any(p.requires_grad or p.grad is not None for p in agents[-1].target_critic.parameters())
    assert len(checked) == 40


SPACES = gym.spaces.Box(-1.0, 1.0, (4,), np.float32), gym.spaces.Discrete(3)
BOX = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)


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


def test_an_entropy_bonus_alone_does_not_let_sigma_run_away(workdir):
    end = run(env_id="toy_envs:Nothing-v0", total_timesteps=250, actor_lr=0.5, lr_decay=False, ent_coef=1.0)
    agent, _ = off_policy_agent("run", "toy_envs:Nothing-v0")
    assert end["updates"] == 200 and (agent.actor.log_std == 1).all()


def test_targets_come_from_the_target_network(workdir, monkeypatch):
    """Its parameters, at τ = 1e-9, stay what they were: then the targets' critic must be the initial one."""
    agents, seen = record_agents(monkeypatch, off_policy_ac), []
    forward = Critic.forward
    monkeypatch.setattr(
        Critic, "forward", lambda c, obs, actions: seen.append((c, torch.is_grad_enabled())) or forward(c, obs, actions)
    )
    run(total_timesteps=52)
    target, regression, scores = seen[:3]
    assert target == (agents[0].target_critic, False)
    assert regression == (agents[0].critic, True) and scores == (agents[0].critic, False)


def test_a_nan_reward_does_not_get_into_a_checkpoint(workdir):
    with pytest.raises(UserError, match="reward is not finite at environment step 200"):
        run(env_id="toy_envs:Broken-v0", total_timesteps=300, checkpoint_every=40, learning_starts=250)
    assert checkpoint("run")["parts"]["buffer"]["fields"]["rewards"].isfinite().all()


def test_it_acts_by_chance(workdir):
    run(total_timesteps=60)
    actions = checkpoint("run")["parts"]["buffer"]["fields"]["actions"]
    assert 10 < actions.sum() < 50  # a new policy is nearly even; its likeliest action alone would be all 0 or all 1


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


@pytest.mark.parametrize("K", [2, 5])
def test_the_actor_learns_from_k_samples(workdir, monkeypatch, K):
    shapes = set()
    monkeypatch.setattr(off_policy_ac, "actor_loss_fn", lambda *x: shapes.add(tuple(x[1].shape)) or actor_loss_fn(*x))
    run(num_action_samples=K, total_timesteps=60)
    assert shapes == {(K, SHORT["batch_size"])}


def test_what_is_not_finite_is_not_stored(workdir):
    with pytest.raises(UserError, match="observation is not finite"):
        run(env_id="toy_envs:BrokenObsBox-v0", checkpoint_every=20)
    assert checkpoint("run")["parts"]["buffer"]["fields"]["next_obs"].isfinite().all()


def test_polyak_average_by_hand():
    target, source = nn.Linear(1, 1), nn.Linear(1, 1)
    a, b = target.weight.item(), source.weight.item()
    polyak_update(target, source, 0.1)
    assert target.weight.item() == pytest.approx(0.1 * b + 0.9 * a)  # τ weighs the new ones
    polyak_update(target, source, 1.0)
    assert target.weight.item() == b and source.weight.item() == b


@pytest.mark.parametrize("K", [2, 7])
@pytest.mark.parametrize("space", [SPACES[1], BOX, "images"])
def test_critic_gives_every_action_of_a_state_its_q(space, K):
    """(K, B) actions for (B,) states equal K passes, of three choices 3; shapes stay those of the actions."""
    image = space == "images"
    observation_space = gym.spaces.Box(0, 255, (4, 40, 40), np.uint8) if image else SPACES[0]
    space = SPACES[1] if image else space
    critic = Critic(observation_space, space, sees_actions=True)
    obs = torch.randint(255, (5, 4, 40, 40), dtype=torch.uint8) if image else torch.randn(5, 4)
    actions = torch.randint(3, (K, 5)) if space is SPACES[1] else torch.randn(K, 5, 2).clamp(-1, 1)
    rows = []
    critic.body.register_forward_hook(lambda body, inputs, _: rows.append(inputs[0].shape[:-1]))
    together = critic(obs, actions)
    assert rows == [(min(K, 3) if space is SPACES[1] else K, 5)]
    assert together.shape == (K, 5) and critic(obs, actions[0]).shape == (5,)
    torch.testing.assert_close(together, torch.stack([critic(obs, a) for a in actions]))
    assert (together[0] != together[1]).any()


def test_q_takes_the_clipped_action_that_the_environment_takes():
    critic = Critic(SPACES[0], BOX, sees_actions=True)
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


# --- What goes into the buffer (pitfalls 1 to 4) ----------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", [1, 3])
def test_what_is_stored_is_what_happened(workdir, num_envs):
    """All transitions, no reset step, every (s, s') consecutive; the log-probability is that of the policy then."""
    end = run(
        env_id="toy_envs:Counting-v0",
        num_envs=num_envs,
        checkpoint_every=10**9,
        total_timesteps=500,
        updates_per_step=1e-9,
    )
    stored = checkpoint("run")["parts"]["buffer"]["fields"]
    assert len(stored["obs"]) == end["env_steps"] >= 500 and end["updates"] == 0
    (episode, t), (next_episode, next_t) = stored["obs"].T, stored["next_obs"].T
    assert torch.equal(episode, next_episode) and torch.equal(t + 1, next_t)
    assert torch.equal(stored["rewards"], next_t)
    lengths = [float(value) for _, tag, value in metrics("run") if tag == "charts/episodic_length"]
    assert 0 <= end["env_steps"] - sum(lengths) < 5 * num_envs  # those that were going on
    starts = int((t == 0).sum())
    assert len(lengths) <= starts <= len(lengths) + num_envs
    assert 0 < stored["terminated"].sum() < len(lengths)
    assert not (stored["terminated"].bool() & (episode % 3 == 0)).any()  # those are only truncated
    agent = ActorCritic(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), Args())
    agent.load_state_dict(checkpoint("run")["parts"]["agent"])  # never updated
    with torch.no_grad():
        torch.testing.assert_close(stored["old_log_probs"], agent.actor(stored["obs"]).log_prob(stored["actions"]))


def value_of_constant(env_id, **flags):
    flags = {"gamma": 0.9, "ent_coef": 0.0, "total_timesteps": 1_500, "tau": 0.05, "critic_lr": 5e-3} | flags
    run(env_id=env_id, buffer_size=10_000, **flags)
    agent, obs = off_policy_agent("run", env_id)
    with torch.no_grad():
        return agent.critic(obs, torch.zeros(1, dtype=torch.int64)).item()


def off_policy_agent(run_dir, env_id):
    from common.envs import make_envs
    from common.evaluate import load_agent

    agent, args, _, _ = load_agent(run_dir)
    return agent, torch.as_tensor(make_envs(args, 1).reset(seed=0)[0])


@pytest.mark.parametrize("flags", [{}, {"critic": "v", "actor_actions": "buffer"}], ids=["q", "v"])
def test_value_under_a_time_limit_is_that_of_going_on(workdir, flags):
    assert value_of_constant("toy_envs:Constant-v0", **flags) == pytest.approx(10, abs=0.5)


def test_value_of_what_terminates_is_the_finite_sum(workdir):
    value = value_of_constant("toy_envs:Terminating-v0")
    assert value == pytest.approx((1 - 0.9**10) / (1 - 0.9), abs=0.5)  # 6.5


# --- One run ----------------------------------------------------------------------------------------------------------

FLAGS = [
    {},
    {"num_envs": 3},
    {"actor_actions": "buffer"},
    {"actor_actions": "importance"},
    {"actor_actions": "importance", "baseline": "none"},
    {"critic": "v", "actor_actions": "buffer"},
    {"critic": "v", "actor_actions": "importance", "baseline": "none"},
    {"baseline": "none", "num_action_samples": 1},
    {"tau": 1.0, "ent_coef": 0.0},
    {"buffer_size": 40},
    {"env_id": "Pendulum-v1"},
    {"env_id": "Pendulum-v1", "actor_actions": "importance", "num_envs": 2},
    {"env_id": "toy_envs:Images-v0", "total_timesteps": 80},
    {"env_id": "toy_envs:Shifted-v0"},
    {"env_id": "toy_envs:SmallInts-v0"},
    {"env_id": "toy_envs:Doubles-v0"},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()) or "default")
def test_flags(workdir, monkeypatch, flags):
    initial = record_initial_weights(monkeypatch, off_policy_ac)
    end = run(**flags)
    trained = checkpoint("run")["parts"]["agent"]
    assert [name for name in initial if torch.equal(initial[name], trained[name])] == []
    assert end["updates"] >= 30 and math.isfinite(end["eval_return_mean"])
    saved = json.loads(open("run/results.json").read())
    assert saved == end
    tags = {tag for _, tag, _ in metrics("run")}
    assert {"losses/actor_loss", "losses/critic_loss", "losses/value", "losses/entropy"} <= tags


@pytest.mark.parametrize("num_envs, updates_per_step", [(1, 1.0), (4, 1.0), (3, 0.25), (2, 2.0)])
def test_updates_are_counted_per_transition(workdir, num_envs, updates_per_step):
    """Pitfall 19."""
    end = run(num_envs=num_envs, updates_per_step=updates_per_step, total_timesteps=400, learning_starts=100)
    assert end["updates"] == pytest.approx((end["env_steps"] - 100) * updates_per_step, abs=num_envs * 2)


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


def test_images_are_stored_as_they_are(workdir):
    run(env_id="toy_envs:Images-v0", total_timesteps=20, learning_starts=19)
    assert checkpoint("run")["parts"]["buffer"]["fields"]["next_obs"].dtype == torch.uint8


def test_it_learns(workdir):
    """A random policy gets -21; the best, which looks at the observation, 0. Continuous, by the score function only."""
    end = run(
        env_id="toy_envs:Target-v0", total_timesteps=2_000, actor_lr=3e-3, critic_lr=3e-3, batch_size=64,
        buffer_size=10_000, eval_episodes=50,
    )  # fmt: skip
    assert end["eval_return_mean"] > -4


# --- Slow: learning ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_pendulum_is_learned_by_the_score_function_alone(workdir, seed):
    end = train(Args(env_id="Pendulum-v1", total_timesteps=15_000, seed=seed, run_dir="run"))
    assert end["eval_return_mean"] > -200
