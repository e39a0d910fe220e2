"""a2c_sync.py as a whole: what is learned from, what is counted, and that it learns."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_envs  # registers the environments
from helpers import checkpoint, children, metrics, results, same

import a2c_sync
from a2c_sync import Args, Rollout, make_agent, make_optimizer, make_rollout, train
from common.envs import make_envs
from evaluate import load_agent
from experiments.runner import measured, read_log

SHORT = {"total_timesteps": 400, "num_envs": 3, "num_steps": 5, "eval_episodes": 2}


def run(**flags):
    return train(Args(run_dir="run", **(SHORT | flags)))


# --- Episode boundaries (docs/pitfalls.md 1 to 5) ---------------------------------------------------------------------


@pytest.fixture
def updates(monkeypatch):
    """Every update of a run: its batch, the learning rates, and the parameters before it."""
    found, original = [], a2c_sync.update

    def record(agent, optimizer, batch, args):
        rates = [group["lr"] for group in optimizer.param_groups]
        before = {name: p.detach().clone() for name, p in agent.named_parameters()}
        found.append((Rollout(*(x.clone() for x in batch)), rates, before))
        return original(agent, optimizer, batch, args)

    monkeypatch.setattr(a2c_sync, "update", record)
    return found


@pytest.mark.parametrize("num_steps, checkpoint_every", [(1, 10**9), (4, 10**9), (7, 10**9), (4, 50), (1, 20)])
def test_what_is_learned_from_is_what_happened(workdir, updates, num_steps, checkpoint_every):
    """D5: all transitions, no reset step, every (s, s') consecutive; resets at checkpoints included."""
    end = run(env_id="toy_envs:Counting-v0", num_steps=num_steps, checkpoint_every=checkpoint_every)
    assert end["updates"] == len(updates)
    learned, ends, going_on, lengths = 0, {True: 0, False: 0}, {}, []
    for obs, actions, rewards, terminated, done in (batch for batch, _, _ in updates):
        assert obs.shape == (num_steps + 1, 3, 2) and done.shape == (num_steps + 1, 3)
        assert actions.shape == rewards.shape == terminated.shape == (num_steps, 3)
        for t, n in (done[:-1] == 0).nonzero().tolist():
            (episode, step), (next_episode, next_step) = obs[t, n].tolist(), obs[t + 1, n].tolist()
            assert (next_episode, next_step) == (episode, step + 1)  # the true successor, never the reset observation
            assert rewards[t, n] == next_step
            assert terminated[t, n] == (done[t + 1, n] and episode % 3 != 0)  # both at once counts as terminated
            learned += 1
            going_on[n, episode] = step + 1
            if done[t + 1, n]:
                ends[bool(terminated[t, n])] += 1
                lengths.append(going_on.pop((n, episode)))
    assert learned == end["env_steps"]
    # Transitions = sum of the lengths of the episodes that ended, plus those that were going on or cut by a checkpoint
    assert sum(lengths) + sum(going_on.values()) == learned and min(ends.values()) > 10
    logged = {tag: [float(value) for _, t, value in metrics("run") if t == tag] for _, tag, _ in metrics("run")}
    assert sorted(logged["charts/episodic_length"]) == sorted(lengths)
    assert logged["charts/episodic_return"] == [n * (n + 1) / 2 for n in logged["charts/episodic_length"]]


def test_actions_are_chosen_at_the_observations_they_are_stored_with(workdir, updates, monkeypatch):
    """And the environment takes them: an actor that is shown another row would learn, though badly."""
    seen, taken, act, make = [], [], a2c_sync.ActorCritic.act, make_envs

    def record(agent, obs, greedy=False):
        actions = act(agent, obs, greedy)
        seen.append((obs.clone(), actions.clone())) if not greedy else None
        return actions

    def spied(*args):
        envs = make(*args)
        step = envs.step
        envs.step = lambda actions: taken.append(torch.tensor(actions)) or step(actions)
        return envs

    monkeypatch.setattr(a2c_sync.ActorCritic, "act", record)
    monkeypatch.setattr(a2c_sync, "make_envs", spied)
    run(env_id="toy_envs:Counting-v0", checkpoint_every=70)
    rows = [(batch.obs[t], batch.actions[t]) for batch, _, _ in updates for t in range(5)]
    assert len(rows) == len(seen) == len(taken) > 100
    for (obs, actions), (seen_obs, chosen), done in zip(rows, seen, taken):
        assert torch.equal(obs, seen_obs) and torch.equal(actions, chosen) and torch.equal(actions, done)


def test_a_reset_at_a_checkpoint_begins_a_new_episode(workdir, updates):
    """Whatever ended in the step before it: `done` is cleared, so its first step counts."""
    run(env_id="toy_envs:OneStep-v0", num_steps=1, checkpoint_every=3, total_timesteps=60, num_envs=3)
    # Every step ends an episode and every checkpoint resets, so there is never a step that only resets
    assert all((batch.done[0] == 0).all() and (batch.done[1] == 1).all() for batch, _, _ in updates)
    assert len(updates) == 20


def value_of_constant(env_id, **flags):
    """V of the first observation after training."""
    run(env_id=env_id, **({"gamma": 0.9, "ent_coef": 0.0, "num_envs": 8, "total_timesteps": 20_000} | flags))
    agent, args, _, _ = load_agent("run")
    obs, _ = make_envs(args, 1).reset(seed=0)
    with torch.no_grad():
        return agent.critic(agent.encoder(torch.as_tensor(obs))).item()


VALUES = [{}, {"network": "shared"}, {"num_steps": 1, "num_envs": 32}, {"num_steps": 16, "gae_lambda": 1.0}]


@pytest.mark.parametrize("flags", VALUES, ids=str)
def test_value_under_a_time_limit_is_that_of_going_on(workdir, flags):
    """Pitfall 1: reward 1 for ever, cut every 10 steps: V must be 1/(1 − γ) = 10."""
    assert value_of_constant("toy_envs:Constant-v0", **flags) == pytest.approx(10, abs=0.3)


def test_value_of_what_terminates_is_the_finite_sum(workdir):
    value = value_of_constant("toy_envs:Terminating-v0", total_timesteps=30_000)
    assert value == pytest.approx((1 - 0.9**10) / (1 - 0.9), abs=0.3)  # 6.5


@pytest.mark.parametrize("N, max_grad_norm, low, high", [(16, None, 0.9, 1.1), (1, None, 0.3, 0.8), (1, 0.5, 0.0, 0.2)])
def test_value_is_the_mean_of_the_returns_unless_gradients_are_clipped(N, max_grad_norm, low, high):
    """Every tenth transition is rewarded, with 10. In batches of one, clipping a rare large gradient, or its update, to
    the length of the others makes V like a median."""
    torch.manual_seed(1)
    agent, zeros = a2c_sync.ActorCritic((1,), 2, True, False), torch.zeros(1, N)
    args, num = Args(max_grad_norm=max_grad_norm, critic_lr=6e-3), 600
    optimizer = make_optimizer(agent, args)
    ended = torch.cat([zeros, zeros + 1])
    for k in range(num):
        a2c_sync.decay_learning_rates(optimizer, k / num)
        rewards = 10.0 * (torch.rand(1, N) < 0.1) if N > 1 else torch.full((1, 1), 10.0 * (k % 10 == 9))
        batch = Rollout(torch.ones(2, N, 1), zeros.long(), rewards, ended[1:], ended)
        a2c_sync.update(agent, optimizer, batch, args)
    assert low < agent.critic(torch.ones(1)).item() < high


@pytest.mark.parametrize("num_envs, num_steps", [(8, 5), (256, 16)])
def test_losses_are_logged_at_least_every_1000_steps(workdir, num_envs, num_steps):
    """Or at every update, where one has more; and not much oftener."""
    run(env_id="toy_envs:Constant-v0", num_envs=num_envs, num_steps=num_steps, total_timesteps=13_000)
    gaps = np.diff(sorted({steps for steps, tag, _ in metrics("run") if tag == "losses/critic_loss"}))
    assert len(gaps) >= 2 and min(gaps) >= 500 and max(gaps) <= max(1000, num_envs * num_steps)


def test_same_seed_same_metrics_and_weights(workdir):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(Args(run_dir=name, seed=seed, **SHORT))
    a, b, c = ((metrics(name), checkpoint(name)["parts"]) for name in "abc")
    assert a[0] == b[0] != c[0] and same(a[1], b[1]) and not same(a[1], c[1]) and results("a") == results("b")


def test_every_environment_has_its_own_seed():
    obs, _ = make_envs(Args(env_id="Acrobot-v1", num_envs=4)).reset(seed=3)
    assert len({row.tobytes() for row in obs}) == 4


# --- Every flag in both positions; every update moves every weight (pitfall 22) ---------------------------------------

FLAGS = [
    {"lr_decay": False, "num_threads": 2, "checkpoint_every": 100, "total_timesteps": 200},
    {"network": "shared", "value_coef": 0.1, "optimizer": "adam"},
    {"num_envs": 1, "num_steps": 1, "gae_lambda": 1.0, "gamma": 1.0, "critic_lr": 1e-2, "total_timesteps": 100},
    {"env_id": "Acrobot-v1", "vectorization": "sync", "normalize_obs": True, "ent_coef": 0.0, "max_grad_norm": 0.5},
    {"env_id": "Acrobot-v1", "vectorization": "async", "num_envs": 2},
    {"env_id": "Pendulum-v1", "network": "shared", "normalize_obs": True},
    {"env_id": "Pendulum-v1", "device": "cpu", "rmsprop_eps": 1e-8},
    {"env_id": "toy_envs:Images-v0"},
    {"env_id": "toy_envs:Images-v0", "network": "shared"},
]
FLAGS += [{"env_id": f"toy_envs:{name}-v0"} for name in ("Shifted", "SmallInts", "Doubles")]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()))
def test_flags(workdir, updates, flags):
    end = run(**flags)
    trained, initial = checkpoint("run")["parts"]["agent"], updates[0][2]
    unmoved = [name for name in initial if torch.equal(initial[name], trained[name])]
    assert end["updates"] > 10 and math.isfinite(end["eval_return_mean"])
    assert unmoved == [] and initial.keys() == trained.keys() and not children(os.getpid())
    tags = {tag for _, tag, _ in metrics("run")}
    assert ("losses/trunk_grad_cosine" in tags) == (flags.get("network") == "shared")


