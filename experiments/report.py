"""The tables of docs/claims.md and docs/results.md, and the commands, from the data in the repository alone."""

import re
import shlex
from pathlib import Path
from statistics import mean

from experiments.judge import RATES, SEEDS, AtLeast, Expect, Reach, count_answers, counted, interval, iqm, with_interval
from experiments.runner import (
    DIVERGED,
    FIRST_SEED,
    Job,
    code_version,
    jobs_of,
    key,
    points_of,
    runs_of,
    sample,
)  # fmt: skip

BY_CHANCE = {5: 0.07, 10: 0.05}  # seeds -> share of intervals of a difference without 0, of values that are alike


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


def seconds_of(runs: list[dict]) -> list[float]:
    return [float(run["seconds of run"]) for run in runs if run["seconds of run"] != DIVERGED]


def block(claim, data: Path) -> str:
    """A claim's generated part of the page."""
    runs = runs_of(claim, data)
    if not runs:
        return f"Not measured yet. [Commands](../experiments/data/{claim.name}.txt)."
    lines, answers = [f"![{claim.name}](figures/claim_{claim.name}.png)", ""], judged(claim, runs)
    if claim.one_row_a_task():
        table = [["", *claim.tasks]]
        table += [[name, *(cell(sample(runs, task, "", name)) for task in claim.tasks)] for name in claim.measures]
    else:
        table = rows_of(claim, runs, answers)
    lines += [*in_rows(table), ""]
    jobs = {job.key: job for job in jobs_of(claim)}
    notes = [seeds_in_words(runs)]
    if (there := len(jobs.keys() & {key(run) for run in runs})) < len(jobs):
        notes.append(f"so far {there} of {len(jobs)} runs")
    if old := by_earlier_code(claim, runs):
        notes.append(f"{counted(old, 'run')} by earlier code")
    counts = count_answers([answer for *_, answer in answers])
    more = [f"{counted(round(sum(seconds_of(runs)) / 60), 'minute')} of training."]
    if claim.fails:
        limits = ", ".join(f"{limit:g} on {task}" for task, limit in claim.fails.items() if task in claim.tasks)
        more.append(f"A seed has failed if its greedy return is below {limits}.")
    more.append(f"[Commands and machines](../experiments/data/{claim.name}.txt).")
    others = [each for each in answers if not is_aim(claim, each[1])]
    expected, more = f"What was expected: {counts} ({', '.join(notes)})", " ".join(more)
    if not others:
        return "\n".join([*lines, f"{expected}. {more}"])
    table = [*in_rows(expectations(others)), ""]
    return "\n".join([*lines, f"<details><summary>{expected}</summary>", "", *table, more, "</details>"])


def by_earlier_code(claim, runs: list[dict]) -> int:
    """How many runs today's code would not make."""
    codes, declared = {job.key[:2]: code_version(job) for job in jobs_of(claim, 1)}, {job.key for job in jobs_of(claim)}
    return sum(run["code"] != codes[key(run)[:2]] for run in runs if key(run) in declared)


def expectations(answers: list[tuple]) -> list[list]:
    """A row for each answer; or, where tasks share expectations, for each of those, and a column for each task."""
    tasks = list(dict.fromkeys(task for task, *_ in answers))
    found = {}  # expectation -> task -> what was found
    for task, expect, what, answer in answers:
        found.setdefault(str(expect), {})[task] = f"{answer}: {what}"
    if len(found) == len(answers) and len(tasks) > 1:
        table = [["Task", "What was expected", "What was found"]]
        return table + [[task, expect, f"{answer}: {what}"] for task, expect, what, answer in answers]
    table = [["What was expected", *(f"Found on {task}" for task in tasks)]]
    return table + [[expect, *(each.get(task, "") for task in tasks)] for expect, each in found.items()]


def is_aim(claim, expect) -> bool:
    """What a row of results.md should reach stands in the row."""
    return claim.page == "results.md" and isinstance(expect, Reach)


def rows_of(claim, runs: list[dict], answers: list[tuple]) -> list[list]:
    """A row of the table for each of the claim; one with three learning rates has a column for each."""
    aims = {(t, e.row): f"{e.aim()}: {a}" for t, e, _, a in answers if is_aim(claim, e)}
    first, *others = claim.measures
    rated = any(row.endswith(RATES) for rows in claim.tasks.values() for row in rows)
    table = [
        ["Task", "", first, *(rate.strip(", ") for rate in RATES if rated), *others, *["failed"] * bool(claim.fails)]
        + ["aim"] * bool(aims)
    ]
    for task, rows in claim.tasks.items():
        steps, shown = set(re.findall(r"--total-timesteps (\d+)", " ".join(rows.values()))), ""
        title = f"{task}, {int(*steps):,} steps" if claim.page == "results.md" and len(steps) == 1 else task
        for row in (row for row in rows if not row.endswith(RATES)):
            three = [row, *(row + rate for rate in RATES if rated)]
            cells = [cell(sample(runs, task, each, first)) for each in three]
            cells += [cell(sample(runs, task, row, name)) for name in others]
            if claim.fails:
                returns = [sample(runs, task, each, "return") for each in three]
                failed = [sum(v is None or v < claim.fails[task] for v in each) for each in returns if each]
                cells.append(f"{', '.join(map(str, failed))} of {len(returns[0])}" if failed else "")
            if any(cells):
                cells += [aims.get((task, row), "")] * bool(aims)
                table.append(["" if task == shown else title, row, *cells])
                shown = task
    return table


def seeds_in_words(runs: list[dict]) -> str:
    """By task where they differ."""
    last = {task: max(int(run["seed"]) for run in runs if run["task"] == task) for task in {r["task"] for r in runs}}
    ends = sorted(set(last.values()))
    return "seed 100" if ends == [FIRST_SEED] else f"seeds {FIRST_SEED} to {' or '.join(map(str, ends))}"


