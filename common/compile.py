"""torch.compile for an update."""

import torch

from common.flags import UserError


def compiled(update, device: torch.device):
    """The same update, compiled; on a GPU with CUDA graphs. Raises UserError if that does not work here."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"--compile needs what torch.compile needs, a C++ compiler above all: {reason}") from None
    graphs = {"triton.cudagraphs": True} if device.type == "cuda" else {}
    return torch.compile(update, options={"fallback_random": True} | graphs)
