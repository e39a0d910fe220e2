"""a3c_async.py: what its updates are made of, how old that is, and a run as a whole with workers that die."""

import json
import math
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
from a3c_async import STEPS, UPDATES, ActorCritic, Args, gradient_step, loss_fn, train
from common.envs import make_envs
from common.errors import UserError
from common.optim import RMSpropA3C
from common.workers import Snapshot, shared

SCRIPT = ROOT / "a3c_async.py"
SHORT = {"update": "pooled", "num_workers": 2, "envs_per_worker": 1, "num_steps": 5, "batch_size": 32}
SHORT |= {"total_timesteps": 600, "eval_episodes": 2}
BOTH = pytest.mark.parametrize("update", ["pooled", "hogwild"])


def run(**flags):
    return train(Args(**({"run_dir": "run"} | SHORT | flags)))


def make_agent(args=Args(), env_id="CartPole-v1"):
    envs = make_envs(Args(env_id=env_id), 1)
    return ActorCritic(envs.single_observation_space, envs.single_action_space, args)


# --- Updates ----------------------------------------------------------------------------------------------------------


def test_k_pushes_are_k_gradients_and_rmsprop_steps_written_out_by_hand():
    """Pitfall 10: a worker that did not clear its own gradients would hand over 1, 2, 3, ... times the first."""
    torch.manual_seed(0)
    shared_agent, agent = make_agent().share_memory(), make_agent()
    optimizer = RMSpropA3C([{"params": list(shared_agent.parameters())}], lr=0.01)
    theta = [p.detach().clone() for p in shared_agent.parameters()]
    g = [torch.ones_like(p) for p in theta]
    for k in range(4):
        a3c_async.copy_parameters(agent.parameters(), shared_agent.parameters())
        obs = torch.randn(6, 4)
        loss = agent.critic(obs).square().mean() + (k + 1) * agent.actor(obs).entropy().mean()
        grads = torch.autograd.grad(loss, list(agent.parameters()), retain_graph=True)
        a3c_async.backward(loss, agent)
        gradient_step(agent, shared_agent, optimizer, math.inf)
        for p, square, grad in zip(theta, g, grads):
            square.mul_(0.99).add_(0.01 * grad**2)
            p.sub_(0.01 * grad / (square + 1e-5).sqrt())
    for p, expected in zip(shared_agent.parameters(), theta):
        torch.testing.assert_close(p.detach(), expected)


def weights_of(agent):
    return {name: p.detach().clone() for name, p in agent.state_dict().items()}


def optimizer_of(agent, args):
    """RMSProp with a group for each network, as in both scripts."""
    networks = [agent] if args.network == "shared" else [agent.actor, agent.critic]
    return RMSpropA3C([{"params": list(network.parameters()), "lr": args.actor_lr} for network in networks])


def a2c_agent(args):
    envs = make_envs(args, 1)
    return a2c_sync.ActorCritic(envs.single_observation_space, envs.single_action_space, args)


def a2c_loss(agent, rollout, args):
    """Loss of a rollout with a2c_sync.py's equations."""
    obs, actions, rewards, terminated, done = rollout
    valid = 1 - done[:-1]
    features = agent.trunk(obs)
    values = agent.critic(features)
    advantages, returns = a2c_sync.gae(values.detach(), rewards, terminated, done[1:], args.gamma, args.gae_lambda)
    policy = agent.actor(features[:-1])
    loss = a2c_sync.actor_loss_fn(policy.log_prob(actions), advantages, policy.entropy(), args.ent_coef, valid)
    return loss + args.value_coef * a2c_sync.critic_loss_fn(values[:-1], returns, valid)


def record_losses(monkeypatch):
    """What every update in this process learns from, and the parameters before it."""
    records, original = [], loss_fn

    def record(agent, *rollout_and_args):
        weights = weights_of(agent)
        records.append((weights, [x.clone() for x in rollout_and_args[:-1]]))
        return original(agent, *rollout_and_args)

    monkeypatch.setattr(a3c_async, "loss_fn", record)
    return records


