"""a2c_sync.py as a whole: what is learned from, what is counted, and that it learns."""

import json
import math

import numpy as np
import pytest
import toy_envs  # registers the environments
import torch
from helpers import checkpoint, metrics, record_initial_weights, results, same

import a2c_sync
from a2c_sync import Args, train
from common.envs import make_envs
from common.evaluate import load_agent

SHORT = {"total_timesteps": 400, "num_envs": 3, "num_steps": 5, "eval_episodes": 2}


def run(**flags):
    return train(Args(run_dir="run", **(SHORT | flags)))


# --- Episode boundaries (pitfalls 1 to 5) -----------------------------------------------------------------------------


class Recorder:
    """Records every batch that train() learns from, as its equations receive it."""

    def __init__(self, monkeypatch):
        self.batches = []
        gae, critic_loss_fn, forward = a2c_sync.gae, a2c_sync.critic_loss_fn, a2c_sync.Critic.forward
        actor_loss_fn = a2c_sync.actor_loss_fn

        def record_obs(critic, features):
            self.obs = features.clone()
            return forward(critic, features)

        def record_flags(values, rewards, terminated, done, *rest):
            self.flags = {"rewards": rewards.clone(), "terminated": terminated.clone(), "done": done.clone()}
            return gae(values, rewards, terminated, done, *rest)

        def record_valid(values, returns, valid):
            assert values.requires_grad and not returns.requires_grad
            self.batches.append(self.flags | {"obs": self.obs, "valid": valid.clone()})
            return critic_loss_fn(values, returns, valid)

        def same_in_actor(log_probs, advantages, entropy, ent_coef, valid):
            assert torch.equal(valid, self.batches[-1]["valid"]) and not advantages.requires_grad
            return actor_loss_fn(log_probs, advantages, entropy, ent_coef, valid)

        monkeypatch.setattr(a2c_sync, "actor_loss_fn", same_in_actor)
        monkeypatch.setattr(a2c_sync.Critic, "forward", record_obs)
        monkeypatch.setattr(a2c_sync, "gae", record_flags)
        monkeypatch.setattr(a2c_sync, "critic_loss_fn", record_valid)

    def transitions(self):
        """(env, s, s', reward, terminated, done) of everything that entered a loss."""
        for batch in self.batches:
            for t, n in batch["valid"].nonzero().tolist():
                s, next_s = batch["obs"][t, n].tolist(), batch["obs"][t + 1, n].tolist()
                yield n, s, next_s, *(batch[name][t, n].item() for name in ("rewards", "terminated", "done"))


@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_what_is_learned_from_is_what_happened(workdir, monkeypatch, num_steps):
    recorder = Recorder(monkeypatch)
    end = run(env_id="toy_envs:Counting-v0", num_steps=num_steps, checkpoint_every=10**9)
    transitions = list(recorder.transitions())
    assert len(transitions) == end["env_steps"]  # all of them, and no reset step
    ends = {True: 0, False: 0}
    for n, (episode, t), (next_episode, next_t), reward, terminated, done in transitions:
        assert (next_episode, next_t) == (episode, t + 1)  # s' is the true successor, never the reset observation
        assert reward == next_t
        assert terminated == (done and episode % 3 != 0)  # both at once counts as terminated
        ends[bool(terminated)] += int(done)
    assert min(ends.values()) > 10
    # Transitions = sum of the lengths of the episodes that ended, plus those that were going on
    lengths = [float(value) for _, tag, value in metrics("run") if tag == "charts/episodic_length"]
    returns = [float(value) for _, tag, value in metrics("run") if tag == "charts/episodic_return"]
    assert len(lengths) == sum(ends.values())
    going_on = {}
    for n, _, (_, next_t), _, _, done in transitions:
        going_on[n] = 0 if done else next_t
    assert sum(lengths) + sum(going_on.values()) == end["env_steps"]
    assert returns == [length * (length + 1) / 2 for length in lengths]  # rewards 1, 2, ..., length


def value_of_constant(env_id, length=10, **flags):
    """V of the first observation after training."""
    flags = {"gamma": 0.9, "ent_coef": 0.0, "actor_lr": 1e-2, "total_timesteps": 20_000, "num_envs": 8} | flags
    run(env_id=env_id, **flags)
    agent, args, _, _ = load_agent("run")
    envs = make_envs(args, 1)
    obs, _ = envs.reset(seed=0)
    with torch.no_grad():
        return agent.critic(agent.trunk(torch.as_tensor(obs))).item()


@pytest.mark.parametrize("flags", [{}, {"network": "shared"}, {"num_steps": 1}, {"num_steps": 16, "gae_lambda": 1.0}])
def test_value_under_a_time_limit_is_that_of_going_on(workdir, flags):
    """Pitfall 1. Reward 1 for ever, cut every 10 steps: V must be 1/(1 − γ) = 10."""
    assert value_of_constant("toy_envs:Constant-v0", **flags) == pytest.approx(10, abs=0.3)


