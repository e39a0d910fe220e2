"""Under torchrun, several ranks learn what one process with all environments would learn (D5)."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import toy_ranks
from conftest import ROOT, environment
from gymnasium.wrappers.utils import RunningMeanStd
from helpers import checkpoint, metrics, processes, results, same, wait_for

import a2c_sync
from a2c_sync import Args
from common import ranks
from common.checkpoint import random_state, restore_random
from common.flags import UserError


def on_ranks(target, size, folder):
    """What target(rank, size) returns on each rank, as a process of its own."""
    Process, args = mp.get_context("forkserver").Process, [(target, rank, size, str(folder)) for rank in range(size)]
    started = [Process(target=toy_ranks.run_as_rank, args=each, daemon=True) for each in args]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(300)
            assert process.exitcode == 0
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def test_updates_and_statistics_of_observations_are_those_of_one_process_with_all_environments(tmp_path):
    """On three ranks, of which the first one has no transition in the second of three updates."""
    shares, rms = on_ranks(toy_ranks.learn_share, 3, tmp_path), RunningMeanStd(shape=(3,))
    for case in toy_ranks.CASES:
        wanted = toy_ranks.learn(case)
        for found in (share[case] for share in shares):
            assert found.keys() == wanted.keys()
            difference = max((found[name] - wanted[name]).abs().max() for name in wanted)
            assert difference < (2e-6 if case == "pixels" else 1e-12), case
            assert same(found, shares[0][case])  # to the last bit, or they would drift apart
    for x in toy_ranks.observations():
        rms.update(x)
    for name, value in ((name, value) for share in shares for name, value in share["moments"].items()):
        torch.testing.assert_close(value, torch.as_tensor(getattr(rms, name)), rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """What two ranks with two environments each have seen, and the folder."""
    folder = tmp_path_factory.mktemp("job")
    return *on_ranks(toy_ranks.train_job, 2, folder), folder


def test_a_job_makes_the_updates_of_one_process_with_all_environments(job):
    """The first update by hand, from the rollouts of both ranks; and at the end all have the same parameters."""
    one, other, folder = job
    args = Args(**toy_ranks.JOB)
    envs = a2c_sync.make_envs(args)
    agent = a2c_sync.make_agent(envs, args)
    agent.load_state_dict(one["before"])
    batch = a2c_sync.Rollout(*(torch.cat(parts, 1) for parts in zip(one["batches"][0], other["batches"][0])))
    valid = [(1 - rank["batches"][0][-1][:-1]).sum().item() for rank in (one, other)]
    assert valid[0] != valid[1]  # a plain mean over ranks would be another update
    losses = a2c_sync.update(agent, a2c_sync.make_optimizer(agent, args), batch, args)
    for name, p in agent.named_parameters():
        step, error = p - one["before"][name], p - one["after"][name]
        assert step.abs().max() > 0 and error.abs().max() < 2e-3 * step.abs().max()
    for when in "before", "after", "end", "rms":
        assert same(one[when], other[when])
    logged = {tag: float(value) for step, tag, value in metrics(folder / "whole") if step == sum(valid)}
    for name, value in losses.items():  # means over the transitions of both
        assert logged[f"losses/{name}"] == pytest.approx(value.item(), rel=1e-5)


def test_a_job_counts_all_transitions_and_episodes_and_each_rank_has_its_own_noise(job):
    one, other, folder = job
    done = [torch.stack([batch[-1] for batch in rank["batches"]]) for rank in (one, other)]  # (updates, T + 1, N)
    end, rows = results(folder / "whole"), metrics(folder / "whole")
    assert end["env_steps"] == sum((1 - each[:, :-1]).sum() for each in done) >= 800
    assert [tag for _, tag, _ in rows].count("charts/episodic_length") == sum(each[:, 1:].sum() for each in done)
    assert end["updates"] == len(one["batches"]) == len(other["batches"])
    assert all(x != y for x, y in zip(one["noise"], other["noise"], strict=True))  # torch's, NumPy's and Python's
    assert not torch.equal(*(rank["batches"][0][0][0] for rank in (one, other)))  # environments have their own seeds
    assert any(tag == "losses/trunk_grad_cosine" for _, tag, _ in rows)


def test_a_job_is_resumed_to_the_bit_and_a_signal_to_one_rank_stops_all_and_a_refusal_ends_all(job):
    one, other, folder = job
    whole, part = (checkpoint(folder / name) for name in ("whole", "part"))
    assert len(whole["ranks"]) == 2 and metrics(folder / "whole") == metrics(folder / "part")
    assert all(same(whole[name], part[name]) for name in ("parts", "ranks", "random", "env_steps", "updates"))
    stopped, in_use, too_few = zip(one["ends"], other["ends"], strict=True)
    assert stopped == ("143", "143") and 0 < checkpoint(folder / "stopped")["env_steps"] < 300
    assert "already in use" in in_use[0] and in_use[1] == "1"
    assert all("does not give each of 2 ranks" in each for each in too_few) and not (folder / "new").exists()


def test_an_evaluation_is_due_with_the_steps_of_all_ranks(monkeypatch):
    run, evaluated = object.__new__(ranks.DistributedRun), []
    vars(run).update(args=Args(eval_every=100), env_steps=0, _new_steps=0, _eval_steps=0, _heard=None)
    monkeypatch.setattr(ranks.DistributedRun, "_evaluate", lambda run: evaluated.append(run.env_steps))
    monkeypatch.setattr(ranks, "total", lambda own_steps, _: (2 * own_steps, 0))
    run.count(50, [])
    assert run.new_steps() == 100 and evaluated == [100]


def test_shares_of_the_environments(monkeypatch):
    monkeypatch.setattr(ranks, "SIZE", 3)
    assert [monkeypatch.setattr(ranks, "RANK", rank) or ranks.part(8) for rank in range(3)] == [3, 3, 2]


def test_noise_of_a_resumed_job_with_another_number_of_ranks_is_new_and_differs(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "SIZE", 2)
    draws, saved = [], {"env_steps": 5, "random": random_state(), "ranks": []}
    for rank in range(2):
        monkeypatch.setattr(ranks, "RANK", rank)
        restore_random(ranks.own_random_state(saved, Args()))
        draws.append(torch.rand(1).item())
    assert draws[0] != draws[1] and capsys.readouterr().err.count("2 ranks instead of 1") == 1


def test_a_restart_goes_on_with_its_own_job_only_or_begins_anew_before_its_first_checkpoint(monkeypatch, workdir):
    monkeypatch.setattr(ranks, "RESTARTED", True)
    args, run_dir = Args(run_dir="run", gamma=0.9), Path("run")
    for job, has_checkpoint in ("this one", True), ("another", True), ("this one", False):
        monkeypatch.setattr(ranks, "JOB", job)
        run_dir.mkdir(exist_ok=True)
        flags = {"script": "a2c_sync", "job": "this one", "gamma": 0.5, "total_timesteps": 9}
        (run_dir / "args.json").write_text(json.dumps(flags))
        (run_dir / "checkpoint.pt").touch() if has_checkpoint else (run_dir / "checkpoint.pt").unlink()
        found = ranks.restarted(args)
        if job == "this one" and has_checkpoint:
            assert (found.resume, found.gamma, found.run_dir) == ("run", 0.5, None)
        else:
            assert found is args and run_dir.exists() == has_checkpoint  # another job's is then refused: in use
    with pytest.raises(UserError, match="needs --run-dir"):
        ranks.restarted(Args())


def test_only_a_lost_rank_is_one():
    with pytest.raises(RuntimeError, match="physics"):
        ranks.lost(RuntimeError("Connection to the physics server lost by its peer"))
    assert "has lost the others" in ranks.lost(RuntimeError("[/x/gloo/gloo/transport/tcp/pair.cc:547] peer"))


def test_what_torchrun_is_not_for_is_refused(monkeypatch):
    monkeypatch.setattr(ranks, "SIZE", 2)
    for args, script in (Args(compile=True), "a2c_sync"), (Args(num_envs=1), "a2c_sync"), (Args(), "sac"):
        with pytest.raises(UserError):
            ranks.check(args, Path(f"{script}.py"))
    ranks.check(Args(), Path("a2c_sync.py"))


def torchrun(*words, size=2, options=("--standalone",)):
    words = "-m", "torch.distributed.run", "--nproc-per-node", size, *options, ROOT / "a2c_sync.py", *words
    env = environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen([sys.executable, *map(str, words)], env=env, text=True, stderr=subprocess.PIPE)


def finish(process, code=0) -> str:
    _, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return err


FLAGS = "--num-envs 5 --num-steps 4 --total-timesteps 2000 --eval-episodes 1 --normalize-obs --network shared".split()


def test_torchrun_starts_a_job(workdir):
    """common/run.py takes DistributedRun; one rank writes."""
    err = finish(torchrun(*FLAGS, "--total-timesteps", 300, "--run-dir", "run"))
    assert 300 <= results("run")["env_steps"] < 320 and len(checkpoint("run")["ranks"]) == 2
    assert err.count("a2c_sync.py on CartPole-v1") == 1


@pytest.mark.slow
def test_torchruns_signal_stops_a_job_and_other_numbers_of_ranks_resume_it(workdir):
    process = torchrun(*FLAGS, "--total-timesteps", 200_000, "--run-dir", "run")
    wait_for(lambda: Path("run/metrics.csv").exists() and len(metrics("run")) > 50)
    process.send_signal(signal.SIGTERM)
    assert finish(process, 1).count("Stopped at environment step") == 1
    stopped = checkpoint("run")["env_steps"]
    more = ["--resume", "run", "--total-timesteps", stopped + 1000]
    assert finish(torchrun(*more, size=3)).count("3 ranks instead of 2") == 1
    more[-1] += 1000
    finish(subprocess.Popen([sys.executable, ROOT / "a2c_sync.py", *map(str, more)]))
    assert results("run")["env_steps"] >= stopped + 2000


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_while_the_first_rank_evaluates_says_how_to_go_on(workdir, number):
    """The others have left by then. The command is one to paste."""
    process = torchrun(*FLAGS, "--total-timesteps", 300, "--run-dir", "run", "--eval-episodes", 10**6)
    wait_for(lambda: Path("run/checkpoint.pt").exists() and checkpoint("run")["env_steps"] >= 300)
    time.sleep(2)
    process.send_signal(number)
    err = finish(process, 1)
    assert "lost the others" not in err and not Path("run/results.json").exists()
    command = re.search(r"^  (torchrun --standalone --nproc-per-node 2 .*a2c_sync.py --resume run)$", err, re.M)[1]
    bin = Path(sys.executable).parent
    done = subprocess.run(f"{bin / command} --eval-episodes 1", shell=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and results("run")["eval_episodes"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(10))
def test_killed_ranks_cost_nothing(workdir, trial):
    """SIGKILL of any rank at any moment, under --max-restarts, with torchrun's own rendezvous and with c10d's."""
    long = [*FLAGS, "--total-timesteps", 12_000, "--checkpoint-every", 2_000]
    c10d = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{29600 + trial}", "--rdzv-id", f"job{trial}"]
    options = ["--max-restarts", "3", *(c10d if trial % 2 else ["--standalone"])]
    finish(torchrun(*long, "--run-dir", "whole", options=options))
    rng, process = random.Random(trial), torchrun(*long, "--run-dir", "killed", options=options)
    path, before = Path("killed/checkpoint.pt"), 0
    for _ in range(2):
        wait_for(lambda: path.exists() and path.stat().st_mtime_ns > before or process.poll() is not None)
        before = path.exists() and path.stat().st_mtime_ns
        time.sleep(rng.uniform(0, 0.6))
        if process.poll() is None and (victims := [pid for pid, parent, *_ in processes() if parent == process.pid]):
            os.kill(rng.choice(victims), signal.SIGKILL)
    finish(process)
    whole, killed = checkpoint("whole")["parts"], checkpoint("killed")["parts"]
    for group in whole["optimizer"]["param_groups"] + killed["optimizer"]["param_groups"]:
        del group["lr"]  # of a run that was killed in its evaluation: not that of its last update
    assert same(whole, killed)
    assert metrics("whole") == metrics("killed") and results("whole") == results("killed")


@pytest.mark.slow
def test_thirty_launches_end_in_order_and_a_refused_one_in_one_sentence(workdir):
    for k in range(30):
        finish(torchrun(*FLAGS, "--total-timesteps", 200, "--run-dir", f"run{k}"))
    err = finish(torchrun("--num-envs", 1, "--run-dir", "run"), 1)
    assert err.count("error:") == 1 and "does not give each of 2 ranks" in err and not Path("run").exists()
