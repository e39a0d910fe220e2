"""a3c_async.py: what its updates are made of, how old that is, and a run as a whole with workers that die."""

import dataclasses
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, finish, start
from helpers import checkpoint, children, metrics

import a2c_sync
import a3c_async
from a3c_async import Args, Rollout, make_agent, make_optimizer, make_rollout, record_fields, train, update
from common.envs import make_envs
from common.flags import UserError
from common.run import run_cli
from common.workers import Mailbox, Snapshot, Workers, copy_parameters, shared
from evaluate import load_args

SCRIPT = ROOT / "a3c_async.py"
SHORT = {"update": "pooled", "num_workers": 2, "envs_per_worker": 1, "num_steps": 5, "batch_size": 32}
SHORT |= {"total_timesteps": 600, "eval_episodes": 2}
BOTH = pytest.mark.parametrize("update", ["pooled", "hogwild"])


def run(**flags):
    return train(Args(**({"run_dir": "run"} | SHORT | flags)))


def resume(**flags):
    return train(dataclasses.replace(load_args("run"), **flags))


def agent_of(args):
    return make_agent(make_envs(args, 1), args)


def weights_of(agent):
    return {name: p.detach().clone() for name, p in agent.state_dict().items()}


def random_rollout(args, N=3):
    """Noise, with ends of episodes and the resets that follow."""
    T, (shape, _), discrete = args.num_steps, (envs := make_envs(args, 1)).obs_spec, envs.discrete
    terminated, done = (torch.rand(T, N) < 0.1).float(), (torch.rand(T + 1, N) < 0.2).float()
    done[1:] = torch.maximum(done[1:], terminated)
    actions = torch.randint(2, (T, N)) if discrete else torch.randn(T, N, envs.num_actions)
    return Rollout(torch.randn(T + 1, N, *shape), actions, torch.randn(T, N), terminated, done)


# --- Updates ----------------------------------------------------------------------------------------------------------

