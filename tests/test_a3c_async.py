"""a3c_async.py: what its updates are made of, how old that is (D7), and a run as a whole with workers that die."""

import dataclasses
import os
import random
import re
import signal
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import checkpoint, children, metrics

import a2c_sync
import a3c_async
import common.run
from a3c_async import Args, Rollout, hogwild_update, make_agent, make_optimizer, train
from common.envs import make_envs
from common.flags import UserError
from common.workers import copy_parameters, shared
from evaluate import load_args

SHORT = {"update": "pooled", "num_workers": 2, "num_envs": 2, "num_steps": 5, "batch_size": 32}
SHORT |= {"total_timesteps": 600, "eval_episodes": 2}
BOTH = pytest.mark.parametrize("update", ["pooled", "hogwild"])


def run(**flags):
    return train(Args(**({"run_dir": "run"} | SHORT | flags)))


def resume(**flags):
    return train(dataclasses.replace(load_args("run"), **flags))


def agent_of(args):
    return make_agent(make_envs(args, 1), args)


def weights_of(agent):
    return [p.detach().clone() for p in agent.parameters()]


def equal(weights, others):
    return all(torch.equal(p, q) for p, q in zip(weights, others, strict=True))


def random_rollout(args, N=3):
    """Noise, with ends of episodes and the resets that follow."""
    T, (shape, _), discrete = args.num_steps, (envs := make_envs(args, 1)).obs_spec, envs.discrete
    terminated, done = (torch.rand(T, N) < 0.1).float(), (torch.rand(T + 1, N) < 0.2).float()
    done[1:] = torch.maximum(done[1:], terminated)
    actions = torch.randint(2, (T, N)) if discrete else torch.randn(T, N, envs.num_actions)
    return Rollout(torch.randn(T + 1, N, *shape), actions, torch.randn(T, N), terminated, done)


# --- Updates ----------------------------------------------------------------------------------------------------------


def pieces(script, *sections):
    """The classes and functions of some sections of a script: name -> text."""
    parts = re.split(r"^# --- (\w+) -+\n", Path(script.__file__).read_text(), flags=re.MULTILINE)
    blocks = "\n\n\n".join(parts[parts.index(section) + 1].strip() for section in sections).split("\n\n\n")
    names = [re.search(r"^(?:class|def) (\w+)", block, re.MULTILINE) for block in blocks]
    return {name[1]: block for name, block in zip(names, blocks) if name}


def test_networks_equations_and_update_are_word_for_word_a2c_syncs():
    """So whatever the tests of a2c_sync.py say of them holds for this script, too."""
    ours, theirs = (pieces(script, "Networks", "Equations", "Update") for script in (a3c_async, a2c_sync))
    assert ours.pop("hogwild_update") and theirs.pop("trunk_gradients") and len(ours) == 16
    assert ours == theirs
    ours, theirs = (pieces(script, "Train") for script in (a3c_async, a2c_sync))
    assert all(ours[name] == theirs[name] for name in ("make_agent", "make_rollout", "act"))


