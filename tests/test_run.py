"""What a run promises for every script: signals, locks, a caller left as he was, numbers that are finite, its files."""

import gc
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_envs
from conftest import ROOT, finish, start
from helpers import SCRIPTS, checkpoint, events, metrics, results, resume, same, session_members, short_run, wait_for

import a2c_sync
import a3c_async
import off_policy_ac
import sac
from common import checkpoint as checkpoint_module
from common.flags import UserError

SCRIPT = ROOT / "a2c_sync.py"
SLOW = ["--env-id", "toy_envs:Slow-v0", "--run-dir", "my run", "--num-envs", "2"]
ASYNC = ["--vectorization", "async"]


def has_trained():
    return os.path.exists("my run/checkpoint.pt") and "losses/actor_loss" in events("my run")


def command_of(err):
    """The words of the command that says how to go on."""
    return shlex.split(re.search(r"^  python (.*--resume.*)$", err, re.MULTILINE)[1])


# --- Signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, how", [(signal.SIGINT, ASYNC), (signal.SIGTERM, [])], ids=["Ctrl-C", "SIGTERM"])
def test_interrupt_checkpoints_and_prints_how_to_go_on(workdir, number, how):
    """At once, long before the next one is due. With processes of environments, which end, too."""
    process = start(SCRIPT, *SLOW, *how, cwd=workdir, start_new_session=True)
    wait_for(has_trained)
    if number == signal.SIGTERM:  # as timeout(1) does, which sends it to the process and then to its group
        process.send_signal(number)
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal does
    status, out, err = finish(process)
    assert status == 128 + number and "Traceback" not in err, err
    wait_for(lambda: not session_members(process.pid))
    steps = checkpoint("my run")["env_steps"]
    assert f"Stopped at environment step {steps:,}." in err and not Path("my run/results.json").exists()
    assert 0 < steps < 4_000  # of a run whose checkpoints are 50,000 apart
    more = f"--total-timesteps {steps + 20} --vectorization sync --eval-episodes 1".split()
    status, out, err = finish(start(*command_of(err), *more, cwd=workdir))
    assert status == 0 and steps + 20 <= results("my run")["env_steps"] < steps + 40, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_evaluation_says_how_to_go_on(workdir, number):
    words = "--total-timesteps 60 --eval-episodes 100000".split()
    process = start(SCRIPT, *SLOW, *words, cwd=workdir)
    wait_for(lambda: os.path.exists("my run/checkpoint.pt") and checkpoint("my run")["env_steps"] >= 60)
    time.sleep(0.2)
    process.send_signal(number)
    status, out, err = finish(process)
    assert status == 128 + number and "Traceback" not in err and command_of(err)[1:] == ["--resume", "my run"], err
    assert not Path("my run/results.json").exists()


def test_a_second_ctrl_c_ends_at_once(workdir):
    """For whoever will not wait for the end of the rollout: this one takes hours."""
    process = start(SCRIPT, *SLOW, "--num-steps", "1000000", cwd=workdir)
    wait_for(lambda: os.path.exists("my run/checkpoint.pt"))
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    status, _, _ = finish(process)
    assert status == 130 and checkpoint("my run")["env_steps"] == 0


def test_ctrl_c_in_the_first_save_leaves_a_folder_to_go_on_with(workdir, monkeypatch):
    save = checkpoint_module.torch.save
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(checkpoint_module.torch, "save", lambda *args: save(*args) or signal.raise_signal(signal.SIGINT))
        short_run()
    assert end.value.code == 130 and not list(Path("run").glob("*.tmp"))
    assert resume()["env_steps"] >= 120


