"""The lecture's claims, each run, plotted and judged:  python -m experiments {list,run,plot,report,curves}

All but `list` need extras: pip install -e ".[plot,mujoco,box2d,atari]"; and bench for the claims peer-...
"""

import re
import signal
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

from common.flags import UserError, read_args
from experiments.claims import CLAIMS
from experiments.judge import counted
from experiments.report import block, shown
from experiments.report import report as write_report
from experiments.runner import DATA, ROOT, read_log, run_claim

DOCS = ROOT / "docs"
OF_ONE_RUN = {"seed", "run_dir", "resume", "job", "made_with"}  # in args.json; all else makes another curve
Name = Annotated[str, tyro.conf.Positional]


def chosen(name: str) -> list:
    found = [claim for claim in CLAIMS if name in ("all", claim.page.removesuffix(".md"), claim.name)]
    if not found:
        sys.exit(
            f"There is no claim {name!r}; there are all, claims, results, {', '.join(claim.name for claim in CLAIMS)}."
        )
    return found


def list_(commands: bool = False):
    """The claims.

    Args:
        commands: with the commands that each compares
    """
    if hasattr(signal, "SIGPIPE"):  # which Windows lacks
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # its reader, head perhaps, need not read all
    for claim in CLAIMS:
        print(shown(claim) if commands else shown(claim).partition("\n")[0])
        page, figure = DOCS / claim.page, f"docs/figures/claim_{claim.name}.png"
        if not commands and (ROOT / figure).exists():
            part = page.read_text().partition(f"<!-- {claim.name}: made by")[2]
            answers = re.search(r"What was expected: (.*?\))(?:</summary>|\. )", part)
            print(f"{'':32}{answers[1]}; {figure}")


def run(
    claim: Name,
    task: str = "",
    seeds: int | None = None,
    jobs: int = 2,
    quick: bool = False,
    fresh: bool = False,
    out: Path | None = None,
):
    """Makes the runs that a claim's data lacks, then its figure and table, all of which are in the repository.

    Args:
        claim: name of a claim, or all, or claims, or results
        task: only the tasks whose name begins so
        seeds: as many, from 100 on; by default what the claim says, or one with --quick
        jobs: runs at a time, one thread each; claims about time take one
        quick: a short run of everything, which says nothing; data, figures and page go to the folder of the runs, by
            default a temporary one
        fresh: make all runs again, those too that the data has
        out: folder of the runs, by default runs/claims; a run that was interrupted goes on
    """
    if jobs < 1 or (seeds is not None and seeds < 1):
        sys.exit("--jobs and --seeds must be 1 or more.")
    claims, out = chosen(claim), (out or Path(tempfile.mkdtemp("-claims") if quick else "runs/claims")).absolute()
    if not any(name.startswith(task) for each in claims for name in each.tasks):
        sys.exit(f"No task of {claim} begins with {task!r}; `list --commands` shows them.")
    data, docs = (out / "data", out) if quick else (DATA, DOCS)
    failed = 0
    for each in claims:
        failed += run_claim(each, task, seeds, jobs, quick, fresh, out, data)
        draw(each, data, docs)
    write_report(
        CLAIMS, data, docs, "Short runs, which only try the laboratory out: verdicts mean nothing." if quick else ""
    )
    for each in claims if quick else ():
        print(f"\n{shown(each).splitlines()[0]}\n\n{block(each, data)}\n")
    print(f"data in {data}, pages in {docs}")
    if failed:
        sys.exit(f"{counted(failed, 'run')} failed.")


def draw(claim, data: Path, docs: Path):
    from experiments.figures import README, plot_claim, plot_readme

    print(plot_claim(claim, data, docs / "figures") or f"{claim.name} has no data yet")
    if docs == DOCS and claim.name in dict(README):
        print(plot_readme(CLAIMS, data, docs / "figures"))


def plot(claim: Name = "all"):
    """Draws a claim's figure again, from the data in the repository.

    Args:
        claim: name of a claim, or all, or claims, or results
    """
    for each in chosen(claim):
        draw(each, DATA, DOCS)


def report():
    """Writes the tables and verdicts of docs/claims.md and docs/results.md again, from the data in the repository."""
    write_report(CLAIMS, DATA, DOCS)


def curves(
    run_dirs: Annotated[list[Path], tyro.conf.Positional], out: Path = Path("curves.png"), seconds: bool = False
):
    """Training return of any run folders; those that differ in nothing but their seed are one curve.

    Args:
        run_dirs: run folders
        out: picture to write
        seconds: over seconds, not environment steps
    """
    from experiments.figures import plot_runs

    if not run_dirs:
        sys.exit("Name at least one run folder.")
    if out.suffix not in (".png", ".pdf", ".svg"):
        sys.exit(f"--out {str(out)!r} must end in .png, .pdf or .svg.")
    groups, saved = {}, {folder: read_args(folder) for folder in run_dirs}
    for folder, flags in saved.items():
        alike = [
            each for each in saved.values() if (each["script"], each["env_id"]) == (flags["script"], flags["env_id"])
        ]
        differing = sorted(name for name in flags if any(each.get(name) != flags[name] for each in alike))
        differing = [f"{name} {flags[name]}" for name in differing if name not in OF_ONE_RUN]
        try:
            episodes = read_log(folder)["charts/episodic_return"]
        except (KeyError, ValueError):
            raise UserError(f"{str(folder / 'metrics.csv')!r} is damaged.") from None
        if episodes:
            label = " ".join([f"{flags['script']}.py {flags['env_id']}", *differing])
            groups.setdefault(label, []).append((episodes, episodes[-1][0]))
    if not groups:
        sys.exit("No episode has ended in these runs, or their metrics.csv is empty.")
    print(plot_runs(groups, out, seconds))


def cli():
    for name in ("SIGTERM", "SIGHUP"):  # the latter is that of a closed terminal, which nohup ignores and Windows lacks
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:
            signal.signal(getattr(signal, name), signal.default_int_handler)
    missing = [name for name in ("scipy", "filelock", "matplotlib") if find_spec(name) is None]
    if missing and {"run", "plot", "report", "curves"} & {*sys.argv[1:2]} and "--help" not in sys.argv:
        sys.exit(f'error: {" and ".join(missing)} missing; pip install -e ".[plot]"')
    commands = {"list": list_, "run": run, "plot": plot, "report": report, "curves": curves}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="python -m experiments", description=__doc__)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        again = (
            "without --fresh the same command makes what is missing"
            if "--fresh" in sys.argv
            else "the same command goes on"
        )
        sys.exit(f"Stopped; {again}.")


if __name__ == "__main__":
    cli()