AT_BOUND = {"env_id": "Pendulum-v1", "ent_coef": 5.0}
FLAGS = [{}, {"network": "shared"}, AT_BOUND, {"max_grad_norm": 0.1}, {"critic_lr": 1e-2, "rmsprop_eps": 0.1}]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_k_pushes_are_k_gradients_and_rmsprop_steps_written_out_by_hand(flags):
    """Of a worker's gradients at the parameters that it pulled, those of earlier pushes not added (pitfall 10): the
    steps of the shared ones, which others have moved, and σ's bound."""
    args = Args(**({"ent_coef": 0.03, "actor_lr": 0.01} | flags))
    torch.manual_seed(0)
    shared_agent, agent = agent_of(args).share_memory(), agent_of(args)
    optimizer, groups = make_optimizer(shared_agent, args), [shared_agent]
    if args.network == "separate":
        groups = [shared_agent.actor, shared_agent.critic]
    if flags is AT_BOUND:
        shared_agent.actor.log_std.data.fill_(0.999)
    squares = {p: torch.ones_like(p) for p in shared_agent.parameters()}
    rates = [args.actor_lr, args.critic_lr or args.actor_lr]
    batch = random_rollout(args)
    for _ in range(4):
        copy_parameters(agent.parameters(), shared_agent.parameters())
        grads = torch.autograd.grad(a3c_async.loss_fn(agent, batch, args)[0], list(agent.parameters()))
        grads, pulled, wanted = dict(zip(shared_agent.parameters(), grads)), weights_of(agent), {}
        with torch.no_grad():
            for p in shared_agent.parameters():  # others
                p.add_(0.01 * torch.randn_like(p))
        for group, rate in zip(groups, rates):
            norm = torch.cat([grads[p].flatten() for p in group.parameters()]).norm()
            scale = min(1.0, args.max_grad_norm / norm) if args.max_grad_norm else 1.0
            for p in group.parameters():
                squares[p] = 0.99 * squares[p] + 0.01 * (scale * grads[p]) ** 2
                wanted[p] = p.detach() - rate * scale * grads[p] / (squares[p] + args.rmsprop_eps).sqrt()
        if flags is AT_BOUND:
            log_std = shared_agent.actor.log_std
            assert (wanted[log_std] > 1).any()
            wanted[log_std] = wanted[log_std].clamp(max=1)
        found = hogwild_update(agent, optimizer, batch, args, shared_agent, lambda: True)
        assert found.keys() == {"actor_loss", "critic_loss", "value", "entropy"}
        assert equal(agent.parameters(), pulled)  # until it pulls again
        for p, expected in wanted.items():
            torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_too_old_is_not_applied():
    """And freshness is asked for after the gradient has been computed, when the lag is known."""
    args = Args()
    shared_agent, agent, asked = agent_of(args), agent_of(args), []
    before = weights_of(shared_agent)

    def is_fresh():
        asked.append(all(p.grad is not None and p.grad.any() for p in agent.critic.parameters()))
        return False

    found = hogwild_update(
        agent, make_optimizer(shared_agent, args), random_rollout(args), args, shared_agent, is_fresh
    )
    assert asked == [True] and "actor_loss" in found and equal(shared_agent.parameters(), before)


# --- The main process, on records that are made beforehand ------------------------------------------------------------


@pytest.fixture
def fixed(monkeypatch):
    """In place of Workers: hands over its `records`; `calls` is what the main process did in between."""

    class Fixed:
        records, calls, started, replaced = [], [], None, 0
        close = state_dict = load_state_dict = dict  # nothing

        def __init__(self, target, num, args, module=None, arrays=()):
            self.module, self.target = module, target

        def start(self, *args):
            Fixed.started = args
            self.calls.append("start")

        def publish(self, version):
            self.calls.append((version, self.module and weights_of(self.module)))

        def receive(self):
            record = self.records.pop(0)
            if record is KeyboardInterrupt:
                raise record
            if record and self.target is a3c_async.hogwild_worker:
                self.started[-1][1] += 1  # worker 1 has made an update
            return record

    monkeypatch.setattr(a3c_async, "Workers", Fixed)
    monkeypatch.setattr(common.run, "LOG_EVERY", 1)
    return Fixed


def play(fixed, records, stop_after, args):
    """A run on these records. With a number, one that is interrupted after so many, and is resumed."""
    fixed.records[:] = (
        records[: stop_after or 0] + [KeyboardInterrupt if stop_after else None] + records[stop_after or 0 :]
    )
    if not stop_after:
        return train(args)
    with pytest.raises(KeyboardInterrupt):
        train(args)
    return train(load_args("run"))


def logged(tag):
    return [float(value) for _, name, value in metrics("run") if name == tag]