FLAGS = [{}, {"network": "shared"}, {"env_id": "Pendulum-v1"}, {"max_grad_norm": 0.1}, {"critic_lr": 1e-2}]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_a_pooled_update_is_a2c_syncs(flags):
    """`update` on the agent itself, always fresh: the same weights and metrics as a2c_sync.py's, bit for bit."""
    flags = {"ent_coef": 0.03, "actor_lr": 0.01} | flags
    ours, theirs = Args(**flags), a2c_sync.Args(**flags)
    torch.manual_seed(0)
    agents = agent_of(ours), agent_of(ours)
    agents[1].load_state_dict(agents[0].state_dict())
    optimizers = make_optimizer(agents[0], ours), a2c_sync.make_optimizer(agents[1], theirs)
    for _ in range(5):
        batch = random_rollout(ours)
        found = update(agents[0], optimizers[0], batch, ours, agents[0], lambda: True)
        wanted = a2c_sync.update(agents[1], optimizers[1], batch, theirs)
        assert found == wanted
    for p, q in zip(agents[0].parameters(), agents[1].parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_a_hogwild_update_adds_a_workers_gradient_to_what_others_have_made_of_the_parameters(flags):
    """Its gradient at the parameters that it pulled, RMSProp's step and σ's bound at the shared ones."""
    args = Args(**({"ent_coef": 0.03, "actor_lr": 0.01} | flags))
    torch.manual_seed(0)
    shared_agent, agent, plain = agent_of(args).share_memory(), agent_of(args), agent_of(args)
    optimizer, plain_optimizer = make_optimizer(shared_agent, args), make_optimizer(plain, args)
    for _ in range(4):
        copy_parameters(agent.parameters(), shared_agent.parameters())
        batch = random_rollout(args)
        loss, _ = a3c_async.loss_fn(agent, batch, args)
        grads = torch.autograd.grad(loss, list(agent.parameters()))
        pulled = weights_of(agent)
        with torch.no_grad():
            for p in shared_agent.parameters():  # others
                p.add_(0.01 * torch.randn_like(p))
        plain.load_state_dict(shared_agent.state_dict())
        for p, grad in zip(plain.parameters(), grads):
            p.grad = grad.clone()
        if args.max_grad_norm is not None:
            for group in plain_optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
        plain_optimizer.step()
        plain.actor.bound_std()
        update(agent, optimizer, batch, args, shared_agent, lambda: True)
        assert all(torch.equal(p, pulled[name]) for name, p in agent.state_dict().items())  # until it pulls again
        for p, q in zip(shared_agent.parameters(), plain.parameters()):
            torch.testing.assert_close(p, q)


def test_k_pushes_are_k_gradients_and_rmsprop_steps_written_out_by_hand():
    """Pitfall 10: a worker that did not clear its own gradients would hand over 1, 2, 3, ... times the first."""
    args = Args(lr_decay=False, actor_lr=0.01)
    torch.manual_seed(0)
    shared_agent, agent = agent_of(args).share_memory(), agent_of(args)
    optimizer = make_optimizer(shared_agent, args)
    theta = [p.detach().clone() for p in shared_agent.parameters()]
    squares = [torch.ones_like(p) for p in theta]
    batch = random_rollout(args)
    for _ in range(4):
        copy_parameters(agent.parameters(), shared_agent.parameters())
        grads = torch.autograd.grad(a3c_async.loss_fn(agent, batch, args)[0], list(agent.parameters()))
        update(agent, optimizer, batch, args, shared_agent, lambda: True)
        for p, square, grad in zip(theta, squares, grads):
            square.mul_(0.99).add_(0.01 * grad**2)
            p.sub_(0.01 * grad / (square + 1e-5).sqrt())
    for p, expected in zip(shared_agent.parameters(), theta):
        torch.testing.assert_close(p.detach(), expected)


def test_a_gradient_that_is_too_old_is_not_applied():
    """And freshness is asked for after the gradient has been computed, when the lag is known."""
    args = Args()
    shared_agent, agent = agent_of(args), agent_of(args)
    before, asked = weights_of(shared_agent), []

    def is_fresh():
        asked.append(all(p.grad is not None and p.grad.any() for p in agent.critic.parameters()))
        return False

    metrics = update(agent, make_optimizer(shared_agent, args), random_rollout(args), args, shared_agent, is_fresh)
    assert asked == [True] and metrics.keys() == set(a3c_async.METRICS)
    assert all(torch.equal(p, before[name]) for name, p in shared_agent.state_dict().items())


def test_the_loss_is_word_for_word_a2c_syncs():
    import inspect

    for name in ("Rollout", "loss_fn", "gae", "masked_mean", "actor_loss_fn", "critic_loss_fn", "decay_learning_rates"):
        assert inspect.getsource(getattr(a3c_async, name)) == inspect.getsource(getattr(a2c_sync, name))


@pytest.fixture
def batches(monkeypatch):
    """What every update in this process learns from."""
    found = []

    def record(agent, optimizer, batch, *rest):
        found.append(Rollout(*(x.clone() for x in batch)))
        return update(agent, optimizer, batch, *rest)

    monkeypatch.setattr(a3c_async, "update", record)
    return found


@pytest.mark.parametrize("batch_size, num_steps", [(1, 1), (32, 5), (7, 3)])
def test_a_pooled_update_has_whole_rollouts_of_consecutive_transitions(workdir, batches, batch_size, num_steps):
    """toy_envs:Counting shows (episode, step): every s' follows its s, and resets are in no loss (pitfalls 3 to 5)."""
    end = run(env_id="toy_envs:Counting-v0", batch_size=batch_size, num_steps=num_steps, total_timesteps=300)
    learned = 0
    for obs, actions, rewards, terminated, done in batches:
        valid = done[:-1] == 0
        assert batch_size <= valid.sum() < batch_size + num_steps
        assert obs.shape[:2] == done.shape == (num_steps + 1, actions.shape[1])
        episode, step = obs[..., 0], obs[..., 1]
        assert (episode[1:] == episode[:-1])[valid].all() and (step[1:] == step[:-1] + 1)[valid].all()
        assert (rewards == step[1:])[valid].all()
        assert (episode[1:] == episode[:-1] + 1)[~valid].all() and (step[1:] == 0)[~valid].all()
        assert not (terminated > done[1:]).any()
        learned += int(valid.sum())
    assert end["updates"] == len(batches) and end["env_steps"] - batch_size - num_steps < learned <= end["env_steps"]


def test_hogwild_statistics_and_weights_are_those_of_the_workers(workdir):
    run(update="hogwild", num_workers=2)
    optimizer = checkpoint("run")["parts"]["optimizer"]
    moved = [(state["square_avg"] != 1).any() for state in optimizer["state"].values()]
    assert len(moved) == 12 and all(moved)
    torch.manual_seed(1)
    initial = agent_of(Args()).state_dict()
    assert all((p != initial[name]).any() for name, p in checkpoint("run")["parts"]["agent"].items())


# --- Lag --------------------------------------------------------------------------------------------------------------


class Scripted:
    """A worker of which every beat does what it is told, and which ends after some records."""

    index, generation = 0, 0

    def __init__(self, on_beat, records):
        self.on_beat, self.records, self.beats = on_beat, records, -1
        self.sent, self.counted, self.worker_steps = [], [], None

    def close_at_exit(self, envs):
        return envs

    def beat(self):
        if self.beats >= 0:  # the first says that the environments stand
            self.on_beat(self.beats)
        self.beats += 1

    def wait(self):
        pass

    def send(self, **record):
        self.sent.append({name: torch.as_tensor(value).numpy().copy() for name, value in record.items()})
        self.counted.append(int(self.worker_steps[0]))
        if len(self.sent) == self.records:
            raise EndOfScript


class EndOfScript(Exception):
    pass


class Scene:
    """What the main process shares with a scripted worker; `worker.sent` is what that handed over."""

    def __init__(self, update, on_beat, records, index=0, generation=0, start=0, **flags):
        self.args = Args(update=update, envs_per_worker=1, num_steps=4, total_timesteps=10**6, **flags)
        self.agent = agent_of(self.args).share_memory()
        self.optimizer, self.snapshot = make_optimizer(self.agent, self.args), Snapshot(self.agent)
        self.steps, self.updates = shared((2,), np.int64), shared((2,), np.int64)
        self.worker = Scripted(lambda beat: on_beat(beat, self), records)
        self.worker.index, self.worker.generation, self.worker.worker_steps = index, generation, self.steps
        with pytest.raises(EndOfScript):
            if update == "hogwild":
                shared_parts = self.agent, self.optimizer, self.steps, self.updates
                a3c_async.hogwild_worker(self.worker, self.args, start, *shared_parts)
            else:
                a3c_async.pooled_worker(self.worker, self.args, start, self.snapshot)
        self.sent = self.worker.sent


def nothing(beat, scene):
    pass


@BOTH
def test_what_a_worker_sends_fits_its_mailbox(update):
    scene = Scene(update, nothing, 2)
    mailbox = Mailbox(record_fields(make_rollout(make_envs(scene.args, 1), 4, 1), scene.args))
    mailbox.put(**scene.sent[0])
    record = mailbox.take()
    assert record.keys() == scene.sent[0].keys()
    assert all((record[name] == value).all() for name, value in scene.sent[0].items())


def test_pooled_transitions_know_the_version_that_made_them():
    """A version published while a rollout is under way counts from the next one."""

    def publish(beat, scene):
        if beat in (1, 3, 9):  # twice in the first rollout, never in the second, once in the third
            scene.snapshot.publish(scene.agent, beat)

    scene = Scene("pooled", publish, 4)
    assert [int(record["version"]) for record in scene.sent] == [0, 3, 3, 9]


def test_hogwild_lag_is_the_updates_of_others_since_the_pull():
    def others(beat, scene):
        scene.updates[1] += {0: 2, 2: 1, 9: 5}.get(beat, 0)

    scene = Scene("hogwild", others, 4)
    assert [int(record["lag"]) for record in scene.sent] == [3, 0, 5, 0]
    assert scene.updates.tolist() == [4, 8]


def test_updates_while_a_worker_copies_the_parameters_count_as_lag(monkeypatch):
    """It may get them or not: the version is read before."""

    def copy(to, source):
        copy_parameters(to, source)
        scenes[0].updates[1] += 1

    scenes = []
    monkeypatch.setattr(a3c_async, "copy_parameters", copy)
    init = Scene.__init__
    monkeypatch.setattr(Scene, "__init__", lambda scene, *args: scenes.append(scene) or init(scene, *args))
    assert [int(record["lag"]) for record in Scene("hogwild", nothing, 3).sent] == [1, 1, 1]


def test_a_hogwild_worker_learns_from_its_own_rollout_at_the_parameters_that_it_pulled(monkeypatch):
    learned = []

    def record(agent, optimizer, batch, args, shared_agent, is_fresh):
        learned.append((weights_of(agent), Rollout(*(x.clone() for x in batch))))
        return update(agent, optimizer, batch, args, shared_agent, is_fresh)

    def others(beat, scene):
        if beat % 4 == 0:  # the first step of a rollout: after the pull
            pulled.append(weights_of(scene.agent))
        with torch.no_grad():
            for p in scene.agent.parameters():
                p.add_(0.01 * torch.randn_like(p))

    pulled = []
    monkeypatch.setattr(a3c_async, "update", record)
    Scene("hogwild", others, 5, actor_lr=0.01)
    assert len(learned) == len(pulled) == 5
    for (weights, batch), before in zip(learned, pulled):
        assert all(torch.equal(weights[name], p) for name, p in before.items())
        assert (batch.rewards == 1 - batch.done[:-1]).all()  # CartPole's: 1 but for resets
    rows = [batch.obs for _, batch in learned]
    assert all(torch.equal(rollout[-1], following[0]) for rollout, following in zip(rows, rows[1:]))


def test_steps_count_when_they_have_been_handed_over():
    """A worker killed between the two would otherwise leave steps that the main process waits for in vain."""
    scene = Scene("hogwild", nothing, 4)
    steps = [int(record["steps"]) for record in scene.sent]
    assert scene.worker.counted == [sum(steps[:k]) for k in range(4)] and sum(steps) > 12


def test_a_hogwild_worker_waits_when_there_are_enough_steps():
    def others(beat, scene):
        if beat == 3:
            scene.steps[1] = 10**6
        if beat == 20:  # it only beats now, until the main process ends it
            raise EndOfScript

    assert len(Scene("hogwild", others, 100).sent) == 1


def test_workers_generations_and_resumed_runs_have_noise_of_their_own():
    found = []
    for index, generation, first in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 100)):
        torch.manual_seed(0)  # the same networks
        records = Scene("pooled", nothing, 5, index=index, generation=generation, start=first).sent
        found.append((np.concatenate([r["actions"] for r in records]).tolist(), records[0]["obs"][0].tolist()))
    assert found[0] == found[1]
    for i in range(1, 5):
        for j in range(i + 1, 5):
            assert found[i][0] != found[j][0] and found[i][1] != found[j][1]