@pytest.mark.parametrize("decay", [True, False])
def test_every_update_has_the_learning_rates_of_its_step(workdir, updates, decay):
    run(lr_decay=decay, actor_lr=5e-3, critic_lr=1e-2)
    steps = np.cumsum([0] + [int((1 - batch.done[:-1]).sum()) for batch, _, _ in updates])[:-1]
    shares = 1 - steps / SHORT["total_timesteps"] if decay else np.ones(len(steps))
    np.testing.assert_allclose([rates for _, rates, _ in updates], np.outer(shares, [5e-3, 1e-2]))


RATES = [({}, [5e-3, 5e-3]), ({"critic_lr": 1e-2}, [5e-3, 1e-2]), ({"network": "shared"}, [5e-3])]


@pytest.mark.parametrize("flags, rates", RATES, ids=str)
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_each_network_has_its_learning_rate(flags, rates, optimizer):
    """D1."""
    args = Args(actor_lr=5e-3, optimizer=optimizer, rmsprop_eps=0.1, **flags)
    agent = make_agent(make_envs(args), args)
    made = make_optimizer(agent, args)
    assert [group["lr"] for group in made.param_groups] == rates == [g["initial_lr"] for g in made.param_groups]
    for group, network in zip(made.param_groups, [agent] if "network" in flags else [agent.actor, agent.critic]):
        assert {*group["params"]} == {*network.parameters()}
        assert group["eps"] == (0.1 if optimizer == "rmsprop" else 1e-8)
    assert isinstance(made, a2c_sync.RMSpropA3C if optimizer == "rmsprop" else torch.optim.Adam)