def check_lags(end, lags, steps, since_the_last_log):
    """What a run reports of rollouts: how many updates old each was (None: dropped), and its transitions."""
    fresh = [(lag, n) for lag, n in zip(lags, steps) if lag is not None]
    histogram = {lag: sum(n for each, n in fresh if each == lag) for lag in sorted({lag for lag, _ in fresh})}
    learned = sum(histogram.values())
    assert end["lag_histogram"] == histogram and end["lag_max"] == max(histogram)
    assert (end["env_steps"], end["dropped"]) == (sum(steps), sum(steps) - learned)
    assert end["lag_mean"] == pytest.approx(sum(lag * n for lag, n in fresh) / learned)
    shares = [[(lag, n) for lag, n in share if lag is not None] or [(0, 1)] for share in since_the_last_log]
    means = [sum(lag * n for lag, n in share) / sum(n for _, n in share) for share in shares]
    assert logged("lag/mean") == pytest.approx(means)
    assert logged("lag/max") == [max(lag for lag, _ in share) for share in shares]
    assert logged("lag/dropped")[-1] == end["dropped"]


TOO_OLD = None
BY_HAND = [  # of eight rollouts that two make an update of: the versions are 0, 0, 0, 1, 0, 2, 2, 3
    (None, [(0, 1), (2, 3), (4, 5), (6, 7)], [0, 0, 1, 0, 2, 0, 1, 0]),
    (1, [(0, 1), (2, 3), (5, 6)], [0, 0, 1, 0, TOO_OLD, 0, 0, 0]),
]


@pytest.mark.parametrize("stop_after", [None, 4])
@pytest.mark.parametrize("flags", [{"critic_lr": 1e-2}, {"network": "shared", "lr_decay": False, "max_grad_norm": 0.1}])
@pytest.mark.parametrize("max_lag, batches, lags", BY_HAND, ids=["every rollout", "--max-lag 1"])
def test_a_pooled_run_is_a2cs_updates_on_rollouts_side_by_side(
    workdir, fixed, max_lag, batches, lags, flags, stop_after
):
    """On fixed rollouts: which are learned from, at which rates, and how old they were (D6, D7); in one run, or two."""
    torch.manual_seed(0)
    flags = flags | {"actor_lr": 1e-3}
    args = Args(**(SHORT | flags | {"env_id": "toy_envs:Constant-v0", "num_steps": 4, "batch_size": 9}))
    rollouts, steps, records = [random_rollout(args, 2) for _ in lags], (8, 7, 5, 6, 8, 7, 8, 6), []
    for rollout, n, version in zip(rollouts, steps, (0, 0, 0, 1, 0, 2, 2, 3)):
        rollout.done[:] = 0
        rollout.done.view(-1)[: 8 - n] = 1
        records += [{"steps": n, "episodes": [], "version": version, "arrays": [x.numpy() for x in rollout]}]
    more = {"run_dir": "run", "max_lag": max_lag, "total_timesteps": sum(steps), "checkpoint_every": sum(steps[:4])}
    end = play(fixed, records, stop_after, dataclasses.replace(args, **more))

    torch.manual_seed(args.seed)
    agent = agent_of(args)
    optimizer, published = a2c_sync.make_optimizer(agent, a2c_sync.Args(**flags)), [weights_of(agent)]
    for batch in batches:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - args.lr_decay * sum(steps[: batch[0]]) / sum(steps))
        joined = Rollout(*(torch.cat([rollouts[i][field] for i in batch], 1) for field in range(5)))
        a2c_sync.update(agent, optimizer, joined, args)
        published.append(weights_of(agent))
    assert equal(checkpoint("run")["parts"]["agent"].values(), agent.state_dict().values())
    versions = [call if call == "start" else call[0] for call in fixed.calls]  # workers start with the newest
    assert versions == [0, "start", 1, 2, *([2, "start"] if stop_after else []), 3, 4][: -1 if max_lag else None]
    assert all(equal(call[1], published[call[0]]) for call in fixed.calls if call != "start")
    assert end["updates"] == len(batches)
    check_lags(end, lags, steps, [[(lags[i], steps[i]) for i in batch] for batch in batches])