def test_hogwild_workers_lower_their_learning_rates():
    def others(beat, scene):
        scene.steps[1] = 750_000  # of a million

    flags = {"actor_lr": 1e-3, "critic_lr": 1e-2}
    for decay, share in ((True, 0.25), (False, 1.0)):
        optimizer = Scene("hogwild", others, 2, lr_decay=decay, **flags).optimizer
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([1e-3 * share, 1e-2 * share], rel=1e-3)


def test_pooled_learning_rates(workdir):
    for decay in (True, False):
        run(run_dir=str(decay), lr_decay=decay, actor_lr=1e-3, critic_lr=1e-2)
        rates = [group["lr"] for group in checkpoint(str(decay))["parts"]["optimizer"]["param_groups"]]
        if decay:
            assert 0 < rates[0] < 2e-4 and rates[1] == pytest.approx(10 * rates[0])
        else:
            assert rates == [1e-3, 1e-2]


def test_a_resumed_run_acts_with_the_parameters_it_resumes(workdir, monkeypatch):
    before = run()
    calls, publish, begin = [], Snapshot.publish, Workers.start
    monkeypatch.setattr(Snapshot, "publish", lambda s, m, version: calls.append(version) or publish(s, m, version))
    monkeypatch.setattr(Workers, "start", lambda w, *args: calls.append("start") or begin(w, *args))
    end = resume(total_timesteps=900)
    assert calls[:3] == [before["updates"], "start", before["updates"] + 1]
    assert end["lag_max"] < before["updates"]


