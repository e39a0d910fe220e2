"""--compile: one graph, the same numbers to rounding, the same checkpoints."""

import copy
import dataclasses
import os
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from conftest import ROOT, finish, start
from helpers import checkpoint, metrics, same, wait_for

import a2c_sync
import off_policy_ac
import sac
from common.compile import GraphOptimizer, compiled
from common.optim import RMSpropA3C
from evaluate import load_args

CLIPPED = {"max_grad_norm": 0.5, "optimizer": "adam", "network": "shared"}
SHORT = {
    a2c_sync: {"num_envs": 1, "num_steps": 5},
    off_policy_ac: {"learning_starts": 50, "batch_size": 16},
    sac: {"learning_starts": 50, "batch_size": 16},
}
CASES = {
    "sac": (sac, {}, lambda: sac.ActorCritic(3, 2, 2, 1.0)),
    "sac score": (sac, {"estimator": "score", "num_action_samples": 3}, lambda: sac.ActorCritic(3, 2, 2, 0.3)),
    "discrete": (off_policy_ac, {}, lambda: off_policy_ac.ActorCritic(3, 2, True, True)),
    "a2c": (a2c_sync, {}, lambda: a2c_sync.ActorCritic((3,), 2, True, False)),
    "a2c box": (a2c_sync, CLIPPED, lambda: a2c_sync.ActorCritic((3,), 2, False, True)),
    "a2c pixels": (a2c_sync, {"network": "shared"}, lambda: a2c_sync.ActorCritic((2, 36, 36), 2, True, True)),
    "box": (off_policy_ac, {"actor_actions": "importance"}, lambda: off_policy_ac.ActorCritic(3, 2, False, True)),
}


def random_batch(agent, B=32):
    actions = torch.randint(2, (B,)) if getattr(agent.actor, "log_std", 0) is None else torch.rand(B, 2) * 2 - 1
    if isinstance(agent, a2c_sync.ActorCritic):
        return random_rollout(agent, actions)
    return SimpleNamespace(
        obs=torch.randn(B, 3), actions=actions, old_log_probs=-torch.rand(B), rewards=torch.randn(B),
        next_obs=torch.randn(B, 3), terminated=(torch.rand(B) < 0.1).float(),
    )  # fmt: skip


def random_rollout(agent, actions, T=4, N=8):
    images = any(isinstance(module, torch.nn.Conv2d) for module in agent.modules())
    obs = torch.randint(256, (T + 1, N, 2, 36, 36), dtype=torch.uint8) if images else torch.randn(T + 1, N, 3)
    actions, done = actions.view(T, N, *actions.shape[1:]), (torch.rand(T + 1, N) < 0.1).float()
    return a2c_sync.Rollout(obs, actions, torch.randn(T, N), done[1:] * (torch.rand(T, N) < 0.5), done)


def updates(functions, agents, optimizers, batches, args, num):
    """What each of the functions gives for the same batch and noise, with rates that fall; `num` times."""
    for k in range(num):
        metrics = []
        for update, agent, optimizer in zip(functions, agents, optimizers):
            for group in optimizer.param_groups:
                group["lr"] = 3e-4 * (1 - k / num)
            torch.manual_seed(k)
            metrics.append(update(agent, optimizer, batches[k % len(batches)], args))
        yield metrics


@pytest.mark.parametrize("Optimizer", [partial(torch.optim.Adam, fused=True), RMSpropA3C])
def test_an_optimizer_for_graphs_is_the_optimizer(Optimizer):
    """On one optimizer's state, step by step, with rates that change; either may go on where the other stopped."""
    torch.manual_seed(0)
    ours = torch.nn.Linear(5, 4)
    theirs = copy.deepcopy(ours)
    optimizers = [
        Optimizer([{"params": [m.weight], "lr": 1e-2}, {"params": [m.bias], "lr": 1e-3}]) for m in (ours, theirs)
    ]
    graph = GraphOptimizer(optimizers[0])
    for k in range(40):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (k + 1)
        x = torch.randn(8, 5)
        for module, optimizer in ((ours, graph if k % 20 < 10 else optimizers[0]), (theirs, optimizers[1])):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            graph.take_rates()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys() and states[0][0].keys() == states[1][0].keys()
    assert states[0][0].get("step") == states[1][0].get("step")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_update_is_one_graph_and_the_eager_one_to_rounding(case):
    """Over 200 updates with learning rates that fall and an α that is learned: no break, nothing compiled anew."""
    script, flags, make = CASES[case]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    args, eager = script.Args(**flags), make()
    agent = copy.deepcopy(eager)
    batches = [random_batch(agent) for _ in range(10)]
    optimizers = script.make_optimizer(eager, args), script.make_optimizer(agent, args)
    update, seen = compiled(script.update, torch.device("cpu")), set()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    pairs = updates((script.update, update), (eager, agent), optimizers, batches, args, num=200)
    for k, (wanted, found) in enumerate(pairs):
        assert found.keys() == wanted.keys()
        if k < 50:
            for name in wanted:
                torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-3)
        seen.add(found["actor_loss"].item())
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] - before == 1 and not counters["graph_break"]
    assert len(seen) == 200  # every call draws its own noise
    for p, q in zip(agent.parameters(), eager.parameters()):
        torch.testing.assert_close(p, q, rtol=0.02, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("script", SHORT, ids=lambda script: script.__name__)
def test_a_run_may_be_resumed_compiled_or_not(workdir, script):
    """Bit-identical compiled against compiled; and a checkpoint of either goes on as the other."""
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 90, "checkpoint_every": 70, "eval_episodes": 1}
    flags |= SHORT[script] | {"compile": True}
    whole = script.train(script.Args(run_dir="whole", **flags))
    original = script.Run.finish

    def stop(run, **_):
        raise KeyboardInterrupt

    script.Run.finish = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            script.train(script.Args(run_dir="parts", **flags))
    finally:
        script.Run.finish = original
    assert checkpoint("parts")["env_steps"] == 70
    script.train(load_args("parts"))
    assert same(checkpoint("whole")["parts"], checkpoint("parts")["parts"]) and metrics("whole") == metrics("parts")
    for compile in (False, True):
        end = script.train(dataclasses.replace(load_args("parts"), compile=compile, total_timesteps=100 + 10 * compile))
        assert end["updates"] - whole["updates"] == (10 + 10 * compile) // (5 if script is a2c_sync else 1)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, 4, 8])
def test_ctrl_c_while_the_update_is_compiled(workdir, monkeypatch, seconds):
    """It comes to the C++ compiler, too, whose end would be the run's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(workdir.parent / "cache"))  # empty; torch wants no space in it
    process = start(
        ROOT / "a2c_sync.py", "--compile", "--run-dir", "run", cwd=workdir, real=True, start_new_session=True
    )
    wait_for(lambda: Path("run/checkpoint.pt").exists())
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130 and err.count("Stopped at environment step") == 1 and "Traceback" not in err
    assert "No episode" not in err
