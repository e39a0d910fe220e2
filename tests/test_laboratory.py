"""The laboratory of the lecture's claims: statistics, judgement, reuse of runs, and the page that is made of them."""

import importlib
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tyro
from conftest import ROOT, environment, finish, start
from helpers import wait_for
from PIL import Image

from common.flags import check_ranges
from experiments import runner
from experiments.__main__ import cli
from experiments.claims import CLAIMS, Claim
from experiments.judge import RATES, SEEDS, AtLeast, Expect, Reach, count_answers, interval, iqm
from experiments.report import BY_CHANCE, block, commands, judged, overview, report, results_table, slug
from experiments.runner import (
    DATA,
    Job,
    code_version,
    curve,
    jobs_of,
    measured,
    read,
    run,
    run_claim,
    sample,
    script_of,
)

HIGH, LOW, WIDE = [10.0, 11, 12, 13, 14], [1.0, 2, 3, 4, 5], [0.0, 5, 10, 15, 20]
BOUNDS = [10.0, 11, 12, 13, AtLeast(14)]


# --- Statistics -------------------------------------------------------------------------------------------------------


def test_the_interquartile_mean_leaves_out_a_quarter_at_either_end():
    assert iqm([0, 10, 20, 1000]) == 15 and iqm([-99, 1, 2, 3, 99]) == 2 and iqm([7]) == 7


def test_an_interval_stays_in_the_range_of_what_was_measured():
    low, high = interval([500.0, 500, 500, 500, 9])
    assert 9 <= low < 500 and high == 500
    assert interval([500.0] * 5) == (500, 500)
    assert all(np.isnan(interval([3.0])))
    low, high = interval(np.array([HIGH, LOW]))  # an interval for each row
    assert low.shape == (2,) and 10 <= low[0] < 12 < high[0] <= 14 and 1 <= low[1] < 3 < high[1] <= 5


def test_an_interval_covers_the_true_mean_about_as_often_as_it_says():
    """That of so many seeds as an answer wants, too; with fewer it does not."""
    for seeds, coverage in ((20, 0.94), (SEEDS, 0.9), (3, 0.75)):
        low, high = interval(np.random.default_rng(0).normal(5, 1, (1000, seeds)), at_least=2, n_resamples=2_000)
        assert ((low < 5) & (5 < high)).mean() == pytest.approx(coverage, abs=0.03)


@pytest.mark.parametrize("seeds, share", BY_CHANCE.items())
def test_so_many_differences_are_found_by_chance(seeds, share):
    """Of normal values that do not differ; the page adds these up."""
    samples = np.random.default_rng(0).normal(size=(2, 2000, seeds))
    low, high = interval(*samples, statistic=lambda a, b, axis=-1: iqm(a, axis) - iqm(b, axis), n_resamples=2_000)
    assert ((low > 0) | (high < 0)).mean() == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize(
    "better, worse, options, answer",
    [
        (HIGH, LOW, {}, "yes"),
        (LOW, HIGH, {}, "no"),
        (LOW, HIGH, {"lower": True}, "yes"),
        (HIGH, WIDE, {}, "open"),
        (LOW, HIGH, {"margin": 20}, "yes"),  # not 20 less
        (LOW, HIGH, {"margin": 2}, "no"),
        (HIGH, HIGH, {}, "open"),
        ([500.0] * 5, [500.0] * 5, {}, "no"),  # not more
        ([500.0] * 5, [500.0] * 5, {"margin": 1}, "yes"),
        ([1.0], [0.0], {}, "open"),  # one seed says nothing
        ([9.0] * 4, [0.0] * 4, {}, "open"),  # nor do four
        ([], HIGH, {}, "open"),  # not measured
        ([*HIGH[:4], None], LOW, {}, "open"),  # one seed has diverged
        # Not reached, so that it takes at least so long. More of the worse row's only makes the better one better
        (LOW, BOUNDS, {"lower": True}, "yes"),
        (BOUNDS, LOW, {"lower": True}, "no"),
        ([AtLeast(value) for value in LOW], HIGH, {"lower": True}, "open"),
        (HIGH, [AtLeast(value) for value in LOW], {"lower": True}, "open"),
        (HIGH, [AtLeast(value) for value in LOW], {}, "open"),
        (BOUNDS, LOW, {}, "yes"),
    ],
)
def test_an_expectation_is_judged_by_the_interval_of_the_difference(better, worse, options, answer):
    samples = {"a": better, "b": worse}
    found, judged = Expect("a", "b", **options).judge(lambda row, measure: samples[row], 5)
    assert judged == answer and "nan" not in found


def test_two_measures_of_the_same_runs_are_compared_run_by_run():
    """Each run's second measure is 1 below its first, which differ by much more from run to run."""
    samples = {("a", "x"): LOW, ("a", "y"): [value - 1 for value in LOW], ("b", "y"): [value - 1 for value in LOW]}
    assert Expect("a", "a", "x", than="y").judge(lambda *of: samples[of], 5) == ("1 [1, 1]", "yes")
    assert Expect("a", "b", "x", than="y").judge(lambda *of: samples[of], 5)[1] == "open"


