"""torch.compile for an update: everything from the targets to the target network in one graph."""

import torch
from torch.optim.adam import adam

from common.flags import UserError


class GraphAdam:
    """What `update` does with its torch.optim.Adam, on the same state, as functions of tensors that a graph can hold.

    Learning rates are tensors here: a number that a schedule changes would compile everything anew.
    """

    def __init__(self, optimizer: torch.optim.Adam):
        self._optimizer, self._groups = optimizer, []
        for group in optimizer.param_groups:
            params = group["params"]
            for p in params:
                if not optimizer.state[p]:
                    step = torch.zeros((), device=p.device)
                    optimizer.state[p] = {"step": step} | {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
            states = ([optimizer.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step"))
            rate = torch.tensor(float(group["lr"]), device=params[0].device)
            self._groups.append((params, *states, rate, group["betas"], group["eps"]))

    def take_rates(self):
        for (*_, rate, _, _), group in zip(self._groups, self._optimizer.param_groups):
            rate.fill_(group["lr"])

    def zero_grad(self):
        for params, *_ in self._groups:
            for p in params:
                p.grad = None

    @torch.no_grad()
    def step(self):
        graph = torch.compiler.is_compiling()
        for params, exp_avgs, exp_avg_sqs, steps, rate, (beta1, beta2), eps in self._groups:
            adam(
                params, [p.grad for p in params], exp_avgs, exp_avg_sqs, [], steps, foreach=graph, capturable=graph,
                amsgrad=False, beta1=beta1, beta2=beta2, lr=rate, weight_decay=0.0, eps=eps, maximize=False,
            )  # fmt: skip


def compiled(update, device: torch.device):
    """The same update as one graph; on a GPU as a CUDA graph. Raises UserError if that does not work here."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"--compile needs what torch.compile needs, a C++ compiler above all: {reason}") from None
    options = {"fallback_random": True} | ({"triton.cudagraphs": True} if device.type == "cuda" else {})
    graph = torch.compile(update, fullgraph=True, options=options)
    adams = []  # the state is there when the first update comes, not before a run is resumed

    @torch._dynamo.config.patch(trace_autograd_ops=True)  # lets backward() stay inside the graph
    def compiled_update(agent, optimizer, batch, args):
        if not adams:
            adams.append(GraphAdam(optimizer))
        adams[0].take_rates()
        metrics = graph(agent, adams[0], batch, args)
        return {name: value.clone() for name, value in metrics.items()}  # the next call may use their memory again

    return compiled_update
