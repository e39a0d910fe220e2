"""Under torchrun, several ranks learn what one process with all environments would learn."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
import toy_ranks
from conftest import ROOT, environment
from gymnasium.wrappers.utils import RunningMeanStd
from helpers import checkpoint, metrics, processes, results, same, wait_for

from a2c_sync import Args
from common import ranks
from common.checkpoint import random_state, restore_random
from common.flags import UserError
from common.run import Run


def on_ranks(size, folder, plain_mean=False):
    context = mp.get_context("forkserver")
    processes = [
        context.Process(target=toy_ranks.rank, args=(i, size, str(folder), plain_mean), daemon=True)
        for i in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(size)]


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory):
    return on_ranks(request.param, tmp_path_factory.mktemp("ranks"))


def difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("case", toy_ranks.CASES)
def test_updates_are_those_of_one_process_with_all_environments(found, case):
    wanted = toy_ranks.learn(case)
    for each in found:
        assert each[case].keys() == wanted.keys()
        assert difference(each[case], wanted) < (2e-6 if case == "pixels" else 1e-12)
    assert all(same(each[case], found[0][case]) for each in found)  # to the last bit, or they would drift apart


def test_statistics_of_observations_are_those_of_one_process(found):
    rms = RunningMeanStd(shape=(3,))
    for x in toy_ranks.observations():
        rms.update(x)
    for each in found:
        for name, value in each["moments"].items():
            torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(getattr(rms, name)), rtol=1e-6, atol=0)


def test_everybody_hears_of_everybody(found):
    assert all(each["others"] == list(range(len(found))) for each in found)


def test_a_plain_mean_over_ranks_would_be_another_update(tmp_path):
    """The comparison above would notice."""
    for case, each in on_ranks(2, tmp_path, plain_mean=True)[0].items():
        if case in toy_ranks.CASES:
            assert difference(each, toy_ranks.learn(case)) > 2e-5


def test_shares_of_the_environments(monkeypatch):
    monkeypatch.setattr(ranks, "SIZE", 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "RANK", rank)
        shares.append(ranks.part(8))
    assert shares == [3, 3, 2]


@pytest.fixture
def one_of_two(monkeypatch):
    """A run of which another rank exists in imagination: what it adds to each number of ranks.total."""
    others = []
    monkeypatch.setattr(ranks, "SIZE", 2)
    monkeypatch.setattr(ranks, "total", lambda *own: [a + b for a, b in zip(own, others, strict=True)])
    monkeypatch.setattr(ranks, "gathered", lambda thing: [thing, [[(0, 1.5, 3)], [(1, 2.5, 4)]]])
    logged = SimpleNamespace(rows=[], ended=[])
    logged.log = lambda *row: logged.rows.append(row)
    logged.episodes = lambda *row: logged.ended.append(row)
    logged.progress = lambda env_steps: None
    run = Run.__new__(Run)
    run.args, run.logger, run.env_steps, run._new_steps, run._next_log = Args(), logged, 10, 0, 0
    run._stop_signal, run._all_stop = None, False
    return run, others


def test_steps_of_all_ranks_count_and_one_signal_stops_them(one_of_two):
    run, others = one_of_two
    run.count(6, [])
    run.count(4, [])
    others[:] = 30, 0
    assert run.new_steps() == 40 and run.env_steps == 50 and run.share == 0.25
    run._stop_signal = signal.SIGINT
    assert not run._stops()  # not before all have heard of it
    others[:] = 0, 0
    assert run.new_steps() == 0 and run.env_steps == 50 and run.share == 0 and run._stops()
    run._stop_signal, others[:] = None, (5, 1)
    assert run.new_steps() == 5 and run._stops()


def test_losses_are_the_means_over_all_transitions(one_of_two):
    run, others = one_of_two
    run.share, others[:] = 0.25, (0.75 * 8.0, 0.75 * 2.0)
    run.log({"critic_loss": torch.tensor(4.0), "entropy": torch.tensor(1.0)})
    assert run.logger.rows == [(10, {"critic_loss": 7.0, "entropy": 1.75})]
    assert run.logger.ended == [(10, [(0, 1.5, 3)]), (10, [(1, 2.5, 4)])]  # of the other rank


def test_every_rank_has_seeds_of_its_own(monkeypatch):
    run = Run.__new__(Run)
    run.args, run.env_steps, seeds, draws = Args(), 0, [Run.env_seed(SimpleNamespace(args=Args(), env_steps=0))], []
    monkeypatch.setattr(ranks, "SIZE", 2)
    for rank in range(2):
        monkeypatch.setattr(ranks, "RANK", rank)
        seeds.append(run.env_seed())
        state = ranks.own_random_state({"env_steps": 5, "random": random_state(), "ranks": []}, run.args)
        restore_random(state)
        draws.append(torch.rand(1).item())
    assert seeds[0] == seeds[1] != seeds[2] and draws[0] != draws[1]  # the first one's are a single process's


@pytest.fixture
def restart(monkeypatch, workdir):
    """The folder of a job that torchrun has restarted."""
    monkeypatch.setattr(ranks, "RESTARTED", True)
    monkeypatch.setattr(ranks, "JOB", "this one")
    Path("run").mkdir()

    def made_by(job):
        Path("run/args.json").write_text(json.dumps({"script": "a2c_sync", "job": job, "gamma": 0.5}))

    return made_by


def test_a_restart_goes_on_with_its_own_job_only(restart):
    args = Args(run_dir="run", gamma=0.9)
    restart("this one")
    Path("run/checkpoint.pt").touch()
    found = ranks.restarted(args)
    assert found.resume == "run" and found.gamma == 0.5 and found.run_dir is None
    restart("another")
    assert ranks.restarted(args) is args and Path("run/checkpoint.pt").exists()  # which is then refused: in use
    with pytest.raises(UserError, match="needs --run-dir"):
        ranks.restarted(Args())


def test_a_restart_before_the_first_checkpoint_begins_anew(restart):
    restart("this one")
    args = Args(run_dir="run")
    assert ranks.restarted(args) is args and not Path("run").exists()


def test_only_a_lost_rank_is_one(monkeypatch):
    monkeypatch.setattr(ranks, "SIZE", 2)
    with pytest.raises(RuntimeError, match="physics"):
        ranks.lost(RuntimeError("Connection to the physics server lost by its peer"))
    assert "has lost the others" in ranks.lost(
        RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:547] peer")
    )


def test_what_torchrun_is_not_for_is_refused(monkeypatch):
    monkeypatch.setattr(ranks, "SIZE", 2)
    for args, script in ((Args(compile=True), "a2c_sync"), (Args(num_envs=1), "a2c_sync"), (Args(), "sac")):
        with pytest.raises(UserError):
            ranks.check(args, Path(f"{script}.py"))
    ranks.check(Args(), Path("a2c_sync.py"))


# --- torchrun ---------------------------------------------------------------------------------------------------------


def torchrun(*words, size=2, options=(), cwd=None):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", size, *(options or ["--standalone"])]
    cwd = cwd or os.getcwd()
    return subprocess.Popen(
        [*map(str, command), ROOT / "a2c_sync.py", *map(str, words)], cwd=cwd, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )  # fmt: skip


def finish(process, code=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return out, err


FLAGS = "--num-envs 5 --num-steps 4 --total-timesteps 2000 --eval-episodes 1 --normalize-obs --network shared".split()


def test_a_whole_job(workdir):
    """Counted as one, written by one; resumed by as many ranks it goes on to the bit, by one with a word about it."""
    finish(torchrun(*FLAGS, "--checkpoint-every", 500, "--run-dir", "whole"))
    end, saved = results("whole"), checkpoint("whole")
    assert 2000 <= end["env_steps"] < 2000 + 20 and end["updates"] >= 100 and len(saved["ranks"]) == 2
    assert not torch.equal(saved["ranks"][0]["torch"], saved["ranks"][1]["torch"])  # each draws noise of its own
    with open("whole/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    lengths = sum(float(row["value"]) for row in rows if row["tag"] == "charts/episodic_length")
    assert 0.75 * end["env_steps"] < lengths <= end["env_steps"]  # of all ranks, but for episodes cut off by resets
    steps = [int(row["env_steps"]) for row in rows if row["tag"] == "losses/critic_loss"]
    assert steps == sorted(set(steps)) and any(row["tag"] == "losses/trunk_grad_cosine" for row in rows)


@pytest.mark.slow
def test_signals_and_resumption(workdir):
    long = [*FLAGS, "--total-timesteps", 200_000, "--run-dir", "run"]
    process = torchrun(*long)
    wait_for(lambda: Path("run/metrics.csv").exists() and len(metrics("run")) > 50, 60)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process, 1)
    assert err.count("Stopped at environment step") == 1
    stopped = checkpoint("run")["env_steps"]
    more = ["--resume", "run", "--total-timesteps", stopped + 1000]
    _, err = finish(torchrun(*more))
    assert "new seeds" not in err and results("run")["env_steps"] >= stopped + 1000
    more[-1] += 1000
    done = subprocess.run([sys.executable, ROOT / "a2c_sync.py", *map(str, more)], capture_output=True, text=True)
    assert done.returncode == 0 and "1 ranks instead of 2" in done.stderr
    more[-1] += 1000
    _, err = finish(torchrun(*more, size=3))
    assert err.count("3 ranks instead of 1") == 1


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(10))
def test_killed_ranks_cost_nothing(workdir, trial):
    """SIGKILL of any rank at any moment, under --max-restarts, with torchrun's own rendezvous and with c10d's."""
    long = [*FLAGS, "--total-timesteps", 12_000, "--checkpoint-every", 2_000]
    c10d = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{29600 + trial}", "--rdzv-id", f"job{trial}"]
    options = ["--max-restarts", "3", *(c10d if trial % 2 else ["--standalone"])]
    finish(torchrun(*long, "--run-dir", "whole", options=options))
    rng, process = random.Random(trial), torchrun(*long, "--run-dir", "killed", options=options)
    for _ in range(2):
        before = Path("killed/checkpoint.pt").stat().st_mtime_ns if Path("killed/checkpoint.pt").exists() else 0
        path = Path("killed/checkpoint.pt")
        wait_for(lambda: path.exists() and path.stat().st_mtime_ns > before or process.poll() is not None, 60)
        time.sleep(rng.uniform(0, 0.6))
        if process.poll() is None and (victims := [pid for pid, parent, *_ in processes() if parent == process.pid]):
            os.kill(rng.choice(victims), signal.SIGKILL)
    finish(process)
    whole, killed = checkpoint("whole")["parts"], checkpoint("killed")["parts"]
    for optimizer in (whole["optimizer"], killed["optimizer"]):
        for group in optimizer["param_groups"]:
            del group["lr"]  # of a run that was killed in its evaluation: not that of its last update
    assert same(whole, killed)
    assert metrics("whole") == metrics("killed") and results("whole") == results("killed")


@pytest.mark.slow
def test_thirty_launches_end_in_order(workdir):
    for k in range(30):
        finish(torchrun(*FLAGS, "--total-timesteps", 200, "--run-dir", f"run{k}"))


def test_other_scripts_and_flags_are_refused_in_one_sentence(workdir):
    _, err = finish(torchrun("--num-envs", 1, "--run-dir", "run"), 1)
    assert err.count("error:") == 1 and "does not give each of 2 ranks" in err and not Path("run").exists()
