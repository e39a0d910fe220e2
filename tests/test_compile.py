"""--compile: one graph, the same steps to rounding, the same checkpoints."""

import copy
import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from helpers import checkpoint, metrics, same

import a2c_sync
import off_policy_ac
import sac
from common.compile import GraphOptimizer, compiled
from common.optim import RMSpropA3C
from evaluate import load_args

SHORT = {
    a2c_sync: {"num_envs": 1, "num_steps": 5},
    off_policy_ac: {"learning_starts": 50, "batch_size": 16},
    sac: {"learning_starts": 50, "batch_size": 16},
}
# An entropy bonus of 5 drives σ to its bound, near which `make_pair` lets it begin
CLIPPED = {"max_grad_norm": 0.5, "optimizer": "adam", "network": "shared", "ent_coef": 5.0}
CASES = {
    "sac": (sac, {}, lambda s=sac: s.ActorCritic(3, 2, 2, 1.0)),
    "sac score": (sac, {"estimator": "score", "num_action_samples": 3}, lambda s=sac: s.ActorCritic(3, 2, 2, 0.3)),
    "discrete": (off_policy_ac, {}, lambda s=off_policy_ac: s.ActorCritic(3, 2, True, True)),
    "a2c": (a2c_sync, {}, lambda s=a2c_sync: s.ActorCritic((3,), 2, True, False)),
    "a2c box": (a2c_sync, CLIPPED, lambda s=a2c_sync: s.ActorCritic((3,), 2, False, True)),
    "a2c pixels": (a2c_sync, {"network": "shared"}, lambda s=a2c_sync: s.ActorCritic((2, 36, 36), 2, True, True)),
    "box": (off_policy_ac, {"actor_actions": "importance", "ent_coef": 5.0},
            lambda s=off_policy_ac: s.ActorCritic(3, 2, False, True)),
}  # fmt: skip