def test_value_of_what_terminates_is_the_finite_sum(workdir):
    value = value_of_constant("toy_envs:Terminating-v0", total_timesteps=40_000)
    assert value == pytest.approx((1 - 0.9**10) / (1 - 0.9), abs=0.3)  # 6.5


# --- One run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipped", [False, True])
def test_value_is_the_mean_of_the_returns_unless_gradients_are_clipped(workdir, clipped):
    """Clipping each of its updates to the same length makes V something like the median, here 0 instead of 1."""
    flags = {"num_envs": 1, "num_steps": 1, "critic_lr": 1e-3, "total_timesteps": 5_000}
    run(env_id="toy_envs:RareReward-v0", **flags, **({"max_grad_norm": 0.5} if clipped else {}))
    agent = load_agent("run")[0]
    value = agent.critic(agent.trunk(torch.ones(1))).item()
    assert value < 0.5 if clipped else value == pytest.approx(1, abs=0.2)


def test_run_folder(workdir):
    """args.json, metrics.csv, events, checkpoint.pt, results.json; the same numbers everywhere."""
    end = run()
    saved = json.loads(open("run/results.json").read())
    assert saved == end
    wanted = "script env_id seed env_steps updates seconds sps eval_return_mean eval_return_std eval_episodes"
    assert set(wanted.split()) <= set(saved)
    assert saved["env_steps"] == checkpoint("run")["env_steps"] >= 400
    args = json.loads(open("run/args.json").read())
    assert args["num_steps"] == 5 and args["script"] == "a2c_sync"
    tags = {tag for _, tag, _ in metrics("run")}
    wanted = (
        "charts/episodic_return charts/episodic_length losses/actor_loss losses/critic_loss losses/value losses/entropy"
    )
    assert set(wanted.split()) <= tags


def test_tensorboard_holds_what_metrics_csv_holds(workdir):
    from helpers import events

    run()
    for tag, points in events("run").items():
        if tag != "charts/SPS":
            rows = [(steps, np.float32(value)) for steps, t, value in metrics("run") if t == tag]
            assert sorted(points) == sorted(rows)


@pytest.mark.parametrize("num_envs, num_steps", [(1, 1), (8, 5), (256, 16)])
def test_losses_are_logged_at_least_every_1000_steps(workdir, num_envs, num_steps):
    run(num_envs=num_envs, num_steps=num_steps, total_timesteps=2_100 if num_envs == 1 else 13_000)
    logged = sorted({steps for steps, tag, _ in metrics("run") if tag == "losses/critic_loss"})
    gaps = np.diff([0, *logged])
    assert max(gaps) <= max(1000, num_envs * num_steps)


def test_same_seed_same_metrics_and_weights(workdir):
    runs = []
    for seed in (1, 1, 2):
        train(Args(run_dir=f"{len(runs)}", seed=seed, **SHORT))
        runs.append((metrics(len(runs).__str__()), checkpoint(len(runs).__str__()), results(len(runs).__str__())))
    assert runs[0][0] == runs[1][0] and runs[0][0] != runs[2][0]
    assert same(runs[0][1]["parts"], runs[1][1]["parts"]) and not same(runs[0][1]["parts"], runs[2][1]["parts"])
    assert runs[0][2] == runs[1][2]


def test_every_environment_has_its_own_seed(workdir):
    for env_id in ("CartPole-v1", "Acrobot-v1"):
        envs = make_envs(Args(env_id=env_id, num_envs=4))
        obs, _ = envs.reset(seed=3)
        assert len({row.tobytes() for row in obs}) == 4


# --- Every flag in both positions; every update moves every weight (pitfall 22) ---------------------------------------

FLAGS = [
    {},
    {"network": "shared"},
    {"network": "shared", "value_coef": 0.1},
    {"critic_lr": 1e-2},
    {"optimizer": "rmsprop"},
    {"lr_decay": False},
    {"num_envs": 1, "num_steps": 1},
    {"gae_lambda": 1.0, "gamma": 1.0},
    {"ent_coef": 0.0, "max_grad_norm": 0.5},
    {"env_id": "Acrobot-v1", "vectorization": "sync", "normalize_obs": True},
    {"env_id": "Acrobot-v1", "vectorization": "async", "num_envs": 2},
    {"env_id": "Pendulum-v1"},
    {"env_id": "Pendulum-v1", "network": "shared", "normalize_obs": True},
    {"env_id": "toy_envs:Images-v0"},
    {"env_id": "toy_envs:Images-v0", "network": "shared"},
    {"env_id": "toy_envs:Shifted-v0"},
    {"env_id": "toy_envs:SmallInts-v0"},
    {"env_id": "toy_envs:Doubles-v0"},
    {"device": "cpu", "num_threads": 2, "checkpoint_every": 100},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()) or "default")