def test_trunk_gradients_are_logged_at_the_parameters_of_the_update(workdir, updates):
    """The first row: those of the initial parameters and the first batch."""
    args = Args(**(SHORT | {"network": "shared", "seed": 1}))
    run(network="shared")
    batch, _, before = updates[0]
    agent = make_agent(make_envs(args), args)
    agent.load_state_dict(before)
    first = {tag: float(value) for _, tag, value in reversed(metrics("run"))}
    for name, value in a2c_sync.trunk_gradients(agent, batch, args).items():
        assert first[f"losses/{name}"] == pytest.approx(value.item(), rel=1e-5)


def test_images_are_stored_as_bytes_and_a_rollout_has_a_row_for_the_state_after_it():
    rollout = make_rollout(make_envs(Args(env_id="toy_envs:Images-v0")), 5, 3)
    assert rollout.obs.shape == (6, 3, 3, 40, 44) and rollout.obs.dtype == np.uint8 and rollout.done.shape == (6, 3)


def test_actions_reach_the_environment_in_its_own_bounds():
    toy_envs.Target.actions.clear()
    envs = make_envs(Args(env_id="toy_envs:Target-v0"), 4)
    envs.reset(seed=0)
    envs.step(np.array([[-1.0], [0.0], [1.0], [7.0]], np.float32))
    assert np.concatenate(toy_envs.Target.actions).tolist() == [-3.0, 1.0, 5.0, 5.0]


def test_continuous_actions_are_learned(workdir):
    """A random policy gets -21; the best, which looks at the observation, 0."""
    end = run(env_id="toy_envs:Target-v0", total_timesteps=16_000, num_envs=16, num_steps=8, eval_episodes=50)
    assert end["eval_return_mean"] > -3


# --- Slow: learning ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cartpole_is_solved_with_the_defaults_and_stays_so(workdir):
    """The first command. Without update clipping, ten of forty seeds fall below 300 after they have reached 475."""
    worst = []
    for seed in range(50, 60):
        end = train(Args(seed=seed, run_dir=str(seed)))
        assert end["eval_return_mean"] >= 475 and end["seconds"] < 120
        worst.append(measured("worst after 475", end, read_log(Path(str(seed)))))
    assert sum(value >= 300 for value in worst) >= 9, worst


@pytest.mark.slow
def test_online_actor_critic_learns(workdir):
    """D3: one environment, one step."""
    flags = {"num_envs": 1, "num_steps": 1, "actor_lr": 3e-4, "critic_lr": 1e-3, "ent_coef": 0.0}
    end = train(Args(run_dir="run", total_timesteps=100_000, **flags))
    assert end["eval_return_mean"] > 200  # a random policy: 20
