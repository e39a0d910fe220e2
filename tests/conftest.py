import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


def environment():
    """Of a process: toy_envs importable, one thread, this interpreter."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "PATH": path}


def start(*words, cwd, **popen):
    """A script as a user starts it: its own process, another working directory."""
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen
    )


def finish(process, timeout=120):
    """(exit status, stdout, stderr)"""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty working directory with a space in its name."""
    path = tmp_path / "a folder"
    path.mkdir()
    monkeypatch.chdir(path)
    return path