def test_hogwild_drops_what_is_too_old():
    def others(beat, scene):
        scene.updates[1] += {0: 2, 9: 1}.get(beat, 0)
        weights.append(scene.agent.actor.head.weight.detach().clone())

    weights = []
    scene = Scene("hogwild", others, 3, max_lag=1)
    assert [int(record["lag"]) for record in scene.sent] == [2, 0, 1] and scene.updates[0] == 2
    assert torch.equal(weights[0], weights[4]) and not torch.equal(weights[4], weights[8])


@BOTH
@pytest.mark.parametrize("max_lag", [0, 1])
def test_max_lag(workdir, batches, update, max_lag):
    flags = {
        "env_id": "toy_envs:Slow-v0",
        "num_workers": 3,
        "batch_size": 10,
        "total_timesteps": 150,
    }  # slow: all take part
    end = run(update=update, max_lag=max_lag, **flags)
    histogram = Counter({int(lag): steps for lag, steps in end["lag_histogram"].items()})
    assert max(histogram) <= max_lag and (end["dropped"] > 0 or max_lag > 0)
    assert sum(histogram.values()) + end["dropped"] == end["env_steps"]
    if update == "pooled":  # hogwild's workers learn elsewhere
        learned = sum(int((1 - batch.done[:-1]).sum()) for batch in batches)
        assert sum(histogram.values()) - 15 < learned <= sum(histogram.values())
    assert end["lag_max"] == max(histogram) and end["lag_mean"] == pytest.approx(
        sum(lag * steps for lag, steps in histogram.items()) / sum(histogram.values())
    )