@pytest.mark.parametrize(
    "flags", [{}, {"network": "shared"}, {"env_id": "Pendulum-v1"}, {"max_grad_norm": 0.1}], ids=str
)
def test_one_workers_pooled_update_is_a2c_syncs(workdir, monkeypatch, flags):
    """The same transitions and weights: the same weights after the update, through a2c_sync.train's own equations."""
    records = record_losses(monkeypatch)
    flags = {"num_workers": 1, "num_steps": 8, "batch_size": 1, "lr_decay": False, "ent_coef": 0.03} | flags
    flags["actor_lr"] = 0.01
    run(total_timesteps=100, **flags)
    args = a2c_sync.Args(
        ent_coef=0.03,
        actor_lr=0.01,
        **{k: v for k, v in flags.items() if k in ("network", "env_id", "max_grad_norm")},
    )
    agent = a2c_agent(args)
    optimizer = optimizer_of(agent, args)
    assert len(records) > 8
    for (weights, rollout), (after, _) in zip(records, records[1:]):
        agent.load_state_dict(weights)
        loss = a2c_loss(agent, rollout, args)
        a2c_sync.gradient_step(optimizer, loss, args.max_grad_norm)
        agent.actor.bound_std()
        for name, expected in agent.state_dict().items():
            torch.testing.assert_close(after[name], expected)


@pytest.mark.parametrize("batch_size, num_steps", [(1, 1), (32, 5), (7, 3)])
def test_a_pooled_update_has_whole_rollouts_of_consecutive_transitions(workdir, monkeypatch, batch_size, num_steps):
    """toy_envs:Counting shows (episode, step): every s' follows its s, and resets are in no loss (pitfalls 3 to 5)."""
    records = record_losses(monkeypatch)
    end = run(env_id="toy_envs:Counting-v0", batch_size=batch_size, num_steps=num_steps, total_timesteps=300)
    learned = 0
    for _, (obs, actions, rewards, terminated, done) in records:
        valid = done[:-1] == 0
        assert batch_size <= valid.sum() < batch_size + num_steps
        assert obs.shape[:2] == done.shape == (num_steps + 1, actions.shape[1])
        episode, step = obs[..., 0], obs[..., 1]
        assert (episode[1:] == episode[:-1])[valid].all() and (step[1:] == step[:-1] + 1)[valid].all()
        assert (rewards == step[1:])[valid].all()
        assert (episode[1:] == episode[:-1] + 1)[~valid].all() and (step[1:] == 0)[~valid].all()
        learned += int(valid.sum())
    assert end["updates"] == len(records) and end["env_steps"] - batch_size - num_steps < learned <= end["env_steps"]


@pytest.mark.parametrize("flags", [{}, {"network": "shared"}, {"max_grad_norm": 0.1}], ids=str)
def test_a_hogwild_workers_update_is_a2c_syncs(monkeypatch, flags):
    """Of its own rollout, at the parameters that it pulled; others move the shared ones while it acts."""
    records, pulled, moved = record_losses(monkeypatch), [], []

    def on_beat(beat, agent, snapshot, counts):
        if beat % 4 == 0:  # the first step of a rollout: after the pull
            pulled.append(weights_of(agent))
        if beat % 4 == 3:  # the last: what others have added
            with torch.no_grad():
                for p in agent.parameters():
                    p.add_(0.01 * torch.randn_like(p))
            moved.append(weights_of(agent))

    torch.manual_seed(0)
    scripted("hogwild", on_beat, 5, lr_decay=False, actor_lr=0.01, ent_coef=0.03, **flags)
    args = a2c_sync.Args(actor_lr=0.01, ent_coef=0.03, **flags)
    agent = a2c_agent(args)
    optimizer = optimizer_of(agent, args)
    assert len(records) == len(moved) == 5
    for (weights, rollout), before, others, after in zip(records, pulled, moved, pulled[1:]):
        assert (rollout[2] == 1 - rollout[4][:-1]).all()  # rewards: 1 but for resets
        for name, p in before.items():
            assert torch.equal(weights[name], p) and not torch.equal(others[name], p)
        agent.load_state_dict(weights)
        optimizer.zero_grad()
        a2c_loss(agent, rollout, args).backward()
        agent.load_state_dict(others)
        a3c_async.gradient_step(agent, agent, optimizer, args.max_grad_norm)
        for name, p in agent.state_dict().items():
            torch.testing.assert_close(p, after[name])


