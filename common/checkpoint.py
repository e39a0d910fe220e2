"""Checkpoints: written whole or not at all, loaded without executing anything, with every random generator inside."""

import os
import random
import zipfile
from pathlib import Path

import numpy as np
import torch

from common.flags import UserError

FORMAT = "actor-critic checkpoint 2"


def save_checkpoint(run_dir: Path, content: dict):
    """Writes run_dir/checkpoint.pt: temporary file, flush to the disk, rename. There is always one whole checkpoint."""
    path = run_dir / "checkpoint.pt"
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "random": random_state()} | content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's, in the middle of a full disk
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise UserError(f"{str(path)!r} cannot be written ({reason}); the last checkpoint stays.") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(run_dir: str | Path, script: str) -> dict:
    """Reads run_dir/checkpoint.pt with `weights_only`; raises UserError if it is missing, damaged or foreign."""
    path = Path(run_dir) / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{str(run_dir)!r} holds no checkpoint.pt: remove it if the run ended before its first one.")
    try:
        if zipfile.ZipFile(path).testzip() is not None:  # every member has a checksum, at which torch does not look
            raise ValueError
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        form = content["format"]
    except PermissionError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}.") from None
    except Exception:  # a damaged zip, a foreign pickle, no dictionary: torch raises many types
        form = None
    if form == "actor-critic checkpoint 1":
        raise UserError(f"{str(path)!r} was written by an earlier version of this project, whose networks differ.")
    if form != FORMAT:
        raise UserError(f"{str(path)!r} is damaged or was not written by this project.")
    if content["script"] != script:
        raise UserError(f"{str(path)!r} was written by {content['script']}.py, not by {script}.py.")
    return content


def env_seed(seed: int, env_steps: int, *worker: int) -> int:
    """Seed for a reset of all environments (of a worker) at `env_steps`; environment i takes this plus i."""
    return int(np.random.SeedSequence([seed, env_steps, *worker]).generate_state(1)[0] >> 2)


def seed_generators(seed: int):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict:
    """State of every generator that a script, torch or somebody's environment may draw from."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy = [name, keys.tolist(), *rest]
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(), "numpy": numpy}


def restore_random(state: dict):
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