def test_an_aim_is_reached_by_the_mean_or_by_enough_seeds():
    def found(row, planned=5, **options):
        return Reach(row, **{"at_least": 475} | options).judge(lambda row, _: samples[row], planned)

    samples = {"a": [480.0, 500, 500, 500, 9], "b": [], "diverged": [500.0, 500, 500, 500, None]}
    assert found("a") == ("493", "yes") and found("a", at_least=495) == ("493", "no")
    assert found("a", planned=6) == ("493", "open") and found("b") == ("not measured", "open")
    assert found("a", seeds=4) == ("4 of 5 seeds", "yes") and found("a", seeds=5) == ("4 of 5 seeds", "no")
    assert found("a", seeds=9, planned=10)[1] == "open" and found("a", seeds=10, planned=10)[1] == "no"
    assert found("diverged") == ("1 run diverged", "no") and found("diverged", seeds=4)[1] == "yes"


def test_an_answer_that_a_rank_test_does_not_share_is_fragile():
    samples = {"a": [3.0, 5, 6, 9, 10], "b": [0.0, 1, 3, 4, 5], "c": [-1.0, 1, 6, 9, 10]}
    assert Expect("a", "b").judge(lambda row, _: samples[row], 5)[1] == "yes, fragile"
    assert Expect("b", "a", lower=True).judge(lambda row, _: samples[row], 5)[1] == "yes, fragile"
    assert Expect("c", "a", margin=20).judge(lambda row, _: samples[row], 5)[1] == "yes"
    assert count_answers(["yes", "open", "yes, fragile", "no"]) == "2 yes (1 fragile), 1 no, 1 open"


def test_the_best_of_three_rates_is_compared():
    samples = {"a": HIGH, "b": LOW, "b" + RATES[0]: [value + 8 for value in LOW], "b" + RATES[1]: LOW}
    expect = Expect("a", "b", tuned=True)
    assert expect.rows() == samples.keys() and str(expect).endswith("than with b, best of 3 rates")
    found, answer = expect.judge(lambda row, _: samples[row], 5)
    assert answer == "open" and found.startswith("1 [") and found.endswith(RATES[0])
    found, answer = replace(expect, lower=True).judge(lambda row, _: samples[row], 5)
    assert answer == "no" and found.startswith("-9 [")
    assert expect.judge(lambda row, _: samples[row] if row != "b" + RATES[1] else [], 5) == ("not measured", "open")


# --- Measures ---------------------------------------------------------------------------------------------------------


def test_measures_of_a_run():
    episodes = [(100 * i, float(i), 10.0 * i) for i in range(1, 101)]  # at 100, 200, ... steps; returns 10, 20, ...
    log = {"charts/episodic_return": episodes, "losses/trunk_grad_cosine": [(1, 0.1, 0.5), (2, 0.2, -0.1)]}
    results = {"env_steps": 10_000, "seconds": 123.0, "eval_return_mean": 77.0, "q": 3.0}
    assert measured("return", results, log) == 77 and measured("q", results, log) == 3
    assert measured("training return", results, log) == pytest.approx(505)
    assert measured("last tenth", results, log) == np.mean([10 * i for i in range(91, 101)])
    assert measured("worst stretch", results, log) == np.mean([10 * i for i in range(51, 71)])
    # Returns 310 to 500 have a mean of 405, those before it one of 395
    assert measured("steps to 400", results, log) == 5000 and measured("seconds to 400", results, log) == 50
    falls = {"charts/episodic_return": [*episodes, *((0, 0.0, 5.0 if 40 <= i < 140 else 900.0) for i in range(200))]}
    assert measured("worst after 400", results, falls) == 5 and measured("worst after 9999", results, falls) == 0
    assert measured("worst after 400", results, log) == np.mean([10 * i for i in range(51, 101)])  # fewer than 100
    never = measured("steps to 9999", results, log)
    assert never == 10_000 and isinstance(never, AtLeast)
    row = {"task": "t", "row": "r", "seconds of run": "1.0", "steps": runner.text(never), "none": runner.text(None)}
    (known,) = sample([row], "t", "r", "steps")
    assert known == 10_000 and isinstance(known, AtLeast) and sample([row], "t", "r", "none") == []
    assert measured("trunk_grad_cosine", results, log) == pytest.approx(0.2)
    assert measured("plain Q, K = 1", results, log) is None


def test_a_run_in_which_no_episode_ended_has_no_training_return():
    log = {"charts/episodic_return": []}
    assert measured("training return", {"env_steps": 10}, log) is measured("worst stretch", {}, log) is None
    assert measured("steps to 400", {"env_steps": 10}, log) is None and curve([], 10) == []


def test_a_curve_has_a_point_for_each_hundredth_and_hides_no_gap():
    episodes = [(150, 1.0, 4.0), (180, 2.0, 8.0), (420, 5.0, 1.0)]
    assert curve(episodes, 1000, points=10) == [
        (200, 2.0, 6.0),  # the mean of two; before it no episode had ended
        (300, 2.0, 6.0),
        (400, 2.0, 6.0),
        *((steps, 5.0, 1.0) for steps in range(500, 1001, 100)),
    ]


# --- Which runs are made ----------------------------------------------------------------------------------------------

TOY = Claim(
    "toy", "Toys.", "D0", {"task": {"a": "a2c_sync.py --gamma 0.9", "b": "a2c_sync.py"}}, [Expect("a", "b")], seeds=3
)
LOG = {"charts/episodic_return": [(50, 0.5, 4.0)]}
HOW = {"code": "", "circumstances": ("commit", "versions", "processor", "date")}