def test_hogwild_statistics_and_weights_are_those_of_the_workers(workdir):
    run(update="hogwild", num_workers=2)
    optimizer = checkpoint("run")["parts"]["optimizer"]
    moved = [(state["square_avg"] != 1).any() for state in optimizer["state"].values()]
    assert len(moved) == 12 and all(moved)
    torch.manual_seed(1)
    initial = make_agent().state_dict()
    assert all((p != initial[name]).any() for name, p in checkpoint("run")["parts"]["agent"].items())


# --- Lag --------------------------------------------------------------------------------------------------------------


class Scripted:
    """A worker of which every beat does what it is told, and which ends after some records."""

    index, life = 0, 0

    def __init__(self, on_beat, records):
        self.on_beat, self.records, self.beats = on_beat, records, -1
        self.sent, self.counted, self.counts = [], [], None

    def owns(self, envs):
        return envs

    def beat(self):
        if self.beats >= 0:  # the first says that the environments stand
            self.on_beat(self.beats)
        self.beats += 1

    def wait(self):
        pass

    def send(self, **record):
        self.sent.append({name: torch.as_tensor(value).numpy().copy() for name, value in record.items()})
        self.counted.append(int(self.counts[STEPS, 0]))
        if len(self.sent) == self.records:
            raise EndOfScript


class EndOfScript(Exception):
    pass


def scripted(*args, **flags):
    """What work() hands over, the optimizer and the counts, after so many records."""
    worker, optimizer, counts = scripted_worker(*args, **flags)
    return worker.sent, optimizer, counts


def scripted_worker(update, on_beat, records, index=0, life=0, start=0, **flags):
    args = Args(update=update, envs_per_worker=1, num_steps=4, total_timesteps=10**6, **flags)
    agent = make_agent(args).share_memory()
    optimizer, snapshot = optimizer_of(agent, args), Snapshot(agent)
    counts = shared((2, 2), np.int64)
    worker = Scripted(lambda beat: on_beat(beat, agent, snapshot, counts), records)
    worker.index, worker.life, worker.counts = index, life, counts
    with pytest.raises(EndOfScript):
        a3c_async.work(worker, args, start, agent, snapshot, optimizer, counts)
    return worker, optimizer, counts


def test_pooled_transitions_know_the_version_that_made_them():
    """A version published while a rollout is under way counts from the next one."""

    def publish(beat, agent, snapshot, counts):
        if beat in (1, 3, 9):  # twice in the first rollout, never in the second, once in the third
            snapshot.publish(agent, beat)

    sent, _, _ = scripted("pooled", publish, 4)
    assert [int(record["version"]) for record in sent] == [0, 3, 3, 9]


def test_hogwild_lag_is_the_updates_of_others_since_the_pull():
    def others(beat, agent, snapshot, counts):
        counts[UPDATES, 1] += {0: 2, 2: 1, 9: 5}.get(beat, 0)

    sent, _, counts = scripted("hogwild", others, 4)
    assert [int(record["lag"]) for record in sent] == [3, 0, 5, 0]
    assert counts[UPDATES].tolist() == [4, 8]


def test_steps_count_when_they_have_been_handed_over():
    """A worker killed between the two would otherwise leave steps that the main process waits for in vain."""
    worker, _, _ = scripted_worker("hogwild", lambda *_: None, 4)
    steps = [int(record["steps"]) for record in worker.sent]
    assert worker.counted == [sum(steps[:k]) for k in range(4)] and sum(steps) > 12


def test_workers_lives_and_resumed_runs_have_noise_of_their_own():
    found = []
    for index, life, start in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 100)):
        torch.manual_seed(0)  # the same networks
        records, _, _ = scripted("pooled", lambda *_: None, 5, index=index, life=life, start=start)
        found.append((np.concatenate([r["actions"] for r in records]).tolist(), records[0]["obs"][0].tolist()))
    assert found[0] == found[1]
    for i in range(1, 5):
        for j in range(i + 1, 5):
            assert found[i][0] != found[j][0] and found[i][1] != found[j][1]