@pytest.mark.parametrize("stop_after", [None, 3])
@pytest.mark.parametrize("max_lag", [None, 1])
def test_a_hogwild_run_counts_what_its_workers_have_learned(workdir, fixed, max_lag, stop_after):
    """In one run, or two: the counters that workers share go on, too, and RMSProp's statistics are shared."""
    lags, steps = [0, 3, 1, 0, 2, 0], [8, 7, 5, 6, 8, 3]
    same = {"episodes": [(0, 10.0, 10)], "metrics": {"actor_loss": 1.0}, "arrays": []}
    flags = {"env_id": "toy_envs:Constant-v0", "update": "hogwild", "checkpoint_every": 20, "run_dir": "run"}
    args = Args(**(SHORT | flags | {"max_lag": max_lag, "total_timesteps": sum(steps)}))
    end = play(fixed, [same | {"steps": n, "lag": lag} for n, lag in zip(steps, lags)], stop_after, args)
    _, begun_at, agent, optimizer, worker_steps, worker_updates = fixed.started
    assert worker_steps.sum() == begun_at == (20 if stop_after else 0) and worker_updates.sum() == end["updates"] == 6
    of_the_agent = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
    assert of_the_agent == {p.data_ptr() for p in agent.parameters()}
    parts = [*agent.parameters(), *(state["square_avg"] for state in optimizer.state.values())]
    assert len(parts) == 24 and all(x.is_shared() for x in (*parts, worker_steps, worker_updates))
    lags = [None if max_lag is not None and lag > max_lag else lag for lag in lags]
    check_lags(end, lags, steps, [[each] for each in zip(lags, steps)])
    assert logged("charts/episodic_length") == [10.0] * 6


# --- A worker, without its process ------------------------------------------------------------------------------------


class Scene:
    """A worker that ends after some records, which it keeps in `sent`; on_step(k, scene) comes before its k-th step."""

    def __init__(self, patch, update, records, on_step=lambda k, scene: None, index=0, generation=0, first=0, **flags):
        flags = {"num_workers": 2, "num_envs": 2, "num_steps": 4, "total_timesteps": 10**6} | flags
        self.args = Args(update=update, **flags)
        self.agent = agent_of(self.args).share_memory()
        self.optimizer = make_optimizer(self.agent, self.args)
        self.steps, self.updates = (shared(np.zeros(2, np.int64)) for _ in range(2))
        self.index, self.generation, self.at_exit = index, generation, ExitStack()
        self.records, self.on_step, self.version, self.num_steps = records, on_step, 0, 0
        self.sent, self.counted, Scene.latest = [], [], self
        patch.setattr(a3c_async, "make_envs", self.make_envs)
        hogwild = update == "hogwild"
        parts = (self.agent, self.optimizer, self.steps, self.updates) if hogwild else ()
        target = a3c_async.hogwild_worker if hogwild else a3c_async.pooled_worker
        with suppress(StopIteration), self.at_exit:
            target(self, self.args, first, *parts)

    def make_envs(self, *args):
        envs = make_envs(*args)
        step = envs.step

        def spied(actions):
            self.on_step(self.num_steps, self)
            self.num_steps += 1
            return step(actions)

        envs.step = spied
        return envs

    def next(self, module=None):
        if module is not None:
            copy_parameters(module.parameters(), self.agent.parameters())
        return self.version

    def send(self, arrays=(), **record):
        self.sent.append(record | {"arrays": [x.copy() for x in arrays]})
        self.counted.append(int(self.steps[self.index]))
        if len(self.sent) == self.records:
            raise StopIteration  # the end of the scene

    def disturb(self):
        with torch.no_grad():
            for p in self.agent.parameters():
                p.add_(0.01 * torch.randn_like(p))


@pytest.fixture
def scene(monkeypatch):
    return partial(Scene, monkeypatch)