# --- The caller's process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_train_leaves_the_callers_process_as_it_was(workdir, monkeypatch, script):
    """Generators, threads, precision and signals, after a failure in the middle, too: else every trial of a random
    search would draw the same numbers."""

    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return checkpoint_module.random_state(), torch.get_num_threads(), torch.get_float32_matmul_precision(), handlers

    learns = "decay_learning_rates" if hasattr(script, "decay_learning_rates") else "polyak_update"
    monkeypatch.setattr(script, learns, lambda *_: seen.append(state()[1:]))
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("high")
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    seen, before = [], state()
    flags = {"num_threads": 1, "matmul_precision": "medium", "total_timesteps": 90}
    try:
        short_run(script, **flags)
        assert same(state(), before)
        if script is not a3c_async:  # whose workers learn
            assert all(row[:2] == (1, "medium") and row[2] != before[3] for row in seen) and seen
        monkeypatch.setattr(script.Run, "count", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            short_run(script, run_dir="other", **flags)
        assert same(state(), before)
    finally:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "cpu, factor, wanted, device, precision",
    [
        ("AuthenticAMD", 1.0, "auto", "cpu", "medium"),  # oneDNN, as exact as MKL
        ("AuthenticAMD", 1.9, "auto", "cpu", "medium"),
        ("AuthenticAMD", 2.1, "auto", "cpu", "highest"),  # in bfloat16, say
        ("AuthenticAMD", 1.0, "auto", "cuda", "highest"),
        ("GenuineIntel", 1.0, "auto", "cpu", "highest"),
        (None, 1.0, "auto", "cpu", "highest"),  # a system without /proc/cpuinfo
        ("AuthenticAMD", 1.0, "high", "cpu", "high"),  # what is given is set
        ("AuthenticAMD", 9.0, "medium", "cpu", "medium"),
    ],
)
def test_the_rule_of_matmul_precision(monkeypatch, cpu, factor, wanted, device, precision):
    """`factor`: how many times as large the error of a product is with "medium"."""
    files, exists, read_text = {"/proc/cpuinfo": f"vendor_id: {cpu}"} if cpu else {}, Path.exists, Path.read_text
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(Path, "exists", lambda x: str(x) in files if "proc" in x.parts else exists(x))
    monkeypatch.setattr(Path, "read_text", lambda x: files[str(x)] if "proc" in x.parts else read_text(x))

    def inexact(a, b):
        exact = product(a.double(), b.double())
        if a.dtype == torch.float64:
            return exact
        return exact + 1e-3 * (factor if torch.get_float32_matmul_precision() == "medium" else 1.0)

    monkeypatch.setattr(torch.Tensor, "__matmul__", inexact)
    state, before = torch.get_rng_state(), torch.get_float32_matmul_precision()
    try:
        for earlier in ("medium", "highest"):
            torch.set_float32_matmul_precision(earlier)
            checkpoint_module.set_precision(wanted, device)
            assert torch.get_float32_matmul_precision() == precision
        assert torch.equal(torch.get_rng_state(), state)  # the check draws nothing of the run's
    finally:
        torch.set_float32_matmul_precision(before)


def test_importing_a_script_has_no_side_effect(workdir):
    scripts = "a2c_sync, a3c_async, off_policy_ac, sac, evaluate"
    code = f"""
import random, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy, torch
torch.set_num_threads(2), torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
import {scripts}
assert torch.get_num_threads() == 2 and torch.initial_seed() == 5
states = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
assert (states[0] == torch.get_rng_state()).all() and states[1] == numpy.random.get_state()[1].tolist()
assert states[2] == random.getstate() and torch.tensor(1e-30) * 1e-10 > 0
"""
    status, out, err = finish(start("-c", code, cwd=workdir))
    assert (status, out, err) == (0, "", "") and list(Path(".").iterdir()) == []


def test_a_second_train_in_another_thread_is_refused(workdir):
    """There is one set of random generators: side by side, seed 1 would not be seed 1."""
    short_run(run_dir="alone")
    started, refused = threading.Event(), []

    def second():
        started.wait()
        try:
            short_run(run_dir="second")
        except UserError as error:
            refused.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        update = a2c_sync.update
        patch.setattr(a2c_sync, "update", lambda *args: started.set() or thread.join() or update(*args))
        short_run(run_dir="first")
    assert refused == ["Another run of this process is under way, and would draw from the same random generators."]
    assert same(checkpoint("first")["parts"], checkpoint("alone")["parts"]) and not Path("second").exists()
    with pytest.raises(UserError):  # ends before its run is open, and blocks no other thread
        short_run(run_dir="wrong", env_id="toy_envs:DictObs-v0")
    thread = threading.Thread(target=short_run, kwargs={"run_dir": "after"})
    thread.start(), thread.join()
    assert same(checkpoint("after")["parts"], checkpoint("alone")["parts"])