def fake_processes(monkeypatch, happens):
    """happens(command, folder) takes the place of a started process, and returns what it writes to stderr."""
    calls = []

    def popen(command, **_):
        calls.append(command)
        folder = Path(command[command.index("--resume" if "--resume" in command else "--run-dir") + 1])
        error = happens(command, folder)
        return type("Process", (), {"returncode": -9 * bool(error), "communicate": lambda self: (None, error or "")})()

    monkeypatch.setattr(runner.subprocess, "Popen", popen)
    monkeypatch.setattr(runner, "circumstances", lambda: HOW["circumstances"])
    return calls


MADE = HOW | {"results": {"env_steps": 100, "seconds": 1.0, "eval_return_mean": 5.0}, "log": LOG}


def test_the_codes_version_is_that_of_what_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "common").mkdir()

    def version(script='"""Doc."""\nfrom common import used\nx = 1  # why\n', used="y = 1\n", unused="z = 1\n"):
        for name, text in (("script", script), ("common/used", used), ("common/unused", unused)):
            (tmp_path / f"{name}.py").write_text(text)
        return code_version(Job("task", "row", 100, "script.py --env-id envs.mine:Mine-v0"))

    first = version()
    assert version('"""Other."""\n\nfrom common import used\n\nx = 1\n') == first == version(unused="z = 2\n")
    assert version('"""Doc."""\nfrom common import used\nx = 2\n') != first != version(used="y = 2\n")
    assert version("import common.used\nx = 1\n") != version("import common.used\nx = 1\n", used="y = 3\n")
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "mine.py").write_text("a = 1\n")
    assert version() != first


def test_the_codes_version_does_not_depend_on_pythons():
    """What 3.11 to 3.13 make of it: 3.12 has a new field, 3.13 leaves empty ones out."""
    forms = [
        "FunctionDef(name='f', args=arguments(posonlyargs=[], args=[]), body=[Pass()], returns=None)",
        "FunctionDef(name='f', args=arguments(posonlyargs=[], args=[]), body=[Pass()], returns=None, type_params=[])",
        "FunctionDef(name='f', args=arguments(), body=[Pass()])",
    ]
    assert {runner.without_empty(form) for form in forms} == {"FunctionDef(name='f', args=arguments(), body=[Pass()])"}


def test_only_what_is_missing_is_run_and_a_failure_stops_nothing(tmp_path, monkeypatch, capsys):
    made, broken = [], {("b", 101)}

    def fake(job, out, fresh, timed):
        made.append((job.row, job.seed, job.command))
        if (job.row, job.seed) in broken:
            raise RuntimeError("it broke")
        return MADE | {"code": runner.code_version(job)}

    monkeypatch.setattr(runner, "run", fake)

    def again(claim=TOY, seeds=None, fresh=False):
        made.clear()
        return run_claim(claim, "", seeds, 1, False, fresh, tmp_path, tmp_path)

    assert again() == 1
    assert [each[:2] for each in made] == [(row, seed) for seed in (100, 101, 102) for row in "ab"]
    assert "FAILED: it broke" in capsys.readouterr().out
    assert [runner.key(row) for row in read(tmp_path / "toy.runs.csv")] == [
        ("task", row, str(seed)) for seed in (100, 101, 102) for row in "ab" if (row, seed) not in broken
    ]
    broken.clear()
    assert again() == 0 and [each[:2] for each in made] == [("b", 101)]
    assert again() == 0 and made == []
    assert again(fresh=True) == 0 and len(made) == 6
    assert again(seeds=4) == 0 and [each[:2] for each in made] == [("a", 103), ("b", 103)]
    # Another command is another run; a row that is declared no more leaves the data
    other = replace(TOY, tasks={"task": {"a": "a2c_sync.py --gamma 0.8"}}, expected=[])
    assert again(other) == 0 and made == [("a", seed, "a2c_sync.py --gamma 0.8") for seed in (100, 101, 102)]
    assert {row["row"] for row in read(tmp_path / "toy.runs.csv")} == {"a"}
    assert {row["row"] for row in read(tmp_path / "toy.curves.csv")} == {"a"}
    monkeypatch.setattr(runner, "code_version", lambda job: "new code")
    assert again(other) == 0 and len(made) == 3
    # So is one of which something new is asked, after an interruption, too; what is asked no more is left out
    asked = replace(other, measures=("return", "seconds"))
    broken.update({("a", 101), ("a", 102)})
    assert again(asked) == 2 and len(made) == 3
    assert runner.sample(read(tmp_path / "toy.runs.csv"), "task", "a", "seconds") == [1.0]
    broken.clear()
    assert again(asked) == 0 and [each[1] for each in made] == [101, 102]
    assert again(asked) == 0 and made == []
    assert again(replace(other, measures=("return",))) == 0 and made == []
    assert again(replace(other, measures=("return",)), fresh=True) == 0 and len(made) == 3
    assert "seconds" not in read(tmp_path / "toy.runs.csv")[0]