@BOTH
def test_rollouts_follow_each_other_and_come_from_the_parameters_that_were_pulled(scene, monkeypatch, update):
    """What is published while one is under way is the next one's; hogwild learns from its own, at those parameters."""
    acted, learned, pulled, rollouts, act = [], [], [], [], a3c_async.act

    def spied_act(agent, envs, rollout):
        acted.append(weights_of(agent))
        yield from act(agent, envs, rollout)
        rollouts.append(Rollout(*(x.copy() for x in rollout)))

    def spied_update(agent, optimizer, batch, *rest):
        assert equal(agent.parameters(), acted[-1]) and equal(batch, map(torch.from_numpy, rollouts[-1]))
        learned.append(hogwild_update(agent, optimizer, batch, *rest))
        return learned[-1]

    def others(k, scene):
        if k % 4 == 0:  # the first step of a rollout: after the pull
            pulled.append(weights_of(scene.agent))
        scene.disturb()
        scene.version = k + 1

    monkeypatch.setattr(a3c_async, "act", spied_act)
    monkeypatch.setattr(a3c_async, "hogwild_update", spied_update)
    sent = scene(update, 5, others, actor_lr=0.01).sent
    assert len(acted) == len(rollouts) == 5 and all(map(equal, acted, pulled))
    assert all((r.rewards == 1 - r.done[:-1]).all() for r in rollouts)  # CartPole's: 1 but for resets
    assert all(
        (a.obs[-1] == b.obs[0]).all() and (a.done[-1] == b.done[0]).all() for a, b in zip(rollouts, rollouts[1:])
    )
    if update == "hogwild":
        assert [r["metrics"] for r in sent] == [{name: x.item() for name, x in found.items()} for found in learned]
    else:
        assert [r["version"] for r in sent] == [0, 4, 8, 12, 16]
        assert all((x == y).all() for r, rollout in zip(sent, rollouts) for x, y in zip(r["arrays"], rollout))


@pytest.mark.parametrize(
    "max_lag, updates_of_others, lags, applied",
    [(None, {0: 2, 2: 1, 9: 5}, [3, 0, 5, 0], [1, 1, 1, 1]), (1, {0: 2, 9: 1}, [2, 0, 1, 0], [0, 1, 1, 1])],
)
def test_hogwild_lag_is_the_updates_of_others_since_the_pull(scene, max_lag, updates_of_others, lags, applied):
    """More than --max-lag, and its gradient is not applied, nor counted as an update."""
    weights = []

    def others(k, scene):
        scene.updates[1] += updates_of_others.get(k, 0)
        weights.append(weights_of(scene.agent)) if k % 4 == 0 else None

    played = scene("hogwild", 4, others, max_lag=max_lag)
    weights.append(weights_of(played.agent))
    assert [record["lag"] for record in played.sent] == lags
    assert played.updates.tolist() == [sum(applied), sum(updates_of_others.values())]
    assert [not equal(*pair) for pair in zip(weights, weights[1:])] == [bool(each) for each in applied]


def test_updates_while_a_worker_copies_the_parameters_count_as_lag(scene, monkeypatch):
    """It may get them or not: the version is read before."""

    def copy(to, source):
        copy_parameters(to, source)
        Scene.latest.updates[1] += 1

    monkeypatch.setattr(a3c_async, "copy_parameters", copy)
    assert [record["lag"] for record in scene("hogwild", 4).sent] == [1, 1, 1, 1]


def test_steps_count_when_they_have_been_handed_over_and_resets_do_not(scene):
    """A worker killed between the two would otherwise leave steps that the main process waits for in vain."""
    played = scene("hogwild", 4)
    steps = [record["steps"] for record in played.sent]
    assert played.counted == [sum(steps[:k]) for k in range(4)] and sum(steps) > 12
    played = scene("hogwild", 4, env_id="toy_envs:OneStep-v0", num_steps=1)  # every second rollout is but a reset
    assert [record["steps"] for record in played.sent] == [1] * 4 and played.num_steps == 7 and played.updates[0] == 4
    assert [record["episodes"] for record in played.sent] == [[(0, 1.0, 1)]] * 4


