"""The first-in-first-out replay buffer (D8)."""

import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common.flags import UserError


class RingBuffer:
    """The newest `capacity` transitions, on the device that learns from them.

    fields: name -> (shape, dtype) of one transition's entry. Raises UserError if the device has too little memory.
    """

    def __init__(self, capacity: int, fields: dict[str, tuple[tuple, type]], device: torch.device | str = "cpu"):
        row = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in fields.values())
        device = torch.device(device)
        available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
        if capacity * row > available:
            raise UserError(
                f"A buffer of {capacity:,} transitions of {row:,} bytes takes {capacity * row / 1e9:,.1f} GB and "
                f"{'the GPU' if device.type == 'cuda' else 'this machine'} has {available / 1e9:,.1f} GB free: "
                f"--buffer-size {int(0.8 * available / row)} would fit."
            )
        print(f"replay buffer: {capacity:,} transitions, {capacity * row / 1e6:,.0f} MB when full", file=sys.stderr)
        self.capacity, self.device = capacity, device
        self.size = self.position = 0  # transitions stored; where the next one goes
        self.fields = {}
        for name, (shape, dtype) in fields.items():
            zeros = torch.from_numpy(np.zeros((capacity, *shape), dtype))  # takes memory where it is written to
            self.fields[name] = zeros.to(device)

    def add(self, valid: np.ndarray, **values: np.ndarray):
        """Stores the transitions for which `valid` (N,) is true; values (N, ...) each, N at most the capacity."""
        num_new = int(np.count_nonzero(valid))
        end = self.position + num_new
        everything = num_new == len(valid)
        for name, field in self.fields.items():
            new = values[name] if everything else values[name][valid]
            if self.device.type == "cpu":
                field = field.numpy()  # the same memory, at less cost for a single transition
            else:
                new = torch.as_tensor(new)
            if end <= self.capacity:
                field[self.position : end] = new
            else:  # over the end, on at the beginning
                room = self.capacity - self.position
                field[self.position :], field[: end - self.capacity] = new[:room], new[room:]
        self.position = end % self.capacity
        self.size = min(self.size + num_new, self.capacity)

    def sample(self, batch_size: int) -> SimpleNamespace:
        """`batch_size` transitions, uniformly and with replacement: a tensor (B, ...) for every field."""
        index = torch.randint(self.size, (batch_size,), device=self.device)  # by a generator of every checkpoint
        return SimpleNamespace(**{name: field.index_select(0, index) for name, field in self.fields.items()})

    def state_dict(self) -> dict:
        # By way of NumPy, because a checkpoint holds a tensor's whole storage, of which this may be a small part
        filled = {name: torch.from_numpy(field[: self.size].cpu().numpy()) for name, field in self.fields.items()}
        return {"capacity": self.capacity, "position": self.position, "fields": filled}

    def load_state_dict(self, state: dict):
        if state["capacity"] != self.capacity or state["fields"].keys() != self.fields.keys():
            raise ValueError(f"the buffer has room for {state['capacity']} transitions of {', '.join(state['fields'])}")
        self.position = state["position"]
        for name, field in self.fields.items():
            self.size = len(state["fields"][name])
            field[: self.size] = state["fields"][name]


def available_memory() -> int:
    """Bytes that are free on this machine, at most those that are left of what a container allows."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all there is, where the system tells
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63
    try:
        allowed, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        return min(free, allowed - used + int(counts["inactive_file"]))  # files in memory make room when it is wanted
    except (OSError, ValueError):  # no container, or one without a limit
        return free