def test_a_row_of_which_one_command_has_some_runs_has_those_alone(tmp_path, monkeypatch):
    from experiments import figures

    for seed, command in ((100, "a2c_sync.py"), (101, "a2c_sync.py --gamma 0.8"), (102, "a2c_sync.py --gamma 0.8")):
        runner.add(TOY, tmp_path, Job("task", "b", seed, command), MADE)
        runner.add(TOY, tmp_path, Job("task", "a", seed, command), MADE)  # none of today's
    runs = runner.runs_of(TOY, tmp_path)
    assert [(run["row"], run["seed"]) for run in runs] == [("a", "100"), ("b", "100"), ("a", "101"), ("a", "102")]
    # The same of code, and a row or a task that is declared no more has none
    runner.add(
        TOY, tmp_path, Job("task", "b", 103, "a2c_sync.py"), MADE | {"code": code_version(Job(*"xy", 0, "a2c_sync.py"))}
    )
    assert [run["seed"] for run in runner.runs_of(TOY, tmp_path) if run["row"] == "b"] == ["103"]
    assert not runner.runs_of(replace(TOY, tasks={"task": {"c": "a2c_sync.py"}, "other": {"a": "x"}}), tmp_path)
    # Nor does the figure show the others
    drawn, draw_curves = [], figures.draw_curves
    monkeypatch.setattr(figures, "draw_curves", lambda *of: [drawn.append(of[1]), draw_curves(*of)][1])
    figures.plot_claim(TOY, tmp_path, tmp_path)
    assert {row: len(seeds) for row, seeds in drawn[0].items()} == {"a": 3, "b": 1}