BACKENDS = {"all": torch.backends, "mkldnn": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.filterwarnings("ignore")  # torch's, of the older names
def test_a_caller_may_set_precision_by_its_newer_names(workdir, backend):
    """After which torch raises where the older name is asked for."""
    names = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before, chosen = backend.fp32_precision, "tf32"
    try:
        backend.fp32_precision = chosen
        wanted = [name.fp32_precision for name in names]
        short_run(matmul_precision="medium")
        assert [name.fp32_precision for name in names] == wanted and backend.fp32_precision == chosen
    finally:
        backend.fp32_precision = before
        torch.set_float32_matmul_precision("highest")


def test_a_daemon_without_stdout_and_stderr_trains(workdir):
    words = "--total-timesteps 200 --eval-episodes 1 --run-dir run"
    status = os.system(f"{shlex.quote(sys.executable)} {shlex.quote(str(SCRIPT))} {words} >&- 2>&-")
    assert status == 0 and results("run")["env_steps"] >= 200


def test_a_program_from_stdin_has_workers(workdir):
    """Which would import the file "<stdin>"."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import a2c_sync, a3c_async
flags = dict(total_timesteps=200, eval_episodes=1, num_envs=2)
a3c_async.train(a3c_async.Args(num_workers=2, run_dir="workers", **flags))
a2c_sync.train(a2c_sync.Args(vectorization="async", env_id="Acrobot-v1", run_dir="environments", **flags))
"""
    done = subprocess.run([sys.executable], input=code, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert results("workers")["workers_replaced"] == 0 and results("environments")["env_steps"] >= 200


def test_too_few_file_descriptors_are_named(workdir):
    words = "--num-workers 16 --total-timesteps 2000 --run-dir run".split()
    command = shlex.join([sys.executable, str(ROOT / "a3c_async.py"), *words])
    done = subprocess.run(["sh", "-c", f"ulimit -n 48; exec {command}"], text=True, capture_output=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "error: [Errno 24] Too many open files" in done.stderr and command_of(done.stderr)[1:] == ["--resume", "run"]


def test_too_little_shared_memory_is_named(workdir, monkeypatch):
    def share(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", share)
    with pytest.raises(UserError, match="^unable to allocate shared memory.* a larger /dev/shm.* help.$"):
        short_run(a3c_async, update="pooled")


@pytest.mark.parametrize("name, reason", [("x" * 300, "File name too long"), ("\udcff", "its name is not UTF-8")])
def test_a_folder_that_cannot_be_made_is_named(workdir, name, reason):
    with pytest.raises(UserError, match=f"cannot be used: {reason}.$"):
        short_run(run_dir=name)


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_in_use_by_a_live_run_is_refused(workdir):
    """Of two that want a new folder one gets it; nobody else gets it, until that one is dead."""
    both = [start(SCRIPT, *SLOW, cwd=workdir) for _ in range(2)]
    try:
        wait_for(lambda: any(process.poll() is not None for process in both))
        loser, winner = sorted(both, key=lambda process: process.poll() is None)
        status, _, err = finish(loser)
        assert status == 1 and "use" in err and err.count("\n") == 1, err
        wait_for(has_trained)
        before = Path("my run/args.json").read_bytes()
        status, _, err = finish(start(SCRIPT, "--resume", "my run", "--gamma", "0.5", cwd=workdir))
        assert (status, err) == (1, "error: The run folder 'my run' cannot be used: another process uses it.\n")
        status, _, err = finish(start(SCRIPT, *SLOW, cwd=workdir))
        assert status == 1 and "'my run' is already in use" in err
        assert winner.poll() is None and Path("my run/args.json").read_bytes() == before
    finally:
        for process in both:
            process.kill()
    finish(winner)
    words = f"--total-timesteps {checkpoint('my run')['env_steps'] + 20} --eval-episodes 1".split()
    status, _, err = finish(start(SCRIPT, "--resume", "my run", *words, cwd=workdir))
    assert status == 0, err  # a dead one holds nothing


def test_every_run_gets_a_folder_of_its_own(workdir):
    short_run(run_dir=None), short_run(run_dir=None)
    assert [
        bool(re.fullmatch(r"CartPole-v1__a2c_sync__1__\d{8}-\d{6}-\d{6}", name)) for name in os.listdir("runs")
    ] == [True, True]


def test_a_file_system_without_locks_is_good_enough(workdir, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: os.open("/no/such/file", os.O_RDONLY))  # another OSError
    assert short_run()["env_steps"] >= 120


COMMON = "charts/episodic_return charts/episodic_length charts/SPS losses/actor_loss losses/critic_loss losses/value"
TAGS = {"a3c_async": "lag/mean lag/max lag/dropped", "sac": "losses/alpha_loss losses/alpha"}
RESULTS = "script env_id seed env_steps updates seconds sps eval_return_mean eval_return_std eval_episodes"
LAGS = ["lag_mean", "lag_max", "dropped", "lag_histogram", "workers_replaced"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_files_and_tags_of_a_run_folder(workdir, capsys, name):
    """metrics.csv has every episode; TensorBoard has the same losses at the same steps, and of episodes the means."""
    flags = {"updates_per_step": 0.1} if name in ("off_policy_ac", "sac") else {}
    end = short_run(SCRIPTS[name], total_timesteps=1_600, eval_episodes=3, **flags)
    assert end["script"] == name and list(end) == RESULTS.split() + ["train_return_mean"] + LAGS * (name == "a3c_async")
    assert end["env_steps"] == checkpoint("run")["env_steps"] == results("run")["env_steps"] >= 1_600
    names = sorted(path.name for path in Path("run").iterdir())
    assert [*names[:2], *names[3:]] == ["args.json", "checkpoint.pt", "metrics.csv", "results.json"]
    assert names[2].startswith("events.out.tfevents")
    rows, logged = metrics("run"), events("run")
    wanted = {*f"{COMMON} losses/entropy {TAGS.get(name, '')}".split()}
    assert {tag for _, tag, _ in rows} | {"charts/SPS"} == set(logged) == wanted
    logs = [0, *(steps for steps, tag, _ in rows if tag == "losses/value")]
    for tag in wanted - {"charts/SPS"}:
        own = [(steps, float(value)) for steps, t, value in rows if t == tag]
        if "episodic" in tag:
            since = {log: [value for steps, value in own if last < steps <= log] for last, log in pairwise(logs)}
            own = [(log, np.mean(values)) for log, values in since.items() if values]
        assert logged[tag] == [(steps, pytest.approx(value, rel=1e-6, nan_ok=True)) for steps, value in own]
        assert len(own) >= 2
    lengths = [float(value) for _, tag, value in rows if tag == "charts/episodic_length"]
    assert end["env_steps"] - 1_000 < sum(lengths) <= end["env_steps"] and len(lengths) >= 3
    returns = [float(value) for _, tag, value in rows if tag == "charts/episodic_return"]
    assert end["train_return_mean"] == pytest.approx(np.mean(returns[-100:]))
    printed = capsys.readouterr().out
    assert f"greedy return {end['eval_return_mean']:.1f} ± {end['eval_return_std']:.1f} over 3 episodes" in printed
    assert f"after {end['env_steps']:,} environment steps" in printed and "tensorboard --logdir run" in printed


@pytest.mark.parametrize("name", ["a2c_sync", "off_policy_ac"])
def test_evaluations_amid_the_training_leave_no_trace_in_it(workdir, name):
    """Their number is in metrics.csv and TensorBoard; args.json knows what made the run."""
    flags = {"updates_per_step": 0.1, "learning_starts": 350} if name == "off_policy_ac" else {}
    ends = [
        short_run(SCRIPTS[name], run_dir=folder, total_timesteps=steps, eval_every=every, eval_episodes=2, **flags)
        for folder, every, steps in (("with", 300, 1000), ("without", None, 1000), ("part", 300, 450))
    ]
    resume("part", total_timesteps=1000)
    assert [row[0] // 300 for row in metrics("part") if row[1] == "eval/return"] == [1, 2, 3]
    rows = metrics("with")
    evaluated = [(steps, pytest.approx(float(value))) for steps, tag, value in rows if tag == "eval/return"]
    assert [steps // 300 for steps, _ in evaluated] == [1, 2, 3] and events("with")["eval/return"] == evaluated
    assert [row for row in rows if row[1] != "eval/return"] == metrics("without")
    assert same(checkpoint("with")["parts"], checkpoint("without")["parts"])
    assert ends[0]["eval_return_mean"] == ends[1]["eval_return_mean"]
    made_with = json.loads(Path("with/args.json").read_text())["made_with"]
    assert made_with["torch"] == torch.__version__ and re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", made_with["commit"])


def test_a_finished_run_has_nothing_left_to_train(workdir, capsys):
    short_run()
    resume("run")
    assert "Nothing is left to train" in capsys.readouterr().err


def test_an_environment_may_change_the_working_directory(workdir, monkeypatch):
    reset = toy_envs.Constant.reset
    monkeypatch.setattr(toy_envs.Constant, "reset", lambda env, **kwargs: os.chdir("/") or reset(env, **kwargs))
    short_run(env_id="toy_envs:Constant-v0")
    assert {"metrics.csv", "results.json"} < set(os.listdir(workdir / "run"))


# --- Warnings and sentences -------------------------------------------------------------------------------------------


def test_a_checkpoint_before_any_episode_has_ended_is_warned_of(workdir, capsys):
    """Its reset would keep the end from ever being seen. Not at the first and the last, nor once one has ended."""
    sentence = "No episode has ended yet, and a checkpoint resets all: a larger --checkpoint-every"
    for length, warnings in ((200, 3), (10, 0)):
        flags = {"env_kwargs": {"length": length}, "total_timesteps": 420, "checkpoint_every": 120}
        short_run(run_dir=str(length), env_id="toy_envs:Constant-v0", **flags)
        written = capsys.readouterr()
        assert (written.out + written.err).count(sentence) == warnings


NOT_FINITE = [
    (a2c_sync, "Broken", "reward", 400),
    (a2c_sync, "BrokenObsBox", "observation", 140),
    (a2c_sync, "BrokenReset", "observation", 140),
    (a2c_sync, "Huge", "observation", 10),  # finite as float64, infinite as the float32 that networks see
    (off_policy_ac, "Broken", "reward", 200),
    (off_policy_ac, "BrokenReset", "observation", 70),
    (sac, "BrokenBox", "reward", 200),
    (sac, "BrokenObsBox", "observation", 70),
]


@pytest.mark.parametrize("script, env_id, name, steps", NOT_FINITE)
@pytest.mark.filterwarnings("ignore:overflow")
def test_what_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(workdir, script, env_id, name, steps):
    flags = {"total_timesteps": 2_000, "checkpoint_every": 50}
    with pytest.raises(UserError) as error:
        short_run(script, env_id=f"toy_envs:{env_id}-v0", **flags)
    sentence = rf"{name} is not finite at environment step ([\d,]+); the last good checkpoint is in 'run'\."
    found = int(re.fullmatch(sentence, str(error.value))[1].replace(",", ""))
    saved = checkpoint("run")
    assert steps - 20 <= found <= steps + 20 and error.value.__suppress_context__
    assert found - 80 <= saved["env_steps"] <= found and not Path("run/results.json").exists()
    assert all(value.isfinite().all() for value in saved["parts"]["agent"].values())
    assert all(field.isfinite().all() for field in saved["parts"].get("buffer", {"fields": {}})["fields"].values())


@pytest.mark.parametrize("script", [a2c_sync, off_policy_ac, sac], ids=["a2c_sync", "off_policy_ac", "sac"])
def test_no_action_that_is_not_finite_reaches_an_environment(workdir, monkeypatch, script):
    """toy_envs:Doubles would fail."""
    Policy = script.SquashedGaussian if script is sac else script.Gaussian
    sample = Policy.sample
    monkeypatch.setattr(Policy, "sample", lambda *args: sample(*args) * np.nan)
    with pytest.raises(UserError, match=r"^action is not finite at environment step"):
        short_run(script, env_id="toy_envs:Doubles-v0")


@pytest.mark.parametrize("loss", ["critic_loss", "actor_loss"])
def test_a_loss_that_is_not_finite_is_named(workdir, monkeypatch, loss):
    original = getattr(a2c_sync, f"{loss}_fn")
    monkeypatch.setattr(a2c_sync, f"{loss}_fn", lambda *args: original(*args) * np.inf)
    with pytest.raises(UserError, match=rf"^{loss} is not finite at environment step"):
        short_run()


def test_broken_weights_are_not_saved(workdir, monkeypatch):
    save = a2c_sync.Run.save

    def poison(run):
        if run.env_steps > 300:
            list(run._parts["agent"].parameters())[-1].data[0] = np.nan
        save(run)

    monkeypatch.setattr(a2c_sync.Run, "save", poison)
    with pytest.raises(UserError, match="^agent's weights is not finite at environment step [345]"):
        short_run(env_id="toy_envs:Constant-v0", total_timesteps=1_000, checkpoint_every=200)
    saved = checkpoint("run")
    assert saved["env_steps"] > 0 and all(weight.isfinite().all() for weight in saved["parts"]["agent"].values())


# --- Many runs, and other systems -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_of_fifty_trials_leaves_no_process_and_no_file_open(workdir):
    def opened():
        return len(os.listdir("/proc/self/fd")), threading.active_count(), multiprocessing.active_children()

    kinds = [
        {"vectorization": "async"},
        {"network": "shared", "critic_lr": 1.0},  # refused
        {"env_id": "toy_envs:DictObs-v0"},  # refused after the environments were built
        {"env_id": "toy_envs:Broken-v0", "total_timesteps": 2_000},  # fails in the middle
        {"run_dir": "0"},  # a folder in use
    ]
    failed = 0
    for k in range(50):
        try:
            short_run(**{"run_dir": str(k)} | kinds[k % 5])
        except UserError:
            failed += 1
        if k == 4:  # the fork server has started, which stays
            gc.collect()
            before = opened()
    gc.collect()
    assert failed == 40 and opened() == before


@pytest.mark.slow
def test_importing_and_training_need_no_module_of_unix(workdir):
    """As on Windows: no resource, no fcntl, no setpgrp, no sysconf, no /proc."""
    code = (
        f"import sys, os, pathlib; sys.path[:0] = [{str(ROOT)!r}]\n"
        "sys.modules['resource'] = sys.modules['fcntl'] = None\n"
        "del os.setpgrp, os.sysconf\n"
        "exists = pathlib.Path.exists\n"
        "pathlib.Path.exists = lambda path: not str(path).startswith('/proc') and exists(path)\n"
        "import a2c_sync, sac, off_policy_ac, a3c_async, common.ring_buffer\n"
        "a2c_sync.train(a2c_sync.Args(total_timesteps=60, eval_episodes=1, run_dir='a'))\n"
        "sac.train(sac.Args(total_timesteps=60, learning_starts=50, batch_size=8, eval_episodes=1, run_dir='s'))\n"
    )
    status, _, err = finish(start("-c", code, cwd=workdir))
    assert status == 0, err
