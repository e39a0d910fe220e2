"""--matmul-precision: auto takes another route only if it is as exact and faster, and stays with what it took."""

import time
from dataclasses import replace

import pytest
import torch
from helpers import checkpoint, results

import a2c_sync
from common import precision
from common.precision import choose_precision, get_precision, set_precision
from common.run import Run
from evaluate import load_args

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored():
    before = get_precision()
    yield
    set_precision(*before)


def routes(monkeypatch, medium, seconds=None):
    """Products as a processor might make them: at "medium" by the function given, and each taking so many seconds."""
    seconds = {"highest": 0.002, "medium": 0.001} | (seconds or {})

    def multiply(a, b):
        now = torch.get_float32_matmul_precision()
        time.sleep(seconds[now])
        return medium(a, b) if now == "medium" else a @ b

    monkeypatch.setattr(precision, "multiply", multiply)


def exact(a, b):
    set_precision("highest")
    return a @ b


def bfloat16(a, b):
    return (a.bfloat16() @ b.bfloat16()).float()


LAYER = torch.nn.Linear(256, 256)


def test_auto_takes_the_faster_of_two_exact_routes(monkeypatch):
    routes(monkeypatch, exact)
    assert choose_precision("auto", LAYER, CPU) == "medium"


def test_auto_refuses_bfloat16_however_fast(monkeypatch):
    routes(monkeypatch, bfloat16)
    assert choose_precision("auto", LAYER, CPU) == "highest"


def test_auto_wants_a_clear_margin(monkeypatch):
    routes(monkeypatch, exact, {"highest": 0.0011})
    assert choose_precision("auto", LAYER, CPU) == "highest"


def test_auto_on_this_machine_is_as_exact_as_float32():
    generator, before = torch.get_rng_state(), get_precision()
    set_precision(choose_precision("auto", LAYER, CPU))
    a, b = torch.randn(2, 256, 256)
    error = (a @ b - a.double() @ b.double()).abs().max()
    set_precision("highest")
    assert error <= 3 * (a @ b - a.double() @ b.double()).abs().max()
    set_precision(*before)
    torch.set_rng_state(generator)
    choose_precision("auto", LAYER, CPU)
    assert get_precision() == before and torch.equal(torch.get_rng_state(), generator)  # nothing else changes


@pytest.mark.parametrize("wanted", ["highest", "high", "medium"])
def test_what_was_asked_for_is_taken(wanted):
    assert choose_precision(wanted, LAYER, CPU) == choose_precision(wanted, LAYER, CPU, "highest") == wanted


def test_on_a_gpu_auto_is_highest(monkeypatch):
    routes(monkeypatch, exact)
    assert choose_precision("auto", LAYER, torch.device("cuda")) == "highest"
    assert choose_precision("auto", LAYER, torch.device("cuda"), saved="medium") == "highest"


def test_what_auto_took_elsewhere_is_kept_where_it_is_exact(monkeypatch):
    routes(monkeypatch, exact, {"medium": 0.003})
    assert choose_precision("auto", LAYER, CPU, saved="medium") == "medium"
    routes(monkeypatch, bfloat16)
    assert choose_precision("auto", LAYER, CPU, saved="medium") == "highest"


@pytest.mark.parametrize("found, other", [("medium", "highest"), ("highest", "medium")])
def test_a_resumed_run_keeps_what_auto_took(workdir, monkeypatch, found, other):
    def train(**flags):
        a2c_sync.train(replace(load_args("run"), **flags))
        assert get_precision() == ("highest", "none")  # of the caller, again
        return results("run")["matmul_precision"]

    monkeypatch.setattr("common.run.choose_precision", lambda *args: found)
    a2c_sync.train(a2c_sync.Args(total_timesteps=64, run_dir="run", num_envs=2, eval_episodes=1))
    assert checkpoint("run")["matmul_precision"] == results("run")["matmul_precision"] == found
    monkeypatch.setattr("common.run.choose_precision", choose_precision)
    routes(monkeypatch, exact, {found: 0.002, other: 0.001})  # today it would be the other one
    assert train(total_timesteps=128) == found
    assert train(total_timesteps=192, matmul_precision=other) == other
    monkeypatch.undo()
    monkeypatch.chdir(workdir)
    monkeypatch.setattr("common.run.choose_precision", lambda *args: str(args[3]))
    assert train(total_timesteps=256, matmul_precision="auto") == "None"  # an asked-for one is no choice of auto's


def test_a_run_that_leaves_the_gpu_chooses_anew(workdir, monkeypatch):
    save = Run.save

    def save_as_on_a_gpu(run):
        device, run.device = run.device, torch.device("cuda")
        save(run)
        run.device = device

    with monkeypatch.context() as there:
        there.setattr(Run, "save", save_as_on_a_gpu)
        a2c_sync.train(a2c_sync.Args(total_timesteps=64, run_dir="run", num_envs=2, eval_episodes=1))
    assert checkpoint("run")["matmul_precision"] is None
    routes(monkeypatch, exact)  # oneDNN is the faster one
    a2c_sync.train(replace(load_args("run"), total_timesteps=128))
    assert results("run")["matmul_precision"] == checkpoint("run")["matmul_precision"] == "medium"