@pytest.fixture(params=["traced", pytest.param("compiled", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    """The graph as Dynamo finds it, which takes a second; and what inductor makes of it, which takes fifteen."""
    compile = torch.compile
    if request.param == "traced":
        monkeypatch.setattr(torch, "compile", lambda update, options, **how: compile(update, backend="eager", **how))


def random_batch(agent, B=32):
    actions = torch.randint(2, (B,)) if getattr(agent.actor, "log_std", 0) is None else torch.rand(B, 2) * 2 - 1
    if not hasattr(agent, "target_critic"):
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


def to(device, batch):
    if isinstance(batch, tuple):
        return type(batch)(*(x.to(device) for x in batch))
    return SimpleNamespace(**{name: x.to(device) for name, x in vars(batch).items()})


def assert_same_steps(before, found, wanted, tolerance):
    """Every parameter has moved, and as it should: to a share of the step, not of the parameter."""
    for (name, start), p, q in zip(before.items(), found, wanted, strict=True):
        step = (q - start).norm().item()
        assert step > 0 and (p - q).norm().item() <= tolerance * step, name


def compare(case, num, tolerance, device="cpu"):
    """`num` updates, compiled and not, of the same batches and noise, with rates that fall in every group."""
    script, flags, make = CASES[case]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    args, eager = script.Args(**flags), make().to(device)
    if at_bound := "ent_coef" in flags:
        eager.actor.log_std.data.fill_(0.999)
    agent, before = copy.deepcopy(eager), {name: p.detach().clone() for name, p in eager.named_parameters()}
    batches, pairs = [to(device, random_batch(agent)) for _ in range(10)], []
    optimizers = script.make_optimizer(eager, args), script.make_optimizer(agent, args)
    update = compiled(script.update, torch.device(device))
    for k in range(num):
        for each, learner, optimizer in ((script.update, eager, optimizers[0]), (update, agent, optimizers[1])):
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = (3e-4, 1e-3, 3e-3)[i] * (1 - k / num)
            torch.manual_seed(k)
            pairs.append(each(learner, optimizer, batches[k % len(batches)], args))
    for wanted, found in zip(pairs[::2], pairs[1::2]):  # read after all: what an update returned is its own
        assert found.keys() == wanted.keys()
        for name in wanted if device == "cpu" else ["critic_loss"]:  # a GPU's replay may draw other actions
            assert found[name].item() == pytest.approx(wanted[name].item(), rel=0.02, abs=0.01)
    assert_same_steps(before, agent.parameters(), eager.parameters(), tolerance)
    assert all(state.get("step", num) == num for state in optimizers[1].state.values())
    assert not at_bound or (agent.actor.log_std == 1).all()
    return script, update, agent, optimizers[1], batches[0], args, pairs[1::2]


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_update_is_one_graph_and_the_eager_one_to_rounding(backend, case):
    """With learning rates that fall, an α that is learned and σ at its bound: no break, nothing compiled anew."""
    *_, found = compare(case, num=40, tolerance=0.01)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert len({metrics["actor_loss"].item() for metrics in found}) == 40  # every call draws its own noise


def test_a_second_compiled_run_of_a_process_is_that_of_a_process_of_its_own(monkeypatch):
    """Torch takes a size that differs from an earlier run's for one that varies, and makes other kernels."""

    def look(graph, inputs):
        sizes.append([x for x in inputs if not isinstance(x, torch.Tensor)])
        return graph

    torch._dynamo.reset()
    sizes, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda update, options, **how: compile(update, backend=look, **how))
    for batch_size in (32, 16, 32):
        agent = sac.ActorCritic(3, 2, 2, 1.0)
        update, args = compiled(sac.update, torch.device("cpu")), sac.Args()
        update(agent, sac.make_optimizer(agent, args), random_batch(agent, batch_size), args)
    assert sizes == [[], [], []]


ADAM, RMSPROP = partial(torch.optim.Adam, fused=True, betas=(0.8, 0.95)), partial(RMSpropA3C, alpha=0.9)


@pytest.mark.parametrize("eps", [0.1, 1e-5])
@pytest.mark.parametrize("Optimizer", [ADAM, RMSPROP], ids=["Adam", "RMSpropA3C"])
def test_an_optimizer_for_graphs_is_the_optimizer(Optimizer, eps):
    """With rates that change in each group, and surprises, whose updates are clipped. Either goes on where the other
    stopped, as in a run that is resumed."""
    torch.manual_seed(0)
    ours = torch.nn.Linear(5, 4)
    theirs, before = copy.deepcopy(ours), {name: p.detach().clone() for name, p in ours.named_parameters()}
    optimizers = [Optimizer([{"params": [m.weight]}, {"params": [m.bias]}], lr=1.0, eps=eps) for m in (ours, theirs)]
    for k in range(40):
        if k % 20 == 0:  # on a new state, then on one that is old
            graph = GraphOptimizer(optimizers[0])
        for optimizer in optimizers:
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = (1e-2, 3e-3)[i] / (k + 1)
        graph.take_rates()
        x = torch.randn(8, 5) * (100 if k % 10 == 9 else 1)
        for module, optimizer in ((ours, graph if k % 20 < 10 else optimizers[0]), (theirs, optimizers[1])):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
        assert_same_steps(before, ours.parameters(), theirs.parameters(), 1e-5)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys() and states[0][0].keys() == states[1][0].keys()
    assert states[0][0].get("step") == states[1][0].get("step")


@pytest.mark.slow
@pytest.mark.parametrize("script", SHORT, ids=lambda script: script.__name__)
def test_a_run_may_be_resumed_compiled_or_not(workdir, monkeypatch, script):
    """Bit-identical compiled against compiled; and a checkpoint of either goes on as the other."""
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 90, "checkpoint_every": 70, "eval_episodes": 1}
    flags |= SHORT[script] | {"compile": True}
    whole = script.train(script.Args(run_dir="whole", **flags))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script.Run, "finish", lambda run, **_: exec("raise KeyboardInterrupt"))
        script.train(script.Args(run_dir="parts", **flags))
    assert checkpoint("parts")["env_steps"] == 70
    script.train(load_args("parts"))
    assert same(checkpoint("whole")["parts"], checkpoint("parts")["parts"]) and metrics("whole") == metrics("parts")
    for compile in (False, True):
        end = script.train(dataclasses.replace(load_args("parts"), compile=compile, total_timesteps=100 + 10 * compile))
        assert end["updates"] - whole["updates"] == (10 + 10 * compile) // (5 if script is a2c_sync else 1)
