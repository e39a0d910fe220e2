"""The ring buffer against a list, and what it takes (D8)."""

import io
import random
import runpy
import shutil
import sys
from collections import deque

import numpy as np
import pytest
import torch

from common import ring_buffer
from common.ring_buffer import RingBuffer


def rows(first, n):
    """Transitions first, first + 1, ..., recognizable in every field."""
    k = np.arange(first, first + n)
    image = (k % 256).astype(np.uint8)[:, None, None, None].repeat(2, 2).repeat(2, 3)
    return {"obs": np.stack([k, -k], 1).astype(np.float64), "image": image, "actions": k, "even": k % 2 == 0}


def filled(capacity, n):
    buffer = RingBuffer(capacity)
    buffer.add(np.ones(n, bool), **rows(0, n))
    return buffer


@pytest.mark.parametrize("trial", range(30))
def test_it_holds_what_a_list_would(trial):
    """D8: random capacities, batches and masks; wrapping around, before it is full, saved and loaded in between.

    Whole numbers keep their type, all else is float32.
    """
    rng = random.Random(trial)
    capacity = rng.randint(1, 12)
    buffer, model, count = RingBuffer(capacity), deque(maxlen=capacity), 0
    for _ in range(60):
        n = rng.randint(1, capacity)
        valid = np.array([rng.random() < 0.7 for _ in range(n)])
        buffer.add(valid, **rows(count, n))
        model.extend(np.arange(count, count + n)[valid])
        count += n
        assert buffer.size == len(model)
        if model and rng.random() < 0.2:
            state, buffer = buffer.state_dict(), RingBuffer(capacity)
            buffer.load_state_dict(state)
        stored = buffer.fields["actions"][: buffer.size]
        assert sorted(stored) == sorted(model)
        if model:  # the oldest one is where the next one goes, or first
            assert stored[buffer.position if buffer.size == capacity else 0] == model[0]
            batch = vars(buffer.sample(50))
            k = batch["actions"].numpy()
            assert set(k) <= set(model)
            assert all((batch[name].numpy() == values[k]).all() for name, values in rows(0, count).items())
            assert [x.dtype for x in batch.values()] == [torch.float32, torch.uint8, torch.int64, torch.float32]
            assert batch["obs"].shape == (50, 2) and batch["image"].shape == (50, 1, 2, 2)


def test_it_samples_all_of_it_evenly_and_with_replacement():
    torch.manual_seed(0)
    buffer = RingBuffer(10)
    for first in range(0, 14, 2):
        buffer.add(np.ones(2, bool), **rows(first, 2))
    counts = np.bincount(buffer.sample(100_000).actions, minlength=14)
    assert (counts[:4] == 0).all() and abs(counts[4:] - 10_000).max() < 500
    assert len(set(buffer.sample(10).actions.tolist())) < 10


def test_a_full_buffer_gives_another_batch_every_time():
    """And the same ones from the same state of torch's generator, which every checkpoint holds, and of no other."""
    buffer = filled(1000, 1000)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = [buffer.sample(8).actions for _ in range(20)]
    assert len({tuple(batch.tolist()) for batch in first}) == 20
    torch.set_rng_state(state)
    np.random.seed(5), random.seed(5)
    assert all(torch.equal(buffer.sample(8).actions, batch) for batch in first)
    torch.manual_seed(1)
    assert not torch.equal(buffer.sample(8).actions, first[0])


def test_batches_and_the_arrays_that_were_added_are_copies():
    buffer, values = RingBuffer(2), rows(0, 2)
    buffer.add(np.ones(2, bool), **values)
    values["obs"][:] = 7
    batch = buffer.sample(20)
    assert set(batch.obs[:, 0].tolist()) <= {0.0, 1.0}
    before = batch.obs.clone()
    buffer.add(np.ones(2, bool), **rows(5, 2))
    assert torch.equal(batch.obs, before)


def test_a_million_transitions_of_half_cheetah_take_172_mb_when_full_and_say_so(capsys):
    row = {"obs": (17,), "actions": (6,), "next_obs": (17,), "rewards": (), "terminated": (), "old_log_probs": ()}
    buffer = RingBuffer(1_000_000)
    buffer.add(np.ones(1, bool), **{name: np.zeros((1, *shape)) for name, shape in row.items()})
    assert sum(field.nbytes for field in buffer.fields.values()) == 172e6
    assert capsys.readouterr().err == "replay buffer: 1,000,000 transitions, 172 MB when full\n"


def test_a_checkpoint_holds_what_is_filled_and_fits_this_capacity():
    state = filled(1000, 3).state_dict()
    assert all(len(x) == 3 for x in state["fields"].values())
    torch.save(state, file := io.BytesIO())  # which writes whole storages
    assert file.tell() < 5_000
    with pytest.raises(ValueError, match="room for 1000"):
        RingBuffer(1001).load_state_dict(state)


def test_its_file_works_alone(workdir, monkeypatch, capsys):
    """Copied into an empty folder, without common/: it keeps uint8, prints its size once, and resumes."""
    for name in [*sys.modules, "common"]:
        if name.partition(".")[0] == "common":
            monkeypatch.setitem(sys.modules, name, None)  # cannot be imported
    Alone = runpy.run_path(shutil.copy(ring_buffer.__file__, workdir))["RingBuffer"]
    buffers = [Alone(4), Alone(4)]
    buffers[1].load_state_dict(buffers[0].state_dict())  # of a run that was stopped before its first step
    for first, valid in ((0, False), (0, True), (3, True)):
        buffers[1].add(np.full(3, valid), **rows(first, 3))
    assert capsys.readouterr().err == "replay buffer: 4 transitions, 0 MB when full\n"
    buffers[0].load_state_dict(buffers[1].state_dict())
    for buffer in buffers:
        assert sorted(buffer.fields["actions"].tolist()) == [2, 3, 4, 5] and buffer.fields["image"].dtype == torch.uint8
        buffer.add(np.ones(1, bool), **rows(6, 1))
        assert buffer.fields["image"].flatten(1)[:, 0].tolist() == [4, 5, 6, 3]