@pytest.mark.slow
@BOTH
def test_lag_is_logged_and_a_slow_worker_raises_it(workdir, update):
    flags = {"env_id": "toy_envs:Slow-v0", "batch_size": 5, "total_timesteps": 120}
    largest = {}
    for slow in (0.0, 0.1):
        largest[slow] = run(run_dir=str(slow), update=update, slow_worker=slow, **flags)["lag_max"]
        tags = {tag for _, tag, _ in metrics(str(slow))}
        assert {"lag/mean", "lag/max", "lag/dropped", "losses/actor_loss", "losses/critic_loss"} <= tags
    assert largest[0.1] > largest[0.0]


def test_a_lone_worker_is_at_most_one_update_behind(workdir):
    """It pulls when its last rollout has been taken, of which the update may be under way."""
    end = run(num_workers=1, batch_size=1)
    assert end["updates"] > 100 and end["lag_max"] <= 1


def test_tensorboard_has_the_histogram(workdir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run()
    accumulator = EventAccumulator("run").Reload()
    histograms = accumulator.Histograms("lag/histogram")
    assert histograms and all(
        h.histogram_value.num > 0 and sum(h.histogram_value.bucket) == h.histogram_value.num for h in histograms
    )


# --- A run as a whole -------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    "flags", [{}, {"num_workers": 1}, {"num_workers": 4, "envs_per_worker": 3}, {"num_steps": 1}], ids=str
)
def test_total_steps_within_a_rollout(workdir, update, flags):
    end = run(update=update, **flags)
    args = Args(**(SHORT | flags))
    rollout = args.num_steps * args.envs_per_worker
    assert 600 <= end["env_steps"] < 600 + rollout * (args.num_workers if update == "hogwild" else 1)
    assert end["env_steps"] == sum(end["lag_histogram"].values()) and end["updates"] > 10
    assert not children(os.getpid())


@BOTH
@pytest.mark.parametrize(
    "flags",
    [
        {"env_id": "Pendulum-v1"},
        {"env_id": "toy_envs:Images-v0", "network": "shared", "total_timesteps": 140},
        {"network": "shared", "envs_per_worker": None, "num_envs": 4, "ent_coef": 0.0, "gae_lambda": 1.0},
        {"critic_lr": 1e-2, "no_decay": True, "max_grad_norm": 0.5},
    ],
    ids=str,
)
def test_flags(workdir, update, flags):
    flags = dict(flags)
    if flags.pop("no_decay", False):
        flags["lr_decay"] = False
    args = Args(**(SHORT | flags))
    end = run(update=update, **flags)
    torch.manual_seed(args.seed)
    initial = agent_of(args).state_dict()
    after = checkpoint("run")["parts"]["agent"]
    assert end["updates"] >= 3 and all((after[name] != initial[name]).any() for name in after)
    assert {"episodic" in tag for _, tag, _ in metrics("run")} == {True, False}


