"""Checkpoints: written whole or not at all, loaded without executing anything, with every random generator inside."""

import json
import os
import random
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FORMAT = "actor-critic checkpoint 1"


def save_checkpoint(run_dir: Path, content: dict):
    """Writes run_dir/checkpoint.pt: temporary file, flush to the disk, rename. There is always one whole checkpoint."""
    path = run_dir / "checkpoint.pt"
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save({"format": FORMAT, "random": random_state()} | content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(run_dir: str | Path, script: str) -> dict:
    """Reads run_dir/checkpoint.pt with `weights_only`; raises UserError if it is missing, damaged or foreign."""
    path = Path(run_dir) / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{str(run_dir)!r} holds no checkpoint.pt.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        known = content["format"] == FORMAT
    except Exception:  # a damaged zip, a foreign pickle, no dictionary: torch raises many types
        known = False
    if not known:
        raise UserError(f"{str(path)!r} is damaged or was not written by this project.")
    if content["script"] != script:
        raise UserError(f"{str(path)!r} was written by {content['script']}.py, not by {script}.py.")
    return content


def read_args(run_dir: str | Path) -> dict:
    """The flags (and the script's name) that a run folder was made with."""
    path = Path(run_dir) / "args.json"
    try:
        saved = json.loads(path.read_text())
        if not (saved["script"].isidentifier() and (ROOT / f"{saved['script']}.py").is_file()):
            raise ValueError
        return saved
    except FileNotFoundError:
        raise UserError(f"{str(run_dir)!r} is no run folder: it has no args.json.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{str(path)!r} is damaged or was not written by this project.") from None


def random_state() -> dict:
    """State of every generator that a script, torch or somebody's environment may draw from."""
    numpy_state = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": {
            "key": key,
            "pos": numpy_state["state"]["pos"],
            "gauss": numpy_state["gauss"],
            "has_gauss": numpy_state["has_gauss"],
        },
    }


def restore_random(state: dict):
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    saved = state["numpy"]
    np.random.set_state(
        ("MT19937", saved["key"].numpy().astype(np.uint32), saved["pos"], saved["has_gauss"], saved["gauss"])
    )