def commands(claim, data: Path) -> str:
    """What the data was made with."""
    runs, made = runs_of(claim, data), {}  # circumstances -> tasks
    for run in runs:
        made.setdefault((run["processor"], run["versions"], run["commit"], run["date"]), {})[run["task"]] = None
    lines = [called(run["command"]) for run in runs if int(run["seed"]) == FIRST_SEED]
    lines = lines or [called(job.command) for job in jobs_of(claim, 1)]
    return "\n".join([*lines, "", *(f"{'; '.join(tasks)}: {', '.join(each)}" for each, tasks in sorted(made.items()))])


def slug(heading: str) -> str:
    """The name that GitHub gives a heading's anchor."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def overview(claims, data: Path) -> str:
    """A row for each claim, and how many answers chance would give."""
    table = [["", "What was found", "Answers", "Seeds", "Minutes"]]
    answers, by_chance = [], 0.0
    for claim in claims:
        runs = runs_of(claim, data)
        each = judged(claim, runs)
        words = [answer for *_, answer in each]
        answers += words
        for task, expect, what, _ in each:
            made = len({run["seed"] for run in runs if run["task"] == task})
            if isinstance(expect, Expect) and not expect.margin and what != "not measured" and made >= SEEDS:
                by_chance += BY_CHANCE[10 if made >= 10 else 5]
        counts = count_answers(words)
        seeds = len({run["seed"] for run in runs})
        table.append(
            [
                f"[{claim.name}](#{slug(heading(claim))})",
                claim.finding,
                counts + " †" * bool(by_earlier_code(claim, runs)),
                seeds,
                round(sum(seconds_of(runs)) / 60),
            ]
        )
    lines = in_rows(table) + ["", f"All {len(answers)} answers: {count_answers(answers)}. †: in part by earlier code."]
    lines.append(f"If no two rows differed, chance alone would answer about {by_chance:.0f} of them with yes or no.")
    return "\n".join(lines)


def results_table(claims, data: Path) -> str:
    """A row for each task and script; those that stand beside a peer's have a table of their own."""
    table = []
    for claim in (claim for claim in claims if not claim.name.startswith("peer-")):
        runs = runs_of(claim, data)
        points = points_of(claim, runs, data)
        for task, row in ((task, row) for task, rows in claim.tasks.items() for row in rows):
            if mine := [run for run in runs if (run["task"], run["row"]) == (task, row)]:
                ends = [int(point["env_steps"]) for point in points if (point["task"], point["row"]) == (task, row)]
                minutes = mean(seconds_of(mine) or [0]) / 60
                flags = re.sub(r"--(eval-episodes|env-id|total-timesteps) \S+ ?", "", mine[0]["command"] + " ")
                today = code_version(Job(*key(mine[0]), mine[0]["command"]))
                old = any(run["code"] != today for run in mine)
                returns = cell(sample(runs, task, row, "return")) + " †" * old
                cells = [task, row.partition(",")[0], returns, len(mine), f"{max(ends, default=0):,}"]
                cells.append(f"{minutes:,.{0 if minutes >= 1 else 1}f}, {machines(mine)}")
                table.append([*cells, f"`{flags.partition(' ')[2].strip()}`".replace("``", "")])
    tasks = list(dict.fromkeys(task for task, *_ in table))
    table.sort(key=lambda row: tasks.index(row[0]))
    lines = in_rows([["Task", "Script", "Return", "Seeds", "Steps", "Minutes a run", "Flags"], *table])
    return "\n".join([*lines, "", "† By [earlier code](claims.md#how-to-read-this-page), in part or all."])


def machines(runs: list[dict]) -> str:
    names = {name for run in runs for name in re.split(r", then |one core of ", run["processor"]) if name}
    return " and ".join(sorted({re.sub(r"\(R\)| Processor.*", "", name) for name in names}))


def heading(claim) -> str:
    return f"{claim.sentence} ({claim.decisions})" if claim.page == "claims.md" else claim.sentence


def report(claims, data: Path, folder: Path, note: str = ""):
    """Replaces the generated parts of each page; a claim that has none yet gets it at the end."""
    for page in sorted({claim.page for claim in claims}):
        path, mine = folder / page, [claim for claim in claims if claim.page == page]
        text = path.read_text() if path.exists() else f"# Claims\n\n{note}\n"
        parts = {"overview": overview(mine, data) if page == "claims.md" else results_table(mine, data)}
        for name, part in (parts | {claim.name: block(claim, data) for claim in mine}).items():
            begin, end = f"<!-- {name}: made by `python -m experiments report` -->", f"<!-- end of {name} -->"
            if begin not in text:
                title = next((heading(claim) for claim in mine if claim.name == name), "Overview")
                text += f"\n## {title}\n\n{begin}\n{end}\n"
            pattern = re.escape(begin) + ".*?" + re.escape(end)
            text = re.sub(pattern, lambda _: f"{begin}\n{part}\n{end}", text, flags=re.DOTALL)
        path.write_text(text)
    for claim in claims:
        (data / f"{claim.name}.txt").write_text(commands(claim, data).strip() + "\n")


def called(command: str) -> str:
    """For the command line, with the first seed."""
    return f"python {'' if shlex.split(command)[0].endswith('.py') else '-m '}{command} --seed {FIRST_SEED}"


def shown(claim) -> str:
    """A claim for the command line: sentence, and its commands."""
    lines = [f"{claim.name:14} {claim.decisions:16} {claim.sentence}"]
    for task, rows in claim.tasks.items():
        for row, command in rows.items():
            lines += [f"    # {task}, {row}" if row else f"    # {task}", f"    {called(command)}"]
    return "\n".join(lines)