def test_a_hogwild_worker_ends_when_there_are_enough_steps(scene):
    def others(k, scene):
        scene.steps[1] = 10**6 * (k >= 3)

    assert len(scene("hogwild", 100, others).sent) == 1


def test_workers_generations_and_resumed_runs_have_noise_of_their_own(scene):
    found = []
    for index, generation, first in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 100)):
        torch.manual_seed(0)  # the same networks
        sent = scene("pooled", 5, index=index, generation=generation, first=first).sent
        found.append((np.concatenate([r["arrays"][1] for r in sent]).tolist(), sent[0]["arrays"][0][0].tolist()))
    assert found[0] == found[1]
    for i in range(1, 5):
        assert all(found[i][part] != found[j][part] for j in range(i + 1, 5) for part in (0, 1))


@pytest.mark.parametrize("decay, share", [(True, 0.25), (False, 1.0)])
def test_hogwild_workers_lower_their_learning_rates(scene, decay, share):
    def others(k, scene):
        scene.steps[1] = 750_000  # of a million

    optimizer = scene("hogwild", 2, others, lr_decay=decay, actor_lr=1e-3, critic_lr=1e-2).optimizer
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3 * share, 1e-2 * share], rel=1e-3)


@BOTH
def test_worker_0_is_slower_at_every_step_by_the_seconds_of_the_flag(scene, monkeypatch, update):
    for index, seconds in ((0, 2.0), (1, 0.0)):
        slept = []
        monkeypatch.setattr(a3c_async, "time", SimpleNamespace(sleep=slept.append))
        scene(update, 3, index=index, slow_worker=0.5)
        assert slept == [seconds] * 3


# --- A run as a whole -------------------------------------------------------------------------------------------------


RUNS = [
    {"max_lag": 0},
    {"num_workers": 4, "num_envs": 12},
    {"num_steps": 1, "network": "shared", "ent_coef": 0.0, "gae_lambda": 1.0},
    {"env_id": "Pendulum-v1", "critic_lr": 1e-2, "lr_decay": False, "max_grad_norm": 0.5},
    {"env_id": "toy_envs:Images-v0", "network": "shared", "total_timesteps": 140},
]


@BOTH
@pytest.mark.parametrize("flags", RUNS, ids=str)
def test_flags(workdir, update, flags):
    """A run moves every weight (pitfall 22), counts every step, and leaves no process."""
    args, end = Args(**(SHORT | flags)), run(update=update, **flags)
    rollout = args.num_steps * args.num_envs // args.num_workers
    most = args.total_timesteps + rollout * (args.num_workers if update == "hogwild" else 1)
    assert args.total_timesteps <= end["env_steps"] < most and end["updates"] >= 3
    assert sum(end["lag_histogram"].values()) + end["dropped"] == end["env_steps"]
    assert end["dropped"] == 0 if args.max_lag is None else end["lag_max"] == 0
    assert not children(os.getpid())
    torch.manual_seed(args.seed)
    initial, trained = agent_of(args).state_dict(), checkpoint("run")["parts"]["agent"]
    assert all((trained[name] != initial[name]).any() for name in initial)
    assert {"episodic" in tag for _, tag, _ in metrics("run")} == {True, False}


def test_hogwild_statistics_and_weights_are_those_of_the_workers(workdir):
    """RMSProp's are made in shared memory before the workers start (pitfall 11)."""
    run(update="hogwild")
    states = checkpoint("run")["parts"]["optimizer"]["state"].values()
    assert len(states) == 12 and all((state["square_avg"] != 1).any() for state in states)


def test_a_lone_worker_is_at_most_one_update_behind(workdir):
    """It pulls when its last rollout has been taken, of which the update may be under way."""
    end = run(num_workers=1, num_envs=1, batch_size=1)
    assert end["updates"] > 100 and end["lag_max"] <= 1


