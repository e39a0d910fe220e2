"""Every command in README and docs parses; every extra and file it names exists."""

import importlib.util
import re
import shlex
import sys
import tomllib

import pytest
import tyro
from conftest import ROOT

from common.evaluate import EvaluateArgs
from common.run import check_ranges

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("*.py")),
    *sorted((ROOT / "experiments").glob("*.py")),
]


def commands():
    """(page, command) for each shell command in an indented block or in a table's back quotes."""
    for page in PAGES:
        for line in page.read_text().splitlines():
            for command in (
                [line]
                if re.match(r"    (pip|python|tensorboard|pytest) ", line)
                else re.findall(r"`(python [^`]+)`", line)
                + [
                    f"python {words}"
                    for words in re.findall(r"`((?:a2c_sync|a3c_async|off_policy_ac|sac)\.py -[^`]+)`", line)
                ]
            ):
                for part in re.split(r" {2,}", command.strip())[0].split(" && "):
                    yield page.name, part


COMMANDS = sorted(set(commands()))


def load(path):
    if path.stem in sys.modules:  # a second module of that name would spoil what other tests hand to processes
        return sys.modules[path.stem]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_there_are_commands():
    assert sum(page == "README.md" for page, _ in COMMANDS) >= 10


@pytest.mark.parametrize("page, command", COMMANDS)
def test_command(page, command, monkeypatch):
    words = [word for word in shlex.split(command) if word != "--help"]
    if words[0] == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"\[(.*?)\]", words[-1])
        assert words[1] == "install" and all(
            e in project["optional-dependencies"] for e in ",".join(extras).split(",") if e
        )
    elif words[:3] == ["python", "-m", "common.evaluate"]:
        tyro.cli(EvaluateArgs, args=words[3:])
    elif words[0] == "python":
        path = ROOT / words[1]
        monkeypatch.syspath_prepend(str(path.parent))
        module = load(path)
        args = tyro.cli(module.Args if hasattr(module, "Args") else module.Options, args=words[2:])
        if hasattr(module, "Args"):
            check_ranges(args)
            module.check(args)
    else:
        assert words[0] in ("tensorboard", "pytest")