def test_every_worker_has_its_own_environments_and_actions(workdir, all_workers_begin, batches):
    run(num_workers=3, envs_per_worker=2, batch_size=30, num_steps=5, env_id="Pendulum-v1", total_timesteps=200)
    firsts = torch.cat([batch.obs[0] for batch in batches])  # s_0 of every rollout and environment
    assert len(firsts.unique(dim=0)) == len(firsts) > 10


def test_resume_goes_on_with_weights_statistics_and_counters(workdir):
    first = run(update="hogwild")
    before = checkpoint("run")
    end = resume(total_timesteps=first["env_steps"] + 1)  # one rollout more
    after = checkpoint("run")
    assert end["env_steps"] > first["env_steps"] and end["updates"] > first["updates"]
    assert sum(end["lag_histogram"].values()) == end["env_steps"]
    for name, p in before["parts"]["agent"].items():
        assert (p - after["parts"]["agent"][name]).abs().max() < 0.2  # not from the start again
    squares = [s["parts"]["optimizer"]["state"][0]["square_avg"] for s in (before, after)]
    assert (squares[1] - squares[0]).abs().max() < 0.2 < (1 - squares[1]).abs().max()
    end = resume(total_timesteps=1200, num_workers=3)
    assert end["env_steps"] >= 1200
    for name, p in checkpoint("run")["parts"]["agent"].items():
        assert (p != after["parts"]["agent"][name]).any()


def test_epsilon_of_the_flag_is_the_optimizers_and_wins_on_resume(workdir, monkeypatch):
    made, original = [], make_optimizer
    monkeypatch.setattr(a3c_async, "make_optimizer", lambda *args: made.append(original(*args)) or made[-1])
    run(rmsprop_eps=100.0)
    resume(total_timesteps=1000, rmsprop_eps=1e-8)
    assert [{group["eps"] for group in optimizer.param_groups} for optimizer in made] == [{100.0}, {1e-8}]


def test_hogwilds_networks_are_on_the_cpu_whatever_auto_finds(workdir, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [])
    run(update="hogwild", device="auto", total_timesteps=200)
    assert "a3c_async.py on CartPole-v1, cpu," in capsys.readouterr().err


def test_checkpoints_are_as_many_however_the_environments_are_given(workdir, monkeypatch):
    found = []
    monkeypatch.setattr(a3c_async.Run, "finish", lambda run, **_: found.append(run._every) or {})
    run(run_dir="a", total_timesteps=50)
    run(run_dir="b", total_timesteps=50, envs_per_worker=None, num_envs=2)
    assert found == [2_000 * 2] * 2


def test_resume_with_another_number_of_environments(workdir):
    args = Args(run_dir="run", total_timesteps=200, eval_episodes=1)
    train(args)
    assert args.num_envs is args.envs_per_worker is None  # train() leaves the caller's flags alone
    for num_envs in (8, 4):
        resume(total_timesteps=1000 - 100 * num_envs, num_envs=num_envs)
        assert json.loads(Path("run/args.json").read_text())["num_envs"] == num_envs
    with pytest.raises(UserError, match="--num-envs 6 is not --num-workers 4 times the environments of a worker"):
        resume(num_envs=6)


@pytest.mark.slow
@BOTH
def test_killed_workers_cost_nothing_but_their_rollouts(workdir, capsys, update):
    """SIGKILL and SIGSTOP at random moments; every step is counted and all episodes are whole."""
    killed = []

    def kill():
        rng = random.Random(0)
        while len(killed) < 4:
            time.sleep(rng.uniform(0.3, 0.8))
            if Path("run/checkpoint.pt").exists() and (victims := children(os.getpid())):
                killed.append(victims[rng.randrange(len(victims))])
                os.kill(killed[-1], signal.SIGSTOP if len(killed) == 2 else signal.SIGKILL)
        done.set()

    done = threading.Event()
    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    total = 1500
    end = run(env_id="toy_envs:Slow-v0", update=update, num_workers=4, worker_timeout=1.5, total_timesteps=total)
    thread.join()
    assert done.is_set() and end["workers_replaced"] >= 3
    assert total <= end["env_steps"] < total + 4 * 5
    assert sum(end["lag_histogram"].values()) == end["env_steps"]
    assert {value for _, tag, value in metrics("run") if tag == "charts/episodic_length"} == {"10"}
    assert "was killed by signal 9" in capsys.readouterr().err


