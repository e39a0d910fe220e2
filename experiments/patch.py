"""A script with an exercise's diff applied to it."""

import shutil
import subprocess
from pathlib import Path

from common.flags import ROOT


def patched(name: str | int, script: str, folder: str | Path) -> Path:
    """A copy in `folder`, with docs/exercises/NAME.diff."""
    copy = shutil.copy(ROOT / f"{script}.py", folder)
    diff = str(ROOT / "docs" / "exercises" / f"{name}.diff")
    subprocess.run(["git", "apply", "--unsafe-paths", f"--directory={folder}", diff], cwd="/", check=True)
    return Path(copy)