def test_hogwild_workers_lower_their_learning_rates():
    def others(beat, agent, snapshot, counts):
        counts[STEPS, 1] = 750_000  # of a million

    flags = {"actor_lr": 1e-3, "critic_lr": 1e-2}
    for decay, share in ((True, 0.25), (False, 1.0)):
        _, optimizer, _ = scripted("hogwild", others, 2, lr_decay=decay, **flags)
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
    calls, publish, begin = [], Snapshot.publish, a3c_async.Workers.start
    monkeypatch.setattr(Snapshot, "publish", lambda s, m, version: calls.append(version) or publish(s, m, version))
    monkeypatch.setattr(a3c_async.Workers, "start", lambda w, *args: calls.append("start") or begin(w, *args))
    end = train(Args(resume="run", total_timesteps=900))
    assert calls[:3] == [before["updates"], "start", before["updates"] + 1]
    assert end["lag_max"] < before["updates"]


def test_hogwild_drops_what_is_too_old():
    def others(beat, agent, snapshot, counts):
        counts[UPDATES, 1] += {0: 2, 9: 1}.get(beat, 0)
        weights.append(agent.actor.head.weight.detach().clone())

    weights = []
    sent, _, counts = scripted("hogwild", others, 3, max_lag=1)
    assert [int(record["lag"]) for record in sent] == [2, 0, 1] and counts[UPDATES, 0] == 2
    assert torch.equal(weights[0], weights[4]) and not torch.equal(weights[4], weights[8])


@BOTH
@pytest.mark.parametrize("max_lag", [0, 1])
def test_max_lag(workdir, monkeypatch, update, max_lag):
    flags = {"env_id": "toy_envs:Slow-v0", "num_workers": 3, "batch_size": 10}  # slow: all take part
    records = record_losses(monkeypatch)
    end = run(update=update, max_lag=max_lag, **flags)
    histogram = Counter({int(lag): steps for lag, steps in end["lag_histogram"].items()})
    assert max(histogram) <= max_lag and (end["dropped"] > 0 or max_lag > 0)
    assert sum(histogram.values()) + end["dropped"] == end["env_steps"]
    if update == "pooled":  # hogwild's workers learn elsewhere
        learned = sum(int((1 - done[:-1]).sum()) for _, (*_, done) in records)
        assert sum(histogram.values()) - 15 < learned <= sum(histogram.values())
    assert end["lag_max"] == max(histogram) and end["lag_mean"] == pytest.approx(
        sum(lag * steps for lag, steps in histogram.items()) / sum(histogram.values())
    )


@BOTH
def test_lag_is_logged_and_a_slow_worker_raises_it(workdir, update):
    flags = {"env_id": "toy_envs:Slow-v0", "batch_size": 5, "total_timesteps": 200}
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
        {"env_id": "toy_envs:Images-v0", "network": "shared", "total_timesteps": 100},
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
    initial = make_agent(args, args.env_id).state_dict()
    after = checkpoint("run")["parts"]["agent"]
    assert end["updates"] >= 3 and all((after[name] != initial[name]).any() for name in after)
    assert {"episodic" in tag for _, tag, _ in metrics("run")} == {True, False}


def test_every_worker_has_its_own_environments_and_actions(workdir, monkeypatch):
    records = record_losses(monkeypatch)
    run(num_workers=3, envs_per_worker=2, batch_size=30, num_steps=5, env_id="Pendulum-v1", total_timesteps=200)
    firsts = torch.cat([rollout[0][0] for _, rollout in records])  # s_0 of every rollout and environment
    assert len(firsts.unique(dim=0)) == len(firsts) > 10


def test_resume_goes_on_with_weights_statistics_and_counters(workdir):
    first = run(update="hogwild")
    before = checkpoint("run")
    end = train(Args(resume="run", total_timesteps=first["env_steps"] + 1))  # one rollout more
    after = checkpoint("run")
    assert end["env_steps"] > first["env_steps"] and end["updates"] > first["updates"]
    assert sum(end["lag_histogram"].values()) == end["env_steps"]
    for name, p in before["parts"]["agent"].items():
        assert (p - after["parts"]["agent"][name]).abs().max() < 0.2  # not from the start again
    squares = [s["parts"]["optimizer"]["state"][0]["square_avg"] for s in (before, after)]
    assert (squares[1] - squares[0]).abs().max() < 0.2 < (1 - squares[1]).abs().max()
    end = train(Args(resume="run", total_timesteps=1200, num_workers=3))
    assert end["env_steps"] >= 1200
    for name, p in checkpoint("run")["parts"]["agent"].items():
        assert (p != after["parts"]["agent"][name]).any()


