"""The ring buffer against a list, and what it takes."""

import io
import random
from collections import deque

import numpy as np
import pytest
import torch

from common import ring_buffer
from common.flags import UserError
from common.ring_buffer import RingBuffer

FIELDS = {"obs": ((2,), np.float32), "image": ((1, 2, 2), np.uint8), "actions": ((), np.int64)}


def rows(first, n):
    """Transitions first, first + 1, ..., recognizable in every field."""
    k = np.arange(first, first + n)
    return {
        "obs": np.stack([k, -k], 1).astype(np.float32),
        "image": (k % 256).astype(np.uint8)[:, None, None, None].repeat(2, 2).repeat(2, 3),
        "actions": k,
    }


@pytest.mark.parametrize("trial", range(30))
def test_it_holds_what_a_list_would(trial):
    """Random capacities, batches and masks; wrapping around, before it is full, saved and loaded in between."""
    rng = random.Random(trial)
    capacity = rng.randint(1, 12)
    buffer, model, count = RingBuffer(capacity, FIELDS), deque(maxlen=capacity), 0
    for _ in range(60):
        n = rng.randint(1, capacity)
        valid = np.array([rng.random() < 0.7 for _ in range(n)])
        buffer.add(valid, **rows(count, n))
        model.extend(np.arange(count, count + n)[valid])
        count += n
        assert buffer.size == len(model)
        if rng.random() < 0.2:
            state, buffer = buffer.state_dict(), RingBuffer(capacity, FIELDS)
            buffer.load_state_dict(state)
        stored = buffer.fields["actions"][: buffer.size]
        assert sorted(stored) == sorted(model)
        if model:  # the oldest one is where the next one goes, or first
            assert stored[buffer.position if buffer.size == capacity else 0] == model[0]
            batch = buffer.sample(50)
            k = batch.actions.numpy()
            assert set(k) <= set(model) and all(
                (batch.__dict__[name].numpy() == rows(0, count)[name][k]).all() for name in FIELDS
            )
            assert batch.image.dtype == torch.uint8 and batch.obs.shape == (50, 2)


def test_it_samples_all_of_it_evenly():
    torch.manual_seed(0)
    buffer = RingBuffer(10, FIELDS)
    for first in range(0, 14, 2):
        buffer.add(np.ones(2, bool), **rows(first, 2))
    counts = np.bincount(buffer.sample(100_000).actions, minlength=14)
    assert (counts[:4] == 0).all() and abs(counts[4:] - 10_000).max() < 500


def test_a_full_buffer_gives_another_batch_every_time():
    """And the same ones from the same state of torch's generator, which every checkpoint holds, and of no other."""
    buffer = RingBuffer(1000, FIELDS)
    buffer.add(np.ones(1000, bool), **rows(0, 1000))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = [buffer.sample(8).actions for _ in range(20)]
    assert len({tuple(batch.tolist()) for batch in first}) == 20
    torch.set_rng_state(state)
    np.random.seed(5), random.seed(5)
    assert all(torch.equal(buffer.sample(8).actions, batch) for batch in first)
    torch.manual_seed(1)
    assert not torch.equal(buffer.sample(8).actions, first[0])


def test_a_batch_is_a_copy():
    buffer = RingBuffer(2, FIELDS)
    buffer.add(np.ones(2, bool), **rows(0, 2))
    batch = buffer.sample(20)
    before = batch.obs.clone()
    buffer.add(np.ones(2, bool), **rows(5, 2))
    assert torch.equal(batch.obs, before)


def test_memory_is_named_and_refused(monkeypatch, capsys):
    row = 2 * 4 + 4 + 8
    RingBuffer(1_000_000, FIELDS)
    assert "1,000,000 transitions, 20 MB" in capsys.readouterr().err
    monkeypatch.setattr(ring_buffer, "available_memory", lambda: 1000 * row)
    RingBuffer(1000, FIELDS)
    with pytest.raises(UserError, match=r"takes 0.0 GB and this machine has 0.0 GB free: --buffer-size 800 would fit"):
        RingBuffer(1001, FIELDS)


def test_a_million_images_with_successors_are_refused_here():
    """56 GB, pitfall 21."""
    image = ((4, 84, 84), np.uint8)
    if ring_buffer.available_memory() > 57e9:
        monster = 100_000_000
    else:
        monster = 1_000_000
    with pytest.raises(UserError, match="GB free"):
        RingBuffer(monster, {"obs": image, "next_obs": image})


def test_a_million_transitions_of_half_cheetah_take_less_than_200_mb():
    obs, number = ((17,), np.float32), ((), np.float32)
    fields = {"obs": obs, "actions": ((6,), np.float32), "next_obs": obs, "rewards": number, "terminated": number}
    buffer = RingBuffer(1_000_000, fields | {"old_log_probs": number})
    assert sum(field.nbytes for field in buffer.fields.values()) < 200e6


def test_available_memory_is_the_machines():
    assert 100e6 < ring_buffer.available_memory() < 100e12


def test_what_a_container_allows_counts(monkeypatch):
    texts = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 5000 kB\n", "/sys/fs/cgroup/memory.max": "4000000\n"}
    texts |= {"/sys/fs/cgroup/memory.current": "0\n", "/sys/fs/cgroup/memory.stat": "anon 9\ninactive_file 0\n"}
    monkeypatch.setattr(ring_buffer.Path, "read_text", lambda path: texts[str(path)])
    assert ring_buffer.available_memory() == 4_000_000
    for unlimited in ("max\n", "6000000\n"):
        texts["/sys/fs/cgroup/memory.max"] = unlimited
        assert ring_buffer.available_memory() == 5000 * 1024
    texts["/sys/fs/cgroup/memory.max"] = "4000000\n"
    texts |= {
        "/sys/fs/cgroup/memory.current": "1500000\n",
        "/sys/fs/cgroup/memory.stat": "anon 9\ninactive_file 300000\n",
    }
    assert ring_buffer.available_memory() == 2_800_000  # without what it has in use, but for files that can go


def test_another_capacity_or_other_fields_do_not_fit():
    with pytest.raises(ValueError, match="room for 5"):
        RingBuffer(6, FIELDS).load_state_dict(RingBuffer(5, FIELDS).state_dict())
    with pytest.raises(ValueError, match="transitions of obs, image"):
        RingBuffer(5, FIELDS).load_state_dict(RingBuffer(5, dict(list(FIELDS.items())[:2])).state_dict())


def test_a_checkpoint_holds_what_is_filled():
    buffer = RingBuffer(1000, FIELDS)
    buffer.add(np.ones(3, bool), **rows(0, 3))
    assert all(len(x) == 3 for x in buffer.state_dict()["fields"].values())
    torch.save(buffer.state_dict(), file := io.BytesIO())  # which writes whole storages
    assert file.tell() < 5_000
