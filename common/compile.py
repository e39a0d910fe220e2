"""torch.compile for an update: everything from the targets to the target network in one graph."""

import copy
import sys
from types import FunctionType

import torch
from tqdm import tqdm


class GraphOptimizer:
    """What `update` does with its Adam or RMSpropA3C, on the same state, by functions that a graph can hold.

    Learning rates are tensors here: a number that a schedule changes would compile everything anew.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        self.param_groups = []
        for group in optimizer.param_groups:
            params = group["params"]
            for p in params:
                if not optimizer.state[p]:  # RMSpropA3C has its own from the start
                    step = torch.zeros((), device=p.device)
                    optimizer.state[p] = {"step": step} | {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
            state = {name: [optimizer.state[p][name] for p in params] for name in optimizer.state[params[0]]}
            self._count = int(state["step"][0]) if "step" in state else 0
            lr, scale = torch.zeros(2, device=params[0].device).unbind()
            self.param_groups.append(group | {"lr": lr, "scale": scale, "state": state})

    def take_rates(self):
        """Before every step; with Adam's corrections, which a graph would compute anew for each few weights."""
        self._count += 1
        for group, source in zip(self.param_groups, self._optimizer.param_groups):
            beta1, beta2 = group.get("betas", (0.0, 0.0))
            group["lr"].fill_(source["lr"] / (1 - beta1**self._count))
            group["scale"].fill_((1 - beta2**self._count) ** -0.5)

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self):
        step = adam_step if isinstance(self._optimizer, torch.optim.Adam) else rmsprop_step
        for group in self.param_groups:
            step(group["params"], [p.grad for p in group["params"]], group)


def adam_step(params, grads, group):
    """As torch's Adam."""
    (beta1, beta2), state = group["betas"], group["state"]
    means, squares = state["exp_avg"], state["exp_avg_sq"]
    torch._foreach_add_(state["step"], 1)
    torch._foreach_lerp_(means, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    roots = torch._foreach_mul(torch._foreach_sqrt(squares), group["scale"])
    updates = torch._foreach_div(means, torch._foreach_add(roots, group["eps"]))
    torch._foreach_sub_(params, torch._foreach_mul(updates, group["lr"]))


def rmsprop_step(params, grads, group):
    """As RMSpropA3C."""
    for p, grad, square_avg in zip(params, grads, group["state"]["square_avg"]):
        square_avg.mul_(group["alpha"]).addcmul_(grad, grad, value=1 - group["alpha"])
        update = grad / (square_avg + group["eps"]).sqrt()
        p.sub_(group["lr"] * update / update.square().mean().sqrt().clamp(min=1))


class Replay:
    """Calls of step(agent, optimizer, batch, args) on a GPU as replays of one CUDA graph: a launch instead of hundreds.

    Always with the same agent, optimizer and args. Random numbers differ from replay to replay (torch sees to it).
    """

    def __init__(self, step):
        self._step, self._calls, self._stream = step, 0, torch.cuda.Stream()
        self._graph = torch.cuda.CUDAGraph()

    def __call__(self, agent, optimizer, batch, args):
        self._calls += 1
        if self._calls <= 3:  # what torch does at the first calls must not be recorded, nor run in the usual stream
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                metrics = self._step(agent, optimizer, batch, args)
            torch.cuda.current_stream().wait_stream(self._stream)
            return metrics
        if self._calls == 4:
            self._batch = copy.deepcopy(batch)
            with torch.cuda.graph(self._graph):  # records, and runs nothing
                self._metrics = self._step(agent, optimizer, self._batch, args)
        for place, tensor in zip(tensors(self._batch), tensors(batch)):
            place.copy_(tensor)
        self._graph.replay()
        return {name: value.clone() for name, value in self._metrics.items()}  # the next replay writes over these


def tensors(batch) -> list[torch.Tensor]:
    """Of a NamedTuple or a SimpleNamespace."""
    return list(batch) if isinstance(batch, tuple) else list(vars(batch).values())


def compiled(update, device: torch.device):
    """The same update as one graph; on a GPU as a CUDA graph."""
    options = {"fallback_random": True}  # draws from torch's own generators
    if device.type == "cpu":
        options |= {"cpp_wrapper": True, "unroll_reductions_threshold": 1}  # 5 to 8 % faster (docs/speed.md)
    else:
        options["loop_ordering_after_fusion"] = False  # fails on torch._foreach functions (torch 2.11)
    # With a code object of its own: what one compiled run has learned of shapes and flags, no other has to check
    update = FunctionType(update.__code__.replace(), update.__globals__, update.__name__)
    # Shapes are fixed, whatever an earlier run of the process had: torch would take those for sizes that change
    graph = torch.compile(update, fullgraph=True, dynamic=False, options=options)
    graph = Replay(graph) if device.type == "cuda" else graph
    optimizers = []  # the state is there when the first update comes, not before a run is resumed

    @torch._dynamo.config.patch(trace_autograd_ops=True)  # lets backward() stay inside the graph
    def compiled_update(agent, optimizer, batch, args):
        if not optimizers:
            tqdm.write("compiling the update: up to a minute", file=sys.stderr)
            optimizers.append(GraphOptimizer(optimizer))
        optimizers[0].take_rates()
        return graph(agent, optimizers[0], batch, args)

    return compiled_update
