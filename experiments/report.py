"""The tables of docs/claims.md, from the data in the repository alone."""

import re
import shlex
from pathlib import Path

from experiments.judge import SEEDS, AtLeast, counted, interval, iqm, number, verdict, with_interval
from experiments.runner import DIVERGED, FIRST_SEED, code_version, jobs_of, key, runs_of, sample


def cell(values: list[float]) -> str:
    """IQM, and its interval; of bounds it is one, too."""
    if not values or None in values:
        return DIVERGED if values else ""
    least = "≥ " if any(isinstance(value, AtLeast) for value in values) else ""
    few = f" ({counted(len(values), 'seed')})" if len(values) < SEEDS else ""
    return least + with_interval(float(iqm(values)), *map(float, interval(values))) + few


def judged(claim, runs: list[dict]) -> list[tuple]:
    """(task, expectation, what was found, answer) of everything expected."""
    found = []
    for task, rows in claim.tasks.items():
        for expect in claim.expected:
            if expect.task in (None, task) and expect.rows() <= rows.keys():
                found.append((task, expect, *expect.judge(lambda *of: sample(runs, task, *of), claim.seeds_of(task))))
    return found


def in_rows(table: list) -> list[str]:
    """In Markdown; the first row is the heading."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in table]
    return [lines[0], "|" + "---|" * len(table[0]), *lines[1:]]


def block(claim, data: Path) -> str:
    """A claim's generated part of the page."""
    runs = runs_of(claim, data)
    jobs = {job.key: job for job in jobs_of(claim)}
    if not runs:
        commands = (f"    {called(job.command)} --seed {FIRST_SEED}" for job in jobs_of(claim, 1))
        return "\n".join(["Not measured yet.", "", *commands])
    lines, answers = [f"![{claim.name}](figures/claim_{claim.name}.png)", ""], judged(claim, runs)
    if claim.one_row_a_task():
        table = [["", *claim.tasks]]
        table += [[name, *(cell(sample(runs, task, "", name)) for task in claim.tasks)] for name in claim.measures]
    else:
        table = [["Task", "", *claim.measures, f"each seed's {claim.measures[0]}"]]
        for task, rows in claim.tasks.items():
            for row in rows:
                samples = [sample(runs, task, row, measure) for measure in claim.measures]
                each = ", ".join(DIVERGED if value is None else number(value) for value in samples[0])
                table += [[task, row, *map(cell, samples), each]] if any(samples) else []
    lines += [*in_rows(table), "", *in_rows([["Task", "What was expected", "What was found", ""], *answers])]
    words = [answer for *_, answer in answers]
    counts = ", ".join(f"{words.count(answer)} {answer}" for answer in ("yes", "no", "open"))
    lines += ["", f"**Verdict: {verdict(words)}** ({counts})."]
    seeds = {int(run["seed"]) for run in runs}
    minutes = sum(float(run["seconds of run"]) for run in runs if run["seconds of run"] != DIVERGED) / 60
    made = {}  # circumstances -> tasks
    for run in runs:
        made.setdefault((run["processor"], run["versions"], run["commit"], run["date"]), {})[run["task"]] = None
    there = len(jobs.keys() & {key(run) for run in runs})
    old = sum(key(run) in jobs and run["code"] != code_version(jobs[key(run)]) for run in runs)
    which = f"Seeds {FIRST_SEED} to {max(seeds)}" if len(seeds) > 1 else f"Seed {FIRST_SEED}"
    notes = [f"{which}, {counted(round(minutes), 'minute')} of training."]
    if there < len(jobs):
        notes.append(f"So far {there} of {len(jobs)} runs have been made.")
    if old:
        notes.append(f"{counted(old, 'run')} by earlier code.")
    lines += ["", " ".join(notes)]
    lines += ["", "<details><summary>Commands and machines</summary>", ""]
    lines += [f"    {called(run['command'])} --seed {run['seed']}" for run in runs if int(run["seed"]) == FIRST_SEED]
    lines += ["", *(f"    {'; '.join(tasks)}: {', '.join(each)}" for each, tasks in sorted(made.items()))]
    lines += ["", "</details>"]
    return "\n".join(lines)


def report(claims, data: Path, folder: Path, note: str = ""):
    """Replaces the generated part of each claim's section on its page; one that has none yet gets it at the end."""
    for name in sorted({claim.page for claim in claims}):
        page = folder / name
        text = page.read_text() if page.exists() else f"# Claims\n\n{note}\n"
        for claim in (claim for claim in claims if claim.page == name):
            begin = f"<!-- {claim.name}: made by `python -m experiments report` -->"
            end = f"<!-- end of {claim.name} -->"
            if begin not in text:
                text += f"\n## {claim.sentence} ({claim.decisions})\n\n{begin}\n{end}\n"
            pattern = re.escape(begin) + ".*?" + re.escape(end)
            new = f"{begin}\n\n{block(claim, data)}\n\n{end}"
            text = re.sub(pattern, lambda _: new, text, flags=re.DOTALL)
        page.write_text(text)


def called(command: str) -> str:
    return f"python {'' if shlex.split(command)[0].endswith('.py') else '-m '}{command}"


def shown(claim) -> str:
    """A claim for the command line: sentence, and its commands."""
    lines = [f"{claim.name:14} {claim.decisions:16} {claim.sentence}"]
    for task, rows in claim.tasks.items():
        for row, command in rows.items():
            lines += [f"    # {task}, {row}" if row else f"    # {task}", f"    {called(command)}"]
    return "\n".join(lines)
