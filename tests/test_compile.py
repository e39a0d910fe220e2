"""--compile: one graph, the same numbers to rounding, the same checkpoints."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from helpers import checkpoint, metrics, same

import off_policy_ac
import sac
from common.compile import GraphAdam, compiled
from evaluate import load_args

SHORT = {"total_timesteps": 90, "learning_starts": 50, "batch_size": 16, "eval_episodes": 1, "num_threads": 1}
CASES = {
    "sac": (sac, {}, lambda: sac.ActorCritic(3, 2, 2, 1.0)),
    "sac score": (sac, {"estimator": "score", "num_action_samples": 3}, lambda: sac.ActorCritic(3, 2, 2, 0.3)),
    "discrete": (off_policy_ac, {}, lambda: off_policy_ac.ActorCritic(3, 2, True, True)),
    "box": (off_policy_ac, {"actor_actions": "importance"}, lambda: off_policy_ac.ActorCritic(3, 2, False, True)),
}


def random_batch(agent, B=32):
    actions = torch.randint(2, (B,)) if getattr(agent.actor, "log_std", 0) is None else torch.rand(B, 2) * 2 - 1
    return SimpleNamespace(
        obs=torch.randn(B, 3), actions=actions, old_log_probs=-torch.rand(B), rewards=torch.randn(B),
        next_obs=torch.randn(B, 3), terminated=(torch.rand(B) < 0.1).float(),
    )  # fmt: skip


def test_adam_for_graphs_is_adam():
    """On one optimizer's state, step by step, with rates that change; either may go on where the other stopped."""
    torch.manual_seed(0)
    ours = torch.nn.Linear(5, 4)
    theirs = copy.deepcopy(ours)
    optimizers = [
        torch.optim.Adam([{"params": [m.weight], "lr": 1e-2}, {"params": [m.bias], "lr": 1e-3}], fused=True)
        for m in (ours, theirs)
    ]
    graph = GraphAdam(optimizers[0])
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
    assert states[0][0]["step"] == states[1][0]["step"] == 40


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
    for k in range(200):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 3e-4 * (1 - k / 200)
        torch.manual_seed(k)
        wanted = script.update(eager, optimizers[0], batches[k % 10], args)
        torch.manual_seed(k)
        found = update(agent, optimizers[1], batches[k % 10], args)
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
@pytest.mark.parametrize("script", [sac, off_policy_ac], ids=["sac", "off_policy_ac"])
def test_a_run_may_be_resumed_compiled_or_not(workdir, script):
    """Bit-identical compiled against compiled; and a checkpoint of either goes on as the other."""
    flags = SHORT | {"env_id": "Pendulum-v1", "checkpoint_every": 70, "compile": True}
    script.train(script.Args(run_dir="whole", **flags))
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
    whole, parts = checkpoint("whole"), checkpoint("parts")
    assert same(whole["parts"], parts["parts"]) and metrics("whole") == metrics("parts")
    for compile in (False, True):
        end = script.train(dataclasses.replace(load_args("parts"), compile=compile, total_timesteps=100 + 10 * compile))
        assert end["updates"] == 50 + 10 * compile
