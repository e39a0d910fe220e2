"""--device cuda, where there is one: --compile replays CUDA graphs, and the ring buffer lies on the GPU."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import checkpoint
from test_compile import CASES, SHORT, compare

import a2c_sync
import a3c_async
import sac
from common.ring_buffer import RingBuffer
from evaluate import load_args

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("case", CASES)
def test_replayed_updates_are_the_eager_ones(case):
    """Through recording and replay, with other batches and rates; each replay draws noise of its own."""
    draws = CASES[case][0] is not a2c_sync
    # A replay may take other random numbers than the update that it recorded; one that makes no step is off by 1
    script, update, agent, optimizer, batch, args, _ = compare(case, 20, 0.5 if draws else 0.05, "cuda")
    if draws:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        same_batch = {update(agent, optimizer, batch, args)["actor_loss"].item() for _ in range(10)}
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
    """It wraps around, keeps types, samples from what is newest, and goes through a checkpoint."""
    buffer, other = RingBuffer(5, "cuda"), RingBuffer(5, "cuda")
    for k in range(7):
        buffer.add(np.ones(1, bool), obs=np.full((1, 2), k, np.float32), actions=np.array([k]))
    batch = buffer.sample(100)
    assert batch.obs.device.type == batch.actions.device.type == "cuda" and batch.actions.dtype == torch.int64
    assert set(batch.actions.tolist()) == {2, 3, 4, 5, 6} and (batch.obs[:, 0] == batch.actions).all()
    other.load_state_dict(buffer.state_dict())
    assert torch.equal(other.fields["obs"], buffer.fields["obs"]) and (other.position, other.size) == (2, 5)


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
