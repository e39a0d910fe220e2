"""The first-in-first-out replay buffer (D8)."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import torch


class RingBuffer:
    """The newest `capacity` transitions, on the device that learns from them. Whole numbers keep their type, all else
    is float32; `fields`: name -> (capacity, ...), made when the first transitions come."""

    def __init__(self, capacity: int, device: torch.device | str = "cpu"):
        self.capacity, self.device, self.fields = capacity, torch.device(device), {}
        self.size = self.position = 0  # transitions stored; where the next one goes

    def _make_fields(self, values: dict[str, np.ndarray]):
        types = {name: x.dtype if x.dtype.kind in "iu" else np.dtype(np.float32) for name, x in values.items()}
        size = self.capacity * sum(math.prod(x.shape[1:]) * types[name].itemsize for name, x in values.items())
        print(f"replay buffer: {self.capacity:,} transitions, {size / 1e6:,.0f} MB when full", file=sys.stderr)
        for name, x in values.items():
            zeros = torch.from_numpy(np.zeros((self.capacity, *x.shape[1:]), types[name]))  # takes memory when written
            self.fields[name] = zeros.to(self.device)

    def add(self, valid: np.ndarray, **values: np.ndarray):
        """Stores the transitions for which `valid` (N,) is true; values (N, ...) each, N at most the capacity."""
        if not self.fields:
            self._make_fields(values)
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
        if state["capacity"] != self.capacity:
            raise ValueError(f"the buffer has room for {state['capacity']} transitions")
        self.position = state["position"]
        if state["fields"]:  # else of a run that was stopped before its first step
            self._make_fields({name: x.numpy() for name, x in state["fields"].items()})
        for name, field in self.fields.items():
            self.size = len(state["fields"][name])
            field[: self.size] = state["fields"][name]