@BOTH
def test_a_fault_of_every_worker_ends_the_run_with_its_traceback(workdir, update):
    begin = time.time()
    with pytest.raises(
        UserError, match="(?s)workers died 4 times before anything.*toy_envs.py.*RuntimeError: worn out"
    ):
        run(env_id="toy_envs:WornOut-v0", update=update, num_steps=200, total_timesteps=10**6)
    assert time.time() - begin < 60 and not children(os.getpid())
    assert checkpoint("run")["env_steps"] == 0  # there is one to look at


@pytest.mark.parametrize(
    "update, how",
    [
        ("pooled", signal.SIGINT),
        pytest.param("hogwild", signal.SIGTERM, marks=pytest.mark.slow),
        ("pooled", signal.SIGKILL),
        pytest.param("hogwild", signal.SIGKILL, marks=pytest.mark.slow),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGKILL", "SIGKILL hogwild"],
)
def test_no_process_is_left(workdir, update, how):
    flags = "--run-dir run --num-workers 3 --total-timesteps 100000000 --update".split()
    process = start(SCRIPT, *flags, update, cwd=workdir, start_new_session=True)
    end = time.time() + 60
    while not (Path("run/metrics.csv").exists() and "lag/mean" in Path("run/metrics.csv").read_text()):
        assert time.time() < end and process.poll() is None
        time.sleep(0.1)
    workers = children(process.pid)
    assert len(workers) == 3
    time.sleep(0.5)  # until all have begun
    os.kill(workers[0], signal.SIGSTOP)
    if how == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, how)  # as a terminal does
    status, _, err = finish(process, timeout=20)
    if how != signal.SIGKILL:
        assert status == 128 + how and "--resume run" in err and "Traceback" not in err, err
        assert checkpoint("run")["env_steps"] > 0
    end = time.time() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    "words, sentence",
    {
        "--num-envs 3 --num-workers 2": "is not --num-workers 2 times the environments of a worker",
        "--num-envs 4 --envs-per-worker 3": "give --envs-per-worker instead",
        "--num-workers 0": "--num-workers",
        "--envs-per-worker 0": "--envs-per-worker",
        "--max-lag -1": "--max-lag",
        "--slow-worker -1": "--slow-worker",
        "--worker-timeout 0": "--worker-timeout",
        "--batch-size 0": "--batch-size",
        "--rmsprop-eps 0": "--rmsprop-eps",
        "--update pooled --batch-size 200 --total-timesteps 100": "nothing would be learned",
        "--vectorization async": "give more --num-workers",
        "--slow-worker 60": "--slow-worker must be below --worker-timeout",
        "--network shared --critic-lr 0.1": "--critic-lr",
        "--env-id CartPol-v1": "CartPole",
    }.items(),
    ids=lambda value: value if value.startswith("--") else "",
)
def test_bad_input(workdir, monkeypatch, words, sentence):
    monkeypatch.setattr("sys.argv", ["a3c_async.py", *words.split()])
    with pytest.raises(SystemExit) as exit:
        run_cli(train, Args)
    message = exit.value.code
    assert isinstance(message, str) and message.startswith("error: ") and sentence in message
    assert "\n" not in message and not list(Path(".").iterdir())


# --- Slow: learning ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@BOTH
def test_cartpole_is_solved_while_fifty_workers_are_killed(workdir, update):
    killed = 0

    def kill():
        nonlocal killed
        rng = random.Random(1)
        while killed < 50:
            time.sleep(rng.uniform(0.5, 1.5))
            if Path("run/checkpoint.pt").exists() and (victims := children(os.getpid())):
                os.kill(victims[rng.randrange(len(victims))], signal.SIGKILL)
                killed += 1

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    total = 1_500_000  # longer than fifty kills take
    end = train(Args(run_dir="run", update=update, total_timesteps=total))
    thread.join(1)
    assert killed == 50 and end["workers_replaced"] >= 45
    assert total <= end["env_steps"] < total + 4 * 4 * 8 and sum(end["lag_histogram"].values()) == end["env_steps"]
    assert end["eval_return_mean"] >= 475
