"""README and docs hold what they say: commands parse, loops and environments run, links and tests exist."""

import difflib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import tyro
from conftest import ROOT, finish, start

from common.flags import check_ranges
from experiments.__main__ import chosen
from experiments.exercises import FAULTS
from experiments.patch import patched
from experiments.report import slug

README = ROOT / "README.md"
DOCS = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCS, *sorted(ROOT.glob("*.py")), *sorted((ROOT / "experiments").glob("*.py"))]
SCRIPTS = "a2c_sync", "a3c_async", "off_policy_ac", "sac"


# --- Commands ---------------------------------------------------------------------------------------------------------


def commands():
    """(page, command) for each shell command in an indented block or in back quotes."""
    for page in PAGES:
        for line in page.read_text().splitlines():
            if shell := re.match(r"    (?:[A-Z_]+=\S+ )*((?:pip|python|tensorboard|pytest) .*)", line):
                found = [shell[1]]
            else:
                found = re.findall(r"`((?:python|pip|git|tensorboard) [^`]+)`", line)
                scripts = re.findall(rf"`((?:{'|'.join(SCRIPTS)})\.py -[^`]+)`", line)
                found += [f"python {words}" for words in scripts]
            for command in found:
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
    assert sum(page == "README.md" for page, _ in COMMANDS) >= 15
    for script in SCRIPTS:  # the ladder has a line for each
        assert any(page == "README.md" and words.startswith(f"python {script}.py") for page, words in COMMANDS)


@pytest.mark.parametrize("page, command", COMMANDS)
def test_command(page, command, monkeypatch):
    """Pitfall 24: it parses with the script's own flags, their ranges and what they must not contradict."""
    words = [word for word in shlex.split(command) if word != "--help"]
    if words[0] == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"\[(.*?)\]", words[-1])
        known = project["optional-dependencies"]
        assert words[1] == "install" and all(e in known for e in ",".join(extras).split(",") if e)
    elif words[0] == "git":
        names = [word for word in words[2:] if not word.startswith("-")]
        assert words[1] in ("diff", "apply") and all((ROOT / name).exists() for name in names)
    elif words[:3] == ["python", "-m", "experiments"]:
        assert words[3] in ("list", "run", "plot", "report", "curves")
        assert words[3] != "run" or words[4] == "CLAIM" or chosen(words[4])
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / (words[2].replace(".", "/") + ".py")).exists()
    elif words[0] == "python":
        path = ROOT / words[1].removeprefix("path/to/")
        monkeypatch.syspath_prepend(str(path.parent))
        module = load(path)
        args = tyro.cli(getattr(module, "Args", None) or module.Options, args=words[2:])
        if path.parent == ROOT:
            check_ranges(args)
        if hasattr(module, "Args"):
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # ray need not be here
            module.check_flags(args)
    else:
        assert words[0] in ("tensorboard", "pytest")


def before_and_after(name, script, folder):
    """Lines of a script, and of its copy in `folder` with an exercise's diff."""
    return [path.read_text().splitlines() for path in (ROOT / f"{script}.py", patched(name, script, folder))]


@pytest.mark.parametrize("number, script, flags", [(number, *words[:2]) for number, words in FAULTS.items()])
def test_a_planted_fault_changes_one_line_of_a_script(number, script, flags, tmp_path):
    assert f"{number}.diff && python {script}.py {flags}`" in (ROOT / "docs" / "exercises.md").read_text()
    before, after = before_and_after(number, script, tmp_path)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


@pytest.mark.parametrize("name, script, flags", [("ppo", "a2c_sync", ""), ("td3", "sac", "--learning-starts 300")])
def test_a_solution_trains(name, script, flags, workdir):
    before, after = before_and_after(name, script, workdir)
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert name != "ppo" or len(changes) <= 60
    (workdir / "common").symlink_to(ROOT / "common")
    flags = ["--total-timesteps", 600, "--eval-episodes", 1, "--run-dir", "run", *flags.split()]
    status, _, err = finish(start(workdir / f"{script}.py", *flags, cwd=workdir))
    assert status == 0 and json.loads((workdir / "run" / "results.json").read_text())["updates"] > 3, err


# --- Pages ------------------------------------------------------------------------------------------------------------