def test_resume_goes_on_with_weights_statistics_and_counters(workdir, monkeypatch):
    """And with the flags given beside it: another ε, other workers."""
    made = []
    monkeypatch.setattr(a3c_async, "make_optimizer", lambda *args: made.append(make_optimizer(*args)) or made[-1])
    first, before = run(update="hogwild"), checkpoint("run")["parts"]
    more = {"rmsprop_eps": 1e-8, "num_workers": 3, "num_envs": 6}
    end = resume(total_timesteps=first["env_steps"] + 1, **more)  # a few rollouts more
    after = checkpoint("run")["parts"]
    assert end["env_steps"] > first["env_steps"] and end["updates"] > first["updates"]
    assert sum(end["lag_histogram"].values()) == end["env_steps"]
    assert [{group["eps"] for group in optimizer.param_groups} for optimizer in made] == [{1e-5}, {1e-8}]
    assert all(0 < (p - after["agent"][name]).abs().max() < 0.2 for name, p in before["agent"].items())
    squares = [parts["optimizer"]["state"][0]["square_avg"] for parts in (before, after)]
    assert (squares[1] - squares[0]).abs().max() < 0.2 < (1 - squares[1]).abs().max()  # not from the start again


@BOTH
def test_a_fault_of_every_worker_ends_the_run_with_its_traceback(workdir, update):
    with pytest.raises(UserError, match=r"(?s)workers died \d+ times in a row.*toy_envs.py.*RuntimeError: worn out"):
        run(env_id="toy_envs:WornOut-v0", update=update, num_steps=200, total_timesteps=10**6)
    assert not children(os.getpid()) and checkpoint("run")["env_steps"] == 0  # there is one to look at


# --- Slow: workers that hang and die, learning ------------------------------------------------------------------------


class Killer(threading.Thread):
    """Kills workers of this process at random moments; the one of number `stops` it only stops."""

    def __init__(self, num, delays, stops=None):
        super().__init__(daemon=True)
        self.num, self.delays, self.stops, self.killed = num, delays, stops, 0
        self.start()

    def run(self):
        rng = random.Random(0)
        while self.killed < self.num:
            time.sleep(rng.uniform(*self.delays))
            if Path("run/checkpoint.pt").exists() and (victims := children(os.getpid())):
                self.killed += 1
                os.kill(rng.choice(victims), signal.SIGSTOP if self.killed == self.stops else signal.SIGKILL)


@pytest.mark.slow
@BOTH
def test_killed_workers_cost_nothing_but_their_rollouts(workdir, capsys, update):
    """Every step is counted and all episodes are whole, though a worker hangs, too."""
    killer = Killer(4, (0.3, 0.8), stops=2)
    flags = {"num_workers": 4, "num_envs": 4, "worker_timeout": 1.5, "total_timesteps": 1_500}
    end = run(env_id="toy_envs:Slow-v0", update=update, **flags)
    assert killer.killed == 4 and end["workers_replaced"] >= 3
    assert 1_500 <= end["env_steps"] < 1_500 + 4 * 5 and sum(end["lag_histogram"].values()) == end["env_steps"]
    assert {value for _, tag, value in metrics("run") if tag == "charts/episodic_length"} == {"10"}
    assert "has ended with exit code -9" in capsys.readouterr().err


@pytest.mark.slow
@BOTH
def test_cartpole_is_solved_while_fifty_workers_are_killed(workdir, update):
    killer, total = Killer(50, (0.5, 1.5)), 5_000_000  # longer than fifty kills take
    end = train(Args(run_dir="run", update=update, total_timesteps=total))
    assert killer.killed == 50 and end["workers_replaced"] >= 45
    assert total <= end["env_steps"] < total + 32 * 8 and sum(end["lag_histogram"].values()) == end["env_steps"]
    assert end["eval_return_mean"] >= 475