def test_epsilon_of_the_flag_is_the_optimizers_and_wins_on_resume(workdir, monkeypatch):
    steps, original = [], gradient_step

    def record(agent, shared_agent, optimizer, max_grad_norm):
        before = weights_of(shared_agent)
        original(agent, shared_agent, optimizer, max_grad_norm)
        p, square = shared_agent.critic.head.weight, optimizer.state[shared_agent.critic.head.weight]["square_avg"]
        moved, lr = (p - before["critic.head.weight"]).norm(), optimizer.param_groups[1]["lr"]
        steps.append((moved / (lr * p.grad / (square + epsilon).sqrt()).norm()).item())

    monkeypatch.setattr(a3c_async, "gradient_step", record)
    epsilon = 100.0
    run(rmsprop_eps=epsilon)
    assert steps == pytest.approx([1.0] * len(steps), rel=1e-3) and steps
    epsilon = 1e-8
    train(Args(resume="run", total_timesteps=1000, rmsprop_eps=epsilon))
    assert steps == pytest.approx([1.0] * len(steps), rel=1e-3)


def test_resume_with_another_number_of_environments(workdir):
    args = Args(run_dir="run", total_timesteps=200, eval_episodes=1)
    train(args)
    assert args.num_envs is args.envs_per_worker is None  # train() leaves the caller's flags alone
    for num_envs in (8, 4):
        train(Args(resume="run", total_timesteps=1000 - 100 * num_envs, num_envs=num_envs))
        assert json.loads(Path("run/args.json").read_text())["num_envs"] == num_envs
    with pytest.raises(UserError, match="--num-envs 6 is not 4 workers times the same number of environments"):
        train(Args(resume="run", num_envs=6))


@BOTH
def test_killed_workers_cost_nothing_but_their_rollouts(workdir, capsys, update):
    """SIGKILL and SIGSTOP at random moments; every step is counted and all episodes are whole."""
    killed = []

    def kill():
        rng = random.Random(0)
        while len(killed) < 4:
            time.sleep(rng.uniform(0.3, 1.0))
            if Path("run/checkpoint.pt").exists() and (victims := children(os.getpid())):
                killed.append(victims[rng.randrange(len(victims))])
                os.kill(killed[-1], signal.SIGSTOP if len(killed) == 2 else signal.SIGKILL)
        done.set()

    done = threading.Event()
    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    total = 3000
    end = run(env_id="toy_envs:Slow-v0", update=update, num_workers=4, worker_timeout=3.0, total_timesteps=total)
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
        UserError, match="(?s)every worker fails in the same place.*toy_envs.py.*RuntimeError: worn out"
    ):
        run(env_id="toy_envs:WornOut-v0", update=update, total_timesteps=10**6)
    assert time.time() - begin < 60 and not children(os.getpid())
    assert checkpoint("run")["env_steps"] == 0  # there is one to look at


@pytest.mark.parametrize(
    "update, how",
    [("pooled", signal.SIGINT), ("hogwild", signal.SIGTERM), ("pooled", signal.SIGKILL), ("hogwild", signal.SIGKILL)],
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
    time.sleep(5)  # until all have begun
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
        "--device cuda": "use --device cpu",
        "--num-envs 3 --num-workers 2": "not 2 workers times the same number of environments; give --envs-per-worker",
        "--num-envs 4 --envs-per-worker 3": "not 4 workers times 3 environments; give --envs-per-worker and --num-envs None",
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
        "--env-id CartPol-v1": "CartPole-v1",
    }.items(),
    ids=lambda value: value if value.startswith("--") else "",
)
def test_bad_input(workdir, monkeypatch, words, sentence):
    monkeypatch.setattr("sys.argv", ["a3c_async.py", *words.split()])
    with pytest.raises(SystemExit) as exit:
        a3c_async.run_cli(train, Args)
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
            time.sleep(rng.uniform(1.0, 3.0))
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
