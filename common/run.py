"""What every script does that is no reinforcement learning: flags, seeds, run folder, checkpoints, signals, results."""

import dataclasses
import json
import math
import os
import random
import resource
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import tyro

from common.checkpoint import ROOT, load_checkpoint, read_args, restore_random, save_checkpoint
from common.envs import env_seed
from common.errors import UserError
from common.evaluate import evaluate
from common.logger import Logger


@dataclass
class RunArgs:
    """Flags that all scripts share."""

    env_id: str = "CartPole-v1"
    """environment; `package:Name-v0` imports the package first"""
    seed: int = 1
    """seed of networks, actions and environments"""
    total_timesteps: int = 500_000
    """environment steps (transitions of all environments together) to train for"""
    num_envs: int = 8
    """environments that step in parallel"""
    vectorization: Literal["auto", "sync", "async"] = "auto"
    """auto: the environment's own vector form, else sync: one process; async: a process each, for slow simulators"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto: cuda if there is one"""
    num_threads: int = 1
    """CPU threads of torch; 1 is fastest for small networks"""
    run_dir: str | None = None
    """folder for everything this run writes; by default runs/<env>__<script>__<seed>__<time>"""
    resume: str | None = None
    """run folder to go on with: takes every flag from there, flags given beside it override"""
    checkpoint_every: int | None = None
    """environment steps between checkpoints, at each of which all environments start anew (not those of a3c_async.py);
    by default ten a run, but not below 2000 steps of each environment"""
    eval_episodes: int = 20
    """episodes of the greedy evaluation at the end"""

    def __new__(cls, *positional, **given):
        args = super().__new__(cls)
        args._given = set(given)  # with `resume`, only these override what the run folder says
        return args


# Flag -> the interval its value must lie in. One table, because a flag means the same in every script.
RANGES = {
    "[1, inf)": "total_timesteps num_envs num_threads checkpoint_every eval_episodes num_steps batch_size buffer_size "
    "num_action_samples num_critics num_workers envs_per_worker",
    "[0, 1]": "gamma gae_lambda",
    "(0, 1]": "tau",
    "[0, 4294967295]": "seed",
    "[0, inf)": "ent_coef value_coef learning_starts max_lag slow_worker",
    "(0, inf)": "actor_lr critic_lr rmsprop_eps worker_timeout",
    "(0, 1000]": "updates_per_step",
    "(0, inf]": "max_grad_norm",
}


def check_ranges(args: RunArgs):
    """Raises UserError for the first flag outside its interval (NaN included) or its choices."""
    for name, kind in get_type_hints(type(args)).items():
        if get_origin(kind) is Literal and getattr(args, name) not in get_args(kind):
            choices = ", ".join(get_args(kind))
            raise UserError(f"--{name.replace('_', '-')} must be one of {choices}, got {getattr(args, name)!r}.")
    for interval, names in RANGES.items():
        low, high = (float(bound) for bound in interval[1:-1].split(","))
        for name in names.split():
            value = getattr(args, name, None)
            if value is None:
                continue
            above = value > low or (value == low and interval[0] == "[")
            below = value < high or (value == high and interval[-1] == "]")
            if not (above and below):
                raise UserError(f"--{name.replace('_', '-')} must lie in {interval}, got {value}.")


def resumed(args: RunArgs, script: str) -> RunArgs:
    """Flags of the run folder `args.resume`, overridden by those that were given explicitly."""
    saved = read_args(args.resume)
    if saved["script"] != script:
        raise UserError(f"{args.resume!r} was made by {saved['script']}.py; resume it with that script.")
    if "run_dir" in args._given and args.run_dir is not None:
        raise UserError("--resume goes on in its own folder; leave --run-dir away.")
    names = {field.name for field in dataclasses.fields(args)} - args._given - {"resume", "run_dir"}
    return dataclasses.replace(args, **{name: value for name, value in saved.items() if name in names})


def run_cli(train, Args):
    """Command line of a script: parse, train; what the user can mend ends in one sentence, without a traceback."""
    module = sys.modules[train.__module__]
    folder = None
    for word, following in zip(sys.argv, [*sys.argv[1:], None]):
        if word == "--resume" or word.startswith("--resume="):
            folder = following if word == "--resume" else word.partition("=")[2]
    try:
        # The resumed run's flags are the defaults of this command line
        default = None if folder is None else resumed(Args(resume=folder), Path(module.__file__).stem)
        train(tyro.cli(Args, default=default, description=module.__doc__.partition("\n\n")[0]))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # before there is anything to go on with
        sys.exit(130)


