"""The repository as its own tools want it."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff(command):
    words = [sys.executable, "-m", "ruff", *command.split(), "."]
    ruff = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if ruff.returncode != 0:
        repair = "ruff check --fix" if command == "check" else "ruff format"
        pytest.fail(f"`ruff {command}` is not content; try `{repair}`:\n{ruff.stdout}{ruff.stderr}", pytrace=False)