def test_flags(workdir, monkeypatch, flags):
    initial = record_initial_weights(monkeypatch, a2c_sync)
    end = run(**flags)
    trained = checkpoint("run")["parts"]["agent"]
    unmoved = [name for name in initial if torch.equal(initial[name], trained[name])]
    assert end["updates"] > 10 and math.isfinite(end["eval_return_mean"])
    assert unmoved == []
    tags = {tag for _, tag, _ in metrics("run")}
    assert ("losses/trunk_grad_cosine" in tags) == (flags.get("network") == "shared")


def test_lr_decay_falls_linearly(workdir):
    rates = {}
    for decay in (True, False):
        train(Args(run_dir=str(decay), lr_decay=decay, **SHORT))
        rates[decay] = checkpoint(str(decay))["parts"]["optimizer"]["param_groups"][0]["lr"]
    assert rates[False] == Args().actor_lr and 0 < rates[True] < Args().actor_lr * 0.05


def test_each_networks_gradient_is_clipped_on_its_own():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0)
    loss = (a * torch.tensor([30.0, 40.0])).sum() + (b * torch.tensor([0.1, 0.2])).sum()
    a2c_sync.gradient_step(optimizer, loss, 0.5)
    torch.testing.assert_close(a.detach(), -torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(b.detach(), -torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, a2c_sync.Adam, a2c_sync.RMSpropA3C])
def test_a_network_without_gradient_is_passed_over(optimizer):
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    a2c_sync.gradient_step(optimizer([{"params": [a]}, {"params": [b]}], lr=1.0), a.sum(), 0.5)
    assert a.item() < -0.4 and b.item() == 0


def test_gradients_do_not_pile_up():
    a = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([a], lr=1.0)
    for _ in range(3):
        a2c_sync.gradient_step(optimizer, a.sum(), math.inf)
    assert a.item() == -3


def test_value_coef_weighs_the_critic(workdir, monkeypatch):
    losses, last = [], {}
    step, critic_loss_fn, actor_loss_fn = a2c_sync.gradient_step, a2c_sync.critic_loss_fn, a2c_sync.actor_loss_fn
    monkeypatch.setattr(a2c_sync, "critic_loss_fn", lambda *x: last.setdefault("critic", critic_loss_fn(*x)))
    monkeypatch.setattr(a2c_sync, "actor_loss_fn", lambda *x: last.setdefault("actor", actor_loss_fn(*x)))

    def record(optimizer, loss, max_grad_norm):
        losses.append((loss.item(), last.pop("actor").item(), last.pop("critic").item()))
        step(optimizer, loss, max_grad_norm)

    monkeypatch.setattr(a2c_sync, "gradient_step", record)
    run(value_coef=0.25, network="shared")
    assert len(losses) > 10 and all(loss == pytest.approx(a + 0.25 * c, rel=1e-5) for loss, a, c in losses)


@pytest.mark.parametrize("flags, rates", [({}, [5e-3, 5e-3]), ({"critic_lr": 1e-2}, [5e-3, 1e-2])])
def test_each_network_has_its_learning_rate(workdir, flags, rates):
    run(actor_lr=5e-3, lr_decay=False, **flags)
    groups = checkpoint("run")["parts"]["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == rates


def test_actions_reach_the_environment_in_its_own_bounds(workdir):
    toy_envs.Target.actions.clear()
    envs = make_envs(Args(env_id="toy_envs:Target-v0"), 4)
    envs.reset(seed=0)
    envs.step(np.array([[-1.0], [0.0], [1.0], [7.0]], np.float32))
    assert np.concatenate(toy_envs.Target.actions).tolist() == [-3.0, 1.0, 5.0, 5.0]


def test_an_entropy_bonus_alone_does_not_let_sigma_run_away(workdir):
    run(env_id="toy_envs:Nothing-v0", total_timesteps=3_000, ent_coef=1.0, lr_decay=False, actor_lr=0.1)
    assert (load_agent("run")[0].actor.log_std == 1).all()


def test_continuous_actions_are_learned(workdir):
    """A random policy gets -21; the best, which looks at the observation, 0."""
    end = run(env_id="toy_envs:Target-v0", total_timesteps=20_000, num_envs=16, num_steps=8, eval_episodes=50)
    assert end["eval_return_mean"] > -3


# --- Slow: learning ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_cartpole_is_solved_with_the_defaults(workdir, seed):
    end = train(Args(seed=seed, run_dir="run"))
    assert end["eval_return_mean"] >= 475 and end["seconds"] < 120


@pytest.mark.slow
def test_online_actor_critic_learns(workdir):
    """D3: one environment, one step."""
    flags = {"num_envs": 1, "num_steps": 1, "actor_lr": 3e-4, "critic_lr": 1e-3, "ent_coef": 0.0}
    end = train(Args(run_dir="run", total_timesteps=100_000, **flags))
    assert end["eval_return_mean"] > 200  # a random policy: 20