def test_the_readme_fits_on_a_screen_or_two():
    lines = README.read_text().splitlines()
    assert len(lines) <= 140
    assert all(len(line) <= 120 for line in lines if not line.startswith("|"))


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_no_sentence_has_more_than_30_words(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"^(\||    |#).*$", "", text, flags=re.MULTILINE)  # tables, commands, headings
    text = re.sub(r"`[^`]+`", "code", re.sub(r"\]\([^)]*\)", "]", text))
    for paragraph in re.split(r"\n\s*\n|\n\s*(?:-|\d+\.) ", text):
        for sentence in re.split(r"(?<=[.!?])[*)]*\s+", paragraph):
            assert len(sentence.split()) <= 30, " ".join(sentence.split())


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Out of the repository they are looked at for their form only."""
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]*))?\)", page.read_text()):
        if re.match("https?:", target):
            assert re.fullmatch(r"https?://[\w-]+(\.[\w-]+)+(/[\w./?=&%~+:-]*)?", target), target
            continue
        other = page.parent / target if target else page
        assert other.exists(), target
        assert not anchor or anchor in map(slug, re.findall(r"^#+ (.*)", other.read_text(), re.MULTILINE)), anchor


def test_every_test_that_a_page_names_exists():
    for page in DOCS:
        text = re.sub(r"\[(test_\w+)\]\(\.\./(tests/\w+\.py)\)", r"`\2::\1`", page.read_text())
        for name, test in re.findall(r"`(tests/\w+\.py)::(\w+)`", text):
            assert f"\ndef {test}(" in (ROOT / name).read_text(), f"{page.name}: {name}::{test}"


def test_the_pitfalls_are_those_that_tests_refer_to():
    numbers = re.findall(r"^(\d+)\. \*\*", (ROOT / "docs" / "pitfalls.md").read_text(), re.MULTILINE)
    assert numbers == [str(n + 1) for n in range(24)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_equation_of_the_docstring_has_its_line(script):
    source = (ROOT / f"{script}.py").read_text()
    docstring, code = source.split('"""')[1], source.split('"""', 2)[2]
    announced = re.findall(r"^    \((\d+)\) +", docstring, re.MULTILINE)
    tagged = re.findall(r"# \((\d+)\)$", code, re.MULTILINE)
    assert announced == [str(n + 1) for n in range(len(announced))]
    assert announced and set(announced) == set(tagged)


# --- Code of the pages ------------------------------------------------------------------------------------------------


def code_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def middle(script):
    """The sections Networks, Equations and Update."""
    sections = re.split(r"^# --- (\w+) -+\n", (ROOT / f"{script}.py").read_text(), flags=re.MULTILINE)
    names = sections[1::2]
    assert names[:4] == ["Config", "Networks", "Equations", "Update"]
    return "".join(sections[2 * names.index(name) + 2] for name in names[1:4])


def with_middle(page, script):
    """The page's loop as a reader makes it: the sections of the script pasted at the comment."""
    (loop,) = (block for block in code_blocks(page) if "# Paste here" in block)
    comment = f"# Paste here: Networks, Equations and Update of {script}.py\n"
    assert loop.count(comment) == 1
    return loop.replace(comment, middle(script))


def run_alone(program, timeout=60):
    """In a process that finds nothing of this repository; returns what it prints."""
    nothing_else = 'import importlib.util\nassert importlib.util.find_spec("common") is None\n'
    command = [sys.executable, "-I", "-c", nothing_else + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plain_loop_learns_cartpole_without_common():
    """README shows the loop as it stands there."""
    path = ROOT / "examples" / "plain_loop.py"
    assert any(f"\n{block}" in path.read_text() for block in code_blocks(README))
    assert float(run_alone(f"__file__ = {str(path)!r}\n{path.read_text()}").split()[-1]) >= 200


def test_the_notebook_is_the_plain_loop():
    """Cell by cell, with pictures at the end; that it runs is among the recipes."""
    cells = json.loads((ROOT / "examples" / "plain_loop.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code").splitlines()
    lines = (ROOT / "examples" / "plain_loop.py").read_text().split('"""', 2)[2].splitlines()
    assert [line for line in lines if line and line not in code] == [
        next(line for line in lines if "script = " in line)
    ]


def test_the_loop_of_docs_sac_moves_every_network_without_common():
    program = with_middle(ROOT / "docs" / "sac.md", "sac")
    for old, new in (
        ("warm_up, num_steps = 1_000, 8_000\n", "warm_up, num_steps = 100, 300\n"),
        ("\nfor step in range(", "\ninitial = copy.deepcopy(agent.state_dict())\nfor step in range("),
    ):
        assert program.count(old) == 1
        program = program.replace(old, new)
    program += "print([name for name, x in agent.state_dict().items() if torch.equal(x, initial[name])])\n"
    assert run_alone(program).splitlines()[-1] == "[]"


@pytest.mark.slow
def test_the_loop_of_docs_sac_learns_pendulum_without_common():
    printed = run_alone(with_middle(ROOT / "docs" / "sac.md", "sac"), timeout=1200)
    assert float(printed.split()[-1]) > -400


def test_the_readmes_environment_trains_in_any_folder(workdir):
    (code,) = (block for block in code_blocks(README) if "gym.register" in block)
    assert len(code.splitlines()) == 5
    (workdir / "my_env.py").write_text(code)
    flags = "--env-id", "my_env:MyEnv-v0", "--total-timesteps", 500, "--eval-episodes", 2, "--run-dir", "run"
    status, _, err = finish(start(ROOT / "a2c_sync.py", *flags, cwd=workdir, real=True))
    assert status == 0, err
    assert json.loads((workdir / "run" / "results.json").read_text())["env_steps"] >= 500
    status, out, err = finish(start(ROOT / "evaluate.py", "run", "--episodes", 1, cwd=workdir))
    assert status == 0 and "my_env:MyEnv-v0" in out, err