def test_a_run_that_diverged_is_told_and_counts(tmp_path, monkeypatch):
    job = Job("task", "a", 100, "a2c_sync.py --gamma 0.9")
    fake_processes(monkeypatch, lambda *_: "error: agent's weights is not finite at environment step 100; ...")
    made = run(job, tmp_path)
    assert "results" not in made
    whole = MADE | {"code": made["code"]}
    for seed in range(100, 105):
        runner.add(TOY, tmp_path, Job("task", "a", seed, "a2c_sync.py --gamma 0.9"), made if seed == 101 else whole)
        runner.add(TOY, tmp_path, Job("task", "b", seed, "a2c_sync.py"), MADE)
    ((_, _, found, answer),) = judged(TOY, read(tmp_path / "toy.runs.csv"))
    assert (found, answer) == ("1 run diverged", "open")
    assert "| task | a | diverged | diverged |" in block(TOY, tmp_path)
    assert "| task | a | diverged | diverged | 1 of 5 |" in block(replace(TOY, fails={"task": 5.0}), tmp_path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("log", [False, True])
def test_a_figure_of_what_there_is(tmp_path, log):
    """A bound, a run that diverged, one in which no episode has ended, a row with one seed, and a task with none."""
    from experiments.figures import plot_claim

    claim = replace(TOY, tasks=TOY.tasks | {"later": {"a": "x"}}, measures=("steps to 400",), x="seconds", log=log)
    for row, seed, changed in (
        ("a", 101, {"log": {"charts/episodic_return": []}}),
        ("a", 100, {}),
        ("b", 100, {}),
    ):
        runner.add(claim, tmp_path, Job("task", row, seed, claim.tasks["task"][row]), MADE | changed)
        assert plot_claim(claim, tmp_path, tmp_path).stat().st_size > 5000
    for seed in range(101, 105):
        runner.add(claim, tmp_path, Job("task", "b", seed, claim.tasks["task"]["b"]), HOW if seed == 104 else MADE)
    assert plot_claim(claim, tmp_path, tmp_path).stat().st_size > 5000


def test_a_figure_has_values_beside_its_curves_if_there_are_several_seeds(tmp_path, monkeypatch):
    from experiments import figures

    drawn, draw_values = [], figures.draw_values
    monkeypatch.setattr(figures, "draw_values", lambda *of: [drawn.append(of[1]), draw_values(*of)])
    for seed, shown in ((100, []), (101, [{"a": [5.0, 5.0]}])):
        runner.add(TOY, tmp_path, Job("task", "a", seed, TOY.tasks["task"]["a"]), MADE)
        figures.plot_claim(TOY, tmp_path, tmp_path)
        assert drawn == shown


def axes_of(draw, *args, **options):
    """What is read off axes that have been drawn on: the labels beside them, the scale and the limits of x."""
    from experiments import figures

    figure, axes = figures.plt.subplots()
    draw(axes, *args, **options)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    figures.plt.close(figure)
    return labels, axes.get_xscale(), *axes.get_xlim()


def test_a_value_that_is_a_bound_is_called_one():
    from experiments.figures import draw_values

    values = {"a": [1.0, 2.0], "b": [1.0, AtLeast(3.0)], "c": [AtLeast(3.0)] * 2}
    assert axes_of(draw_values, values, "x")[0] == ["a", "b (at least)", "c (not reached)"]


@pytest.mark.parametrize("lowest, scale", [(-100.0, "symlog"), (0.0, "symlog"), (1e-3, "log")])
def test_a_log_axis_shows_what_is_not_positive(lowest, scale):
    from experiments.figures import draw_values

    _, found, low, high = axes_of(draw_values, {"a": [lowest, 1e4]}, "x", log=True)
    assert found == scale and low < lowest and high > 1e4


def test_curves_of_which_one_is_much_longer_have_a_log_axis():
    """Which leaves out the beginning, where seconds are 0."""
    from experiments.figures import draw_curves, plt

    lines = {row: [np.array([[10, 0.0, 1], [20, end / 2, 2], [30, end, 3]])] for row, end in (("a", 1.0), ("b", 50.0))}
    assert draw_curves(plt.figure(), {"a": lines["a"]}, seconds=True).get_xscale() == "linear"
    axes = draw_curves(plt.figure(), lines, seconds=True)
    assert axes.get_xscale() == "log" and axes.get_xlim()[0] == 0.01 and axes.get_xlim()[1] > 50
    plt.close("all")


def test_more_than_three_rows_have_a_picture_each_beside_the_first():
    from experiments.figures import draw_curves, plt

    lines = {row: [np.array([[10, 1.0, 1], [20, 2.0, value]])] for row, value in zip("abcd", (2, 3, 4, 5))}
    for names, pictures in (("abc", 1), ("abcd", 4)):
        figure = plt.figure()
        draw_curves(figure, {row: lines[row] for row in names}, title="task")
        shown = [axes for axes in figure.axes if axes.get_visible()]
        assert len(shown) == pictures
    ends = [sorted({line.get_ydata()[-1] for line in axes.lines}) for axes in shown]
    assert ends == [[2], [2, 3], [2, 4], [2, 5]] and [axes.get_title() for axes in shown] == list("abcd")
    plt.close("all")


def test_two_laboratories_at_once_lose_nothing(tmp_path):
    claim = replace(TOY, tasks={"x": {"a": "x"}, "y": {"a": "y"}}, seeds=20)

    def one(task):
        for seed in range(100, 120):
            runner.add(claim, tmp_path, Job(task, "a", seed, task), MADE)

    processes = [get_context("fork").Process(target=one, args=task) for task in "xy"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(read(tmp_path / "toy.runs.csv")) == len(read(tmp_path / "toy.curves.csv")) / 51 == 40


def test_a_run_goes_on_from_its_checkpoint_and_is_made_once(tmp_path, monkeypatch):
    def happens(command, folder):
        folder.mkdir(exist_ok=True)
        if len(calls) == 1:
            (folder / "checkpoint.pt").touch()
            return "Killed"
        (folder / "results.json").write_text('{"env_steps": 100}')
        (folder / "metrics.csv").write_text("env_steps,seconds,tag,value\n50,0.5,charts/episodic_return,4.0\n")

    calls = fake_processes(monkeypatch, happens)
    job = Job("task", "a", 100, "experiments.variants.gradient_variance sac --total-timesteps 100")
    with pytest.raises(RuntimeError, match="Killed"):
        run(job, tmp_path)
    for _ in range(2):
        made = run(job, tmp_path)
        assert (made["results"], made["log"]) == ({"env_steps": 100}, LOG)
    (first, second), target = calls, ["-m", "experiments.variants.gradient_variance", "sac"]
    assert first[1:4] == second[1:4] == target
    assert first[4:6] == ["--total-timesteps", "100"] and first[-2:] == ["--seed", "100"]
    assert second[4] == "--resume" and len(second) == 6
    run(job, tmp_path, timed=True)  # not with the seconds of one that had company
    assert len(calls) == 3


def test_a_run_that_goes_on_elsewhere_has_the_circumstances_of_all_its_starts(tmp_path, monkeypatch):
    where = iter([("c1", "torch 1", "Intel", "May"), ("c1", "torch 2", "AMD", "May"), ("c3", "torch 2", "Arm", "June")])

    def happens(command, folder):
        folder.mkdir(exist_ok=True)
        (folder / "checkpoint.pt").touch()
        if "--resume" not in command:
            return "Killed"
        (folder / "results.json").write_text('{"env_steps": 100}')

    fake_processes(monkeypatch, happens)
    monkeypatch.setattr(runner, "circumstances", lambda: next(where))
    job = Job("task", "a", 100, "a2c_sync.py")
    with pytest.raises(RuntimeError, match="Killed"):
        run(job, tmp_path)
    for _ in range(2):  # the second one finds it done, on the third machine
        assert run(job, tmp_path)["circumstances"] == ("c1", "torch 1 then torch 2", "Intel then AMD", "May")


def test_the_peers_log_is_on_the_disk_when_it_goes_on(tmp_path, monkeypatch):
    """Or the episodes before its checkpoint would be lost with a kill before the next one."""
    from experiments import peers

    class SAC:
        num_timesteps, seeds = 50, []
        load = classmethod(lambda cls, *_, **__: cls())
        set_random_seed = seeds.append
        load_replay_buffer = save = save_replay_buffer = lambda *_: None

        def learn(self, *_, **__):
            raise RuntimeError((tmp_path / "metrics.csv").read_text())

    for name, content in (
        ("", {"SAC": SAC}),
        (".common", {}),
        (".common.callbacks", {"BaseCallback": object}),
        (".common.monitor", {"Monitor": lambda env: env}),
        (".common.vec_env", {"DummyVecEnv": lambda _: None, "VecNormalize": None}),
    ):
        monkeypatch.setitem(sys.modules, f"stable_baselines3{name}", SimpleNamespace(**content))
    text = "env_steps,seconds,tag,value\n50,0.500,charts/episodic_return,4.0\n"
    (tmp_path / "metrics.csv").write_text(text + "90,0.900,charts/episodic_return,5.0\n")
    (tmp_path / "args.json").write_text('{"env_id": "Hopper-v5"}')
    with pytest.raises(RuntimeError, match=text):  # and not the one after the checkpoint
        peers.main(peers.Options(resume=str(tmp_path)))
    assert SAC.seeds == [peers.Options.seed + 50]  # Stable-Baselines3 begins anew with the first one


def test_a_variant_with_a_state_of_its_own_is_made_anew(tmp_path, monkeypatch):
    def happens(command, folder):
        folder.mkdir()  # there must be none
        (folder / "checkpoint.pt").touch()
        return "Killed"

    calls = fake_processes(monkeypatch, happens)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Killed"):
            run(Job("task", "a", 100, "experiments.variants.a2c_lag --lag 4"), tmp_path)
    assert len(calls) == 2 and not any("--resume" in command for command in calls)
    assert runner.ANEW <= set(VARIANTS)


def test_a_variants_folder_is_not_the_scripts(tmp_path):
    """Or the script would go on without the change, and `curves` would take both for one."""
    words = [sys.executable, "-m", "experiments.variants.a2c_truncation", "--run-dir", str(tmp_path / "run")]
    options = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True}
    flags = "--total-timesteps 400 --eval-episodes 1 --checkpoint-every 200".split()
    assert subprocess.run([*words, *flags], **options).returncode == 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["script"] == "a2c_truncation"
    more = ["--resume", str(tmp_path / "run"), "--total-timesteps", "800"]
    status, _, err = finish(start("a2c_sync.py", *more, cwd=ROOT))
    assert status != 0 and "was made by a2c_truncation.py; resume it with that script" in err
    assert subprocess.run([*words[:3], *more], **options).returncode == 0
    status, _, err = finish(start("evaluate.py", tmp_path / "run", cwd=ROOT))
    assert status != 0 and "none of the scripts here" in err


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_laboratory_leaves_no_run_behind_and_goes_on(tmp_path, how):
    """Or one whose terminal closes: its run is killed, and goes on from its checkpoint as if nothing had been."""
    options = {"cwd": ROOT, "env": environment() | {"PYTHONPATH": str(ROOT)}, "stdout": subprocess.PIPE, "text": True}

    def words(folder):
        claim = "from experiments import __main__ as m, claims; rows = {'a': 'a2c_sync.py --total-timesteps 60000'}; "
        claim += "m.CLAIMS[:] = [claims.Claim('toy', '', '', {'t': rows}, [], seeds=1)]; "
        claim += f"import pathlib; m.DATA = m.DOCS = pathlib.Path({str(folder)!r}); m.cli()"
        return [sys.executable, "-c", claim, "run", "toy", "--out", str(folder / "runs")]

    process = subprocess.Popen(words(tmp_path / "stopped"), stderr=subprocess.PIPE, **options)
    wait_for(lambda: list(tmp_path.glob("stopped/runs/*/checkpoint.pt")))
    process.send_signal(how)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1 and "Stopped; the same command goes on." in err, out + err
    (folder,) = tmp_path.glob("stopped/runs/*")
    assert not (folder / "results.json").exists()
    for name in ("stopped", "whole"):
        done = subprocess.run(words(tmp_path / name), stderr=subprocess.PIPE, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / name / "figures" / "claim_toy.png").exists()
    (stopped,), (whole,) = (read(tmp_path / name / "toy.runs.csv") for name in ("stopped", "whole"))
    assert stopped["seed"] == "100"
    assert all(stopped[name] == whole[name] for name in ("return", "training return"))


def test_overestimation_is_measured_without_the_time_limit_and_the_return_with_it(tmp_path):
    flags = "--total-timesteps 210 --learning-starts 200 --eval-episodes 2 --run-dir".split()
    words = [sys.executable, "-m", "experiments.variants.sac_overestimation", *flags, str(tmp_path / "run")]
    subprocess.run(words, check=True, capture_output=True, cwd=ROOT, env=environment())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["eval_return_mean"] > -16.3 * 200  # Pendulum-v1 costs at most 16.3 a step
    assert results["overestimation"] == pytest.approx(results["Q"] - results["discounted return"]) != 0
    assert results["error of Q"] == abs(results["overestimation"])


def test_curves_of_run_folders(tmp_path, monkeypatch):
    """Those that differ in nothing but their seed are one curve; one of them is still going on."""
    words = ["experiments", "curves", *(str(tmp_path / name) for name in "abc"), "--out", str(tmp_path / "curves.png")]
    monkeypatch.setattr("sys.argv", words)
    drawn = []
    monkeypatch.setattr("experiments.figures.plot_runs", lambda groups, *_: drawn.append(groups))
    for name, seed, gamma in (("a", 1, 0.9), ("b", 2, 0.9), ("c", 1, 0.8)):
        (tmp_path / name).mkdir()
        flags = {"script": "a2c_sync", "env_id": "CartPole-v1", "seed": seed, "gamma": gamma, "total_timesteps": 100}
        (tmp_path / name / "args.json").write_text(json.dumps(flags))
    with pytest.raises(SystemExit, match="No episode has ended"):  # nor is there a metrics.csv
        cli()
    for wrong, message in ((words[:2], "at least one"), ([*words[:3], "--out", str(tmp_path)], "must end in .png")):
        monkeypatch.setattr("sys.argv", wrong)
        with pytest.raises(SystemExit, match=message):
            cli()
    monkeypatch.setattr("sys.argv", words)
    for name in "abc":
        text = "env_steps,seconds,tag,value\n50,0.5,charts/episodic_return,4.0\n90,0.9,charts/epi"
        (tmp_path / name / "metrics.csv").write_text(text)
    cli()
    (groups,) = drawn
    assert {label: len(runs) for label, runs in groups.items()} == {
        "a2c_sync.py CartPole-v1 gamma 0.9": 2,
        "a2c_sync.py CartPole-v1 gamma 0.8": 1,
    }
    (tmp_path / "a" / "metrics.csv").write_text("no,csv\n1,2\n")
    with pytest.raises(SystemExit, match="damaged"):
        cli()


# --- Declarations and the page ----------------------------------------------------------------------------------------


def test_a_claims_commands_can_be_run():
    for claim in CLAIMS:
        for job in jobs_of(claim, 1):
            assert job.source().is_file()
            if job.source().parent != ROOT:  # may have flags of its own: the quick run of all claims knows
                continue
            script = importlib.import_module(script_of(job))
            args = tyro.cli(script.Args, args=[*job.words()[1], *shlex.split(runner.QUICK[script_of(job)])])
            check_ranges(args)
            script.check_flags(args)


def test_a_claim_expects_something_of_what_it_measures():
    for claim in CLAIMS:
        rows = {row for each in claim.tasks.values() for row in each}
        assert claim.expected and claim.seeds >= 1
        for expect in claim.expected:
            asked = {"better", "worse", "row"} & vars(expect).keys()
            assert {getattr(expect, name) for name in asked} <= rows, expect
            assert {expect.measure, getattr(expect, "than", None) or expect.measure} <= set(claim.measures), expect
            assert expect.task is None or expect.task in claim.tasks


def test_the_page_is_made_of_the_data_in_the_repository(tmp_path):
    pages = {claim.page for claim in CLAIMS}
    for page in pages:
        shutil.copy(ROOT / "docs" / page, tmp_path)
    for claim in CLAIMS:  # which report writes, too
        assert (DATA / f"{claim.name}.txt").read_text() == commands(claim, DATA).strip() + "\n"
    report(CLAIMS, DATA, tmp_path)
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text()
    for claim in CLAIMS:
        for row in read(DATA / f"{claim.name}.runs.csv"):
            assert int(row["seed"]) >= runner.FIRST_SEED
            assert claim.tasks[row["task"]][row["row"]] == row["command"], f"{claim.name}: made by another command"


def test_a_finding_has_its_numbers_from_the_data():
    number = r"-?\d+(?:,\d{3})*(?:\.\d+)?"
    for claim in (claim for claim in CLAIMS if claim.finding):
        begin, end = f"<!-- {claim.name}: made", f"<!-- end of {claim.name} "
        made = (ROOT / "docs" / claim.page).read_text().partition(begin)[2].partition(end)[0]
        assert {*re.findall(number, claim.finding)} <= {*re.findall(number, made)}, claim.name


def test_what_is_copied_from_the_tables_stands_in_them():
    """README's results, and the column "Ours" beside what others publish."""
    readme, results, claims = ((ROOT / name).read_text() for name in ("README.md", "docs/results.md", "docs/claims.md"))
    made = "".join(re.findall(r"<!-- [\w-]+: made by .*?<!-- end of ", results + claims, re.DOTALL))
    for page, head, column in ((readme, "| Greedy return | Seeds |\n", -3), (results, "| Theirs | Ours |\n", -2)):
        _, *rows = page.partition(head)[2].partition("\n\n")[0].splitlines()
        cells = [re.sub(r"\(.*?\)", "", row.split("|")[column]) for row in rows]
        copied = {number for cell in cells for number in re.findall(r"-?\d[\d.,]*\d(?: \[.*?\])?", cell)}
        wrong = [each for each in copied if not re.search(rf"(?<![\d,.-]){re.escape(each)}(?![\d.,]*\d)", made)]
        assert len(copied) >= 6 and not wrong


def test_the_figures_are_of_the_data_in_the_repository():
    from experiments.figures import README, digest

    for claim in CLAIMS:
        if (DATA / f"{claim.name}.runs.csv").exists():
            with Image.open(ROOT / "docs" / "figures" / f"claim_{claim.name}.png") as figure:
                assert figure.text["Description"] == digest(claim, DATA), f"python -m experiments plot {claim.name}"
    with Image.open(ROOT / "docs" / "figures" / "readme.png") as figure:
        shown = [digest(claim, DATA) for name, _ in README for claim in CLAIMS if claim.name == name]
        assert figure.text["Description"].split() == shown, "python -m experiments plot all"


def test_a_claims_block_has_the_numbers(tmp_path):
    assert block(TOY, tmp_path).startswith("Not measured yet.")
    assert (
        commands(TOY, tmp_path)
        .strip()
        .endswith("python a2c_sync.py --gamma 0.9 --seed 100\npython a2c_sync.py --seed 100")
    )
    rows = [("a", seed, value) for seed, value in enumerate(HIGH, 100)] + [("b", s, v) for s, v in enumerate(LOW, 100)]
    names = runner.RUN + ["return", "training return"]
    data = [
        dict.fromkeys(names, "1") | {"task": "task", "row": row, "seed": seed, "command": "x", "return": value}
        for row, seed, value in rows
    ]
    runner.write(tmp_path / "toy.runs.csv", names, data)
    ((task, _, found, answer),) = judged(TOY, read(tmp_path / "toy.runs.csv"))
    assert (task, answer) == ("task", "yes") and re.fullmatch(r"9 \[[678][.\d]*, 1[01][.\d]*\]", found)
    text = block(TOY, tmp_path)
    assert "What was expected: 1 yes, 0 no, 0 open (seeds 100 to 104, 6 runs by earlier code)" in text  # if declared
    assert re.search(r"\| task \| a \| 12 \[1\d[.\d]*, 1\d[.\d]*\] \| 1 \[1, 1\] \|", text)
    aims = block(replace(TOY, page="results.md", expected=[Reach("a", 13)]), tmp_path)
    assert "return | aim |" in aims and "| 1 [1, 1] | 13: no |\n" in aims and "at least" not in aims
    assert "<details>" not in aims and "<details>" in text
    assert commands(TOY, tmp_path).startswith("python -m x --seed 100")
    assert "](#toys-d0) |  | 1 yes, 0 no, 0 open † | 5 |" in overview([TOY], tmp_path)
    assert slug("A, b. (D1)") == "a-b-d1"
    assert "chance alone would answer about 0 of them" in overview([TOY], tmp_path)
    runner.write(tmp_path / "toy.runs.csv", names, data[:3])
    assert "| task | a | 11 (3 seeds) | 1 (3 seeds) |" in block(TOY, tmp_path)
    points = [dict(zip(runner.POINT, ("task", "a", seed, steps, 1, 1))) for seed, steps in ((100, 40), (103, 90))]
    runner.write(tmp_path / "toy.curves.csv", runner.POINT, points)
    assert "| a | 11 (3 seeds) † | 3 | 40 | 0.0, 1 |" in results_table([TOY], tmp_path)  # no run has seed 103 now
    runner.write(tmp_path / "toy.runs.csv", names, [data[1] | {"seconds of run": runner.DIVERGED}])
    assert "| a | diverged † | 1 | 0 |" in results_table([TOY], tmp_path)
    rated = replace(TOY, tasks={"task": {"a": "x", "a" + RATES[0]: "x", "a" + RATES[1]: "x"}})
    runner.write(tmp_path / "toy.runs.csv", names, data[:3] + [row | {"row": "a" + RATES[1]} for row in data[:2]])
    assert "|  | return | rate / 2 | rate / 10 | training" in block(rated, tmp_path)
    assert "| task | a | 11 (3 seeds) |  | 10.5 (2 seeds) | 1 (3 seeds) |" in block(rated, tmp_path)
    measures = Claim("toy", "", "", {"one": {"": "x"}, "two": {"": "x"}}, [], measures=("return", "training return"))
    runner.write(tmp_path / "toy.runs.csv", names, [row | {"task": "two", "row": ""} for row in data[:5]])
    assert re.search(r"\|  \| one \| two \|\n\|---\|---\|---\|\n\| return \|  \| 12 \[", block(measures, tmp_path))


VARIANTS = sorted(path.stem for path in (ROOT / "experiments" / "variants").glob("*.py"))


@pytest.mark.parametrize("word, status", [("report", 1), ("list", 0)])
def test_a_package_that_is_missing_is_named(word, status):
    """The list needs none of them."""
    hide = "import sys; sys.modules |= dict.fromkeys(('scipy', 'filelock', 'matplotlib')); sys.argv = ['x', '%s']; "
    hide += "from experiments.__main__ import cli; cli()"
    done = subprocess.run(
        [sys.executable, "-c", hide % word], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == status and ("scipy" in done.stderr and done.stderr.count("\n") == 1) == (word == "report")
    assert ("trunk" in done.stdout and "figures/claim_trunk.png" in done.stdout) == (word == "list")


def test_every_variant_is_in_a_claim_and_short():
    used = {job.source().stem for claim in CLAIMS for job in jobs_of(claim, 1) if "variants" in str(job.source())}
    assert used == set(VARIANTS)


@pytest.mark.slow
def test_every_claim_quickly_from_run_to_page(tmp_path):
    """The whole laboratory: no run fails, every claim has a figure and a table."""
    words = [sys.executable, "-m", "experiments", "run", "all", "--quick", "--out", str(tmp_path / "a folder")]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = "".join((tmp_path / "a folder" / page).read_text() for page in {claim.page for claim in CLAIMS})
    for claim in CLAIMS:
        assert (tmp_path / "a folder" / "figures" / f"claim_{claim.name}.png").stat().st_size > 5000
        runs = read(tmp_path / "a folder" / "data" / f"{claim.name}.runs.csv")
        assert len(runs) == len(jobs_of(claim, 1))
        assert all(math.isfinite(float(run[name])) for run in runs for name in claim.measures if run[name])
        assert f"<!-- end of {claim.name} -->" in text
    assert "not measured yet" not in text.lower()
