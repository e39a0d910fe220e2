"""--device cuda, where there is one: --compile replays CUDA graphs, and the ring buffer lies on the GPU."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from helpers import checkpoint
from test_compile import CASES, SHORT, random_batch, updates

import a2c_sync
import a3c_async
import sac
from common.compile import compiled
from common.ring_buffer import RingBuffer
from evaluate import load_args

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def on_gpu(batch):
    if isinstance(batch, tuple):
        return type(batch)(*(x.to(CUDA) for x in batch))
    vars(batch).update({name: x.to(CUDA) for name, x in vars(batch).items()})
    return batch


@pytest.mark.parametrize("case", CASES)
def test_replayed_updates_are_the_eager_ones(case):
    """Through recording and replay, with other batches and rates; each replay draws noise of its own."""
    script, flags, make = CASES[case]
    torch._dynamo.reset()
    torch.manual_seed(0)
    args, eager = script.Args(**flags), make()
    batches = [on_gpu(random_batch(eager)) for _ in range(5)]
    eager = eager.to(CUDA)
    agent = copy.deepcopy(eager)
    optimizers = script.make_optimizer(eager, args), script.make_optimizer(agent, args)
    update = compiled(script.update, CUDA)
    pairs = list(updates((script.update, update), (eager, agent), optimizers, batches, args, num=20))
    for wanted, found in pairs:  # read after all replays: what an update returned is its own
        assert found["critic_loss"].item() == pytest.approx(wanted["critic_loss"].item(), rel=0.02, abs=0.01)
    for p, q in zip(agent.parameters(), eager.parameters()):
        torch.testing.assert_close(p, q, rtol=0.02, atol=0.01)
    if script is not a2c_sync:  # whose update draws nothing
        optimizers[1].param_groups[0]["lr"] = optimizers[1].param_groups[1]["lr"] = 0.0
        same_batch = {update(agent, optimizers[1], batches[0], args)["actor_loss"].item() for _ in range(10)}
        assert len(same_batch) == 10


@pytest.mark.parametrize("script", SHORT, ids=lambda script: script.__name__)
@pytest.mark.parametrize("compile", [False, True])
def test_runs_on_a_gpu_resume(workdir, script, compile):
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 90, "checkpoint_every": 70, "eval_episodes": 1}
    flags |= SHORT[script] | {"compile": compile, "device": "cuda"}
    whole = script.train(script.Args(run_dir="whole", **flags))
    assert checkpoint("whole")["parts"]["agent"]["actor.head.weight"].device.type == "cuda"
    script.train(script.Args(run_dir="parts", **flags | {"total_timesteps": 70}))
    end = script.train(dataclasses.replace(load_args("parts"), total_timesteps=90))
    assert end["updates"] == whole["updates"]


def test_the_buffer_lies_on_the_gpu():
    buffer = RingBuffer(5, {"obs": ((2,), np.float32), "actions": ((), np.int64)}, CUDA)
    for k in range(7):
        buffer.add(np.ones(1, bool), obs=np.full((1, 2), k), actions=np.array([k]))
    batch = buffer.sample(100)
    assert batch.obs.device.type == "cuda" and set(batch.actions.tolist()) == {2, 3, 4, 5, 6}
    assert (batch.obs[:, 0] == batch.actions).all()
    other = RingBuffer(5, {"obs": ((2,), np.float32), "actions": ((), np.int64)}, CUDA)
    other.load_state_dict(buffer.state_dict())
    assert torch.equal(other.fields["obs"], buffer.fields["obs"]) and other.position == 2


def test_sac_learns_pendulum_on_a_gpu(workdir):
    end = sac.train(sac.Args(run_dir="run", total_timesteps=6_000, device="cuda", compile=True))
    assert end["eval_return_mean"] > -300


def test_a3cs_learner_on_a_gpu(workdir):
    """Its workers act on the CPU with what it publishes."""
    flags = {"update": "pooled", "num_workers": 2, "batch_size": 64, "total_timesteps": 3_000, "eval_episodes": 1}
    end = a3c_async.train(a3c_async.Args(run_dir="run", device="cuda", **flags))
    assert end["updates"] > 20 and end["env_steps"] >= 3_000
    assert checkpoint("run")["parts"]["agent"]["actor.head.weight"].device.type == "cuda"
    a3c_async.train(dataclasses.replace(load_args("run"), total_timesteps=4_000))