class Run:
    """One training run: `Run(args, __file__)` checks and seeds, `with run.open(...)` makes or resumes the folder.

    run = Run(args, __file__); args = run.args          nothing is written yet
    with run.open(agent=agent, envs=envs):              every part has state_dict() and load_state_dict()
        while env_steps < args.total_timesteps:
            if run.checkpoint(env_steps, updates): ...  True: reset all environments with run.env_seed(env_steps)
        return run.finish(env_steps, updates)
    """

    def __init__(self, args: RunArgs, script: str):
        self.script = Path(script)
        if args.resume is not None:
            args = resumed(args, self.script.stem)
        check_ranges(args)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu.")
        if (
            args.run_dir is not None
            and (path := Path(args.run_dir)).exists()
            and (not path.is_dir() or any(path.iterdir()))
        ):
            raise UserError(f"--run-dir {args.run_dir!r} is already in use; name another, or go on with --resume.")
        self.args = args
        self.device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        self.env_steps = self.updates = 0
        self._seconds = 0.0  # of training, in earlier sessions of a resumed run
        self._saved = load_checkpoint(Path(args.resume), self.script.stem) if args.resume else None
        torch.set_num_threads(args.num_threads)
        random.seed(args.seed)
        np.random.seed(args.seed)
        torch.manual_seed(args.seed)

    def open(self, **parts) -> "Run":
        """Makes or resumes the run folder; `parts` are saved in every checkpoint."""
        self._parts = parts
        self._make_folder()
        saved, self._saved = self._saved, None
        if saved is not None:
            try:
                self._restore(saved)
            except UserError:
                self._release()
                raise
            (self.dir / "results.json").unlink(missing_ok=True)  # until it holds for the longer run
        flags = {"script": self.script.stem} | dataclasses.asdict(self.args) | {"resume": None}
        write_json(self.dir / "args.json", flags)
        print(f"{self.script.name} on {self.args.env_id}, {self.device}, run folder {self.dir}", file=sys.stderr)
        self.logger = Logger(self.dir, self.args.total_timesteps, self.env_steps, self._seconds)
        if saved is not None:
            self.logger.load_state_dict(saved["logger"])
        # Resets that come before an episode's end would keep it from ever being seen
        every = self.args.checkpoint_every or max(self.args.total_timesteps // 10, 2_000 * (self.args.num_envs or 1))
        self._every, self._next = every, self.env_steps
        return self

    def _make_folder(self):
        if self.args.resume is not None:
            self.dir = Path(self.args.resume)
        elif self.args.run_dir is not None:
            self.dir = Path(self.args.run_dir)
            try:
                self.dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--run-dir {self.args.run_dir!r} cannot be made: {error.strerror}.") from None
        else:
            env = self.args.env_id.replace("/", "-").replace(":", "-")
            name = f"runs/{env}__{self.script.stem}__{self.args.seed}__{int(time.time())}"
            Path("runs").mkdir(exist_ok=True)
            for attempt in range(1000):
                self.dir = Path(f"{name}_{attempt}" if attempt else name)
                try:
                    self.dir.mkdir()
                    break
                except FileExistsError:
                    continue
        self._lock = lock(self.dir)

    def __enter__(self):
        self._stop_signal = None
        self._handlers = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._request_stop)
        except ValueError:  # not in the main thread: whoever started the thread handles signals
            pass
        return self

    def __exit__(self, kind, *_):
        self._restore_signals()
        try:
            self.logger.close()
        finally:
            self._release(terminate=kind is not None and kind is not SystemExit)

    def _release(self, terminate: bool = False):
        self._parts["envs"].close(terminate=terminate)
        os.close(self._lock)

    def _request_stop(self, number, _frame):
        self._stop_signal = number
        self._restore_signals()  # a second Ctrl-C ends at once

    def _interrupt(self, number, _frame):
        self._stop_signal = number
        raise KeyboardInterrupt

    def _restore_signals(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def env_seed(self, env_steps: int) -> int:
        return env_seed(self.args.seed, env_steps)

    def checkpoint(self, env_steps: int, updates: int) -> bool:
        """Saves when it is time to, or on Ctrl-C and SIGTERM, which end the run here.

        True: saved, and every environment must now be reset with `env_seed(env_steps)`. Simulators cannot be saved; an
        uninterrupted run resets them at the same steps, so a resumed run sees what it would have seen.
        """
        self.env_steps, self.updates = env_steps, updates
        if env_steps < self._next and self._stop_signal is None:
            return False
        self._save()
        self._next = (env_steps // self._every + 1) * self._every
        if self._stop_signal is not None:
            self._stop()
        return True

    def _stop(self):
        self.logger.close()
        print(f"Stopped at environment step {self.env_steps:,}. Go on with\n  {self.resume_command()}", file=sys.stderr)
        raise SystemExit(128 + self._stop_signal)

    def _save(self):
        states = {name: own(part.state_dict()) for name, part in self._parts.items()}
        modules = {name for name, part in self._parts.items() if isinstance(part, torch.nn.Module)}
        self.require_finite(self.env_steps, **{f"{name}'s weights": states[name] for name in modules})
        self.logger.flush()
        save_checkpoint(
            self.dir,
            {
                "script": self.script.stem,
                "env_steps": self.env_steps,
                "updates": self.updates,
                "seconds": self.logger.seconds(),
                "logger": self.logger.state_dict(),
                "parts": states,
            },
        )

    def _restore(self, saved: dict):
        try:
            for name, part in self._parts.items():
                if (found := kind_of(saved["parts"][name])) != (wanted := kind_of(part.state_dict())):
                    raise ValueError(f"{name} holds {found}, not {wanted}")
                part.load_state_dict(saved["parts"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"The checkpoint in {str(self.dir)!r} does not fit these flags: {reason}") from None
        self.env_steps, self.updates, self._seconds = saved["env_steps"], saved["updates"], saved["seconds"]
        restore_random(saved["random"])
        Logger.rewind(self.dir, saved["logger"])

    def require_finite(self, env_steps: int, **values):
        """Stops the run if a loss (or a module's state) is not finite; the last good checkpoint stays."""
        for name, value in values.items():
            if isinstance(value, dict):
                finite = all(bool(p.isfinite().all()) for p in value.values())
            else:
                finite = not isinstance(value, (torch.Tensor, np.floating)) or math.isfinite(value.item())
            if not finite:
                given = name in ("reward", "observation")
                cause = "the environment gave it" if given else "a lower learning rate often helps"
                raise UserError(
                    f"{name} is not finite at environment step {env_steps:,} ({cause}); "
                    f"the last good checkpoint is in {str(self.dir)!r}."
                )

    def resume_command(self) -> str:
        return f"python {shlex.quote(os.path.relpath(self.script))} --resume {shlex.quote(str(self.dir))}"

    def finish(self, env_steps: int, updates: int, **extra) -> dict:
        """Last checkpoint, greedy evaluation, results.json, summary. `extra` goes into results.json."""
        self.env_steps, self.updates = env_steps, updates
        seconds = self.logger.seconds()
        self._save()
        self.logger.progress(env_steps)
        self.logger.close()
        try:
            if self._stop_signal is not None:
                raise KeyboardInterrupt
            for number in self._handlers:  # nothing is lost any more: end at once
                signal.signal(number, self._interrupt)
            env_state = self._parts["envs"].state_dict()
            returns, _ = evaluate(self._parts["agent"], self.args, env_state, self.args.eval_episodes)
        except KeyboardInterrupt:
            self._stop()
        finally:
            self._restore_signals()
        results = {
            "script": self.script.stem,
            "env_id": self.args.env_id,
            "seed": self.args.seed,
            "env_steps": env_steps,
            "updates": updates,
            "seconds": seconds,
            "sps": env_steps / seconds,
            "eval_return_mean": float(np.mean(returns)),
            "eval_return_std": float(np.std(returns)),
            "eval_episodes": len(returns),
            "train_return_mean": self.logger.recent_return(),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        } | extra
        results = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in results.items()}
        write_json(self.dir / "results.json", results)
        folder = shlex.quote(str(self.dir))
        play = f"python -m common.evaluate {folder} --video"
        if Path.cwd() != ROOT:  # here, where a package of the user's may lie
            play = f"PYTHONPATH={shlex.quote(os.path.relpath(ROOT))}:$PYTHONPATH {play}"
        print(
            f"greedy return {np.mean(returns):.1f} ± {np.std(returns):.1f} "
            f"over {len(returns)} episodes of {self.args.env_id}\n"
            f"after {env_steps:,} environment steps in {seconds / 60:.1f} minutes ({results['sps']:,.0f} steps/s), "
            f"run folder {self.dir}\n"
            f"  see it play    {play}\n"
            f"  see it learn   tensorboard --logdir {folder}"
        )
        return results


def require_compiler(device: torch.device):
    """Raises UserError if torch.compile does not work here."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"--compile needs what torch.compile needs, a C++ compiler above all: {reason}") from None


def own(state):
    """The same nested state, with copies of the tensors that other processes may be changing while it is saved."""
    if isinstance(state, torch.Tensor):
        return state.clone() if state.is_shared() else state
    if isinstance(state, dict):
        return {name: own(value) for name, value in state.items()}
    return [own(value) for value in state] if isinstance(state, list) else state


def kind_of(state: dict):
    """What two states of a part must have in common: their names, or an optimizer's names of settings."""
    return [sorted(group) for group in state["param_groups"]] if "param_groups" in state else sorted(state)


def lock(folder: Path) -> int:
    """Refuses a folder in which another process trains. The kernel drops the lock when that process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{str(folder)!r} is in use by another process.") from None
    return descriptor


def write_json(path: Path, content: dict):
    """Atomic: a killed run leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
