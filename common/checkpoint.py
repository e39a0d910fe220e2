"""Run folders and their checkpoints: written whole or not at all, with every random generator inside."""

import errno
import json
import os
import platform
import random
import subprocess
import sys
import zipfile
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.flags import ROOT, UserError, read_args

FORMAT = "actor-critic checkpoint 3"


def find_folder(args, script: str) -> tuple[str, dict | None]:
    """The run folder's name, and the checkpoint in it if it is to be resumed; UserError if flags do not fit it."""
    if args.resume is not None:
        if args.run_dir is not None:
            raise UserError("--resume goes on in its own folder; leave --run-dir away.")
        saved = load_checkpoint(args.resume, script)
        if args.total_timesteps < min(done := saved["env_steps"], read_args(args.resume)["total_timesteps"]):
            raise UserError(
                f"{str(args.resume)!r} has {done:,} environment steps already; give more --total-timesteps."
            )
        return str(args.resume), saved
    env = args.env_id.replace("/", "-").replace(":", "-")
    now = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    name = str(f"runs/{env}__{script}__{args.seed}__{now}" if args.run_dir is None else args.run_dir)
    if not name or os.path.exists(name) and (os.path.isfile(name) or os.listdir(name)):
        raise UserError(f"--run-dir {name!r} is already in use; name another, or go on with --resume.")
    return name, None


def made_with(env_id: str) -> dict:
    """Versions of what a run's numbers depend on, and the commit of the code; None outside a checkout."""
    found = {"python": platform.python_version()}
    for name in ("torch", "gymnasium", "numpy", "mujoco", "box2d", "ale_py", env_id.partition(":")[0]):
        with suppress(metadata.PackageNotFoundError, ValueError):
            found[name] = metadata.version(name)
    with suppress(OSError):  # no git
        describe = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"]
        found["commit"] = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    return found


def write_json(path: Path, content: dict):
    """Atomic: a killed run leaves the old file or the new one."""
    text = json.dumps(content, indent=2, default=lambda x: x.item() if isinstance(x, np.generic) else str(x))
    path.with_suffix(".tmp").write_text(text + "\n")
    path.with_suffix(".tmp").replace(path)


def save_checkpoint(run_dir: Path, content: dict):
    """Writes run_dir/checkpoint.pt: temporary file, flush to the disk, rename. There is always one whole checkpoint."""
    path, temporary = run_dir / "checkpoint.pt", run_dir / "checkpoint.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "random": random_state()} | content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except RuntimeError as error:  # torch's, where the disk becomes full in the middle
        raise OSError(errno.ENOSPC, "The checkpoint cannot be written, the disk may be full") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(run_dir: str | Path, script: str) -> dict:
    """Reads run_dir/checkpoint.pt with `weights_only`; raises UserError if it is missing, damaged or foreign."""
    path = Path(run_dir) / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{str(run_dir)!r} holds no checkpoint.pt: remove it if the run ended before its first one.")
    try:
        if zipfile.ZipFile(path).testzip() is None:  # every member has a checksum, at which torch does not look
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if (content["format"], content["script"]) == (FORMAT, script):
                return content
    except Exception:  # a damaged zip, a foreign pickle, no dictionary: torch raises many types
        pass
    raise UserError(f"{str(path)!r} is damaged or was not written by this version of {script}.py.")


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


@contextmanager
def kept(name: str):
    """What an import or a reset changes for the process is put back: if it seeds torch, the agent's noise repeats."""

    def state():
        noise = torch.get_rng_state().numpy().tobytes()
        return torch.get_default_dtype(), torch.is_grad_enabled(), np.geterr(), noise

    dtype, grad, errors, noise = before = state()
    try:
        yield
    finally:
        if state() != before:
            warn(f"{name} uses torch's generator, or changes its defaults or NumPy's; they are put back.")
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(grad)
            np.seterr(**errors)
            torch.set_rng_state(torch.frombuffer(bytearray(noise), dtype=torch.uint8))
            torch.manual_seed(torch.randint(2**62, ()).item())  # its own noise does not repeat either


@cache
def warn(text: str):
    """Once in a process."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def set_precision(wanted: str, device: str = "cpu"):
    """--matmul-precision, of this process: auto is "medium", which is oneDNN, on AMD's CPUs if that is as exact there
    as "highest", which is MKL and up to twice as slow; everywhere else auto is "highest"."""
    cpuinfo = Path("/proc/cpuinfo")
    torch.set_float32_matmul_precision("highest" if wanted == "auto" else wanted)
    if wanted == "auto" and device == "cpu" and cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text():
        a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
        error = (a @ b - a.double() @ b.double()).abs().max()
        torch.set_float32_matmul_precision("medium")
        if (a @ b - a.double() @ b.double()).abs().max() > 2 * error:
            torch.set_float32_matmul_precision("highest")
