"""What every script does that is not reinforcement learning: seeds, run folder, checkpoints, signals, results."""

import copy
import dataclasses
import errno
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from common import ranks
from common.checkpoint import (
    env_seed,
    load_checkpoint,
    random_state,
    restore_random,
    save_checkpoint,
    seed_generators,
)
from common.evaluate import evaluate
from common.flags import ROOT, NotFinite, RunArgs, Saved, UserError, check_ranges, saved_args
from common.logger import Logger
from common.precision import choose_precision, get_precision, set_precision

LOG_EVERY = 500  # environment steps, or a thousandth of the run where that is more


def isolated(train):
    """Decorator of train(): it gets a copy of the flags, NumPy's numbers made plain; afterwards the random generators,
    threads, denormals and matmul precision are the caller's again."""

    @wraps(train)
    def wrapped(args: RunArgs) -> dict:
        plain = {name: value.item() for name, value in vars(args).items() if isinstance(value, np.generic)}
        generators, threads, precision = random_state(), torch.get_num_threads(), get_precision()
        flushes_denormals = bool(torch.tensor(1e-30) * 1e-10 == 0)
        try:
            return train(dataclasses.replace(args, **plain))
        finally:
            restore_random(generators)
            torch.set_num_threads(threads)
            set_precision(*precision)
            torch.set_flush_denormal(flushes_denormals)

    return wrapped


def run_cli(train, Args):
    """Command line of a script: parse, train; what the user can mend ends in one sentence, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # γ on a terminal without UTF-8
    module = sys.modules[train.__module__]

    def parse() -> RunArgs:
        folder = None
        for word, following in zip(sys.argv, [*sys.argv[1:], None]):
            if word == "--resume" or word.startswith("--resume="):
                folder = following if word == "--resume" else word.partition("=")[2]
        # The resumed run's flags are the defaults of this command line
        default = None if folder is None else saved_args(folder, Args, Path(module.__file__).stem)
        args = tyro.cli(Args, default=default, description=module.__doc__.partition("\n\n")[0])
        return args if default is None else dataclasses.replace(args, resume=default.resume)

    try:
        train(ranks.by_first(lambda: ranks.restarted(parse())))
        ranks.leave()
    except UserError as error:
        sys.exit(ranks.failed(error))
    except KeyboardInterrupt:  # before there is anything to go on with
        sys.exit(130)
    except RuntimeError as error:
        sys.exit(ranks.lost(error))


class Run:
    """One training run; `env_steps` and `updates` count what has been done.

    run = Run(args, __file__)                           checks the flags, seeds all generators; nothing is written yet
    with run.open(agent=agent, envs=envs, ...):         makes or resumes the folder
        while run.env_steps < args.total_timesteps:
            if run.checkpoint_due():
                run.save()                              on Ctrl-C and SIGTERM the run ends here
                ...                                     reset all environments with run.env_seed()
            run.count(steps, episodes); run.log(metrics)
        return run.finish()
    """

    def __init__(self, args: RunArgs, script: str):
        self.args, self.script = args, Path(script)
        self.env_steps = self.updates = self._next_log = self._new_steps = 0
        self._stop_signal, self._all_stop, self._warned = None, False, False
        self._restored = None, {}  # environment steps and the environments' state in the checkpoint
        self.share, self.reduce = 1.0, lambda gradient: gradient  # of several ranks: ranks.py
        check_ranges(args)
        ranks.check(args, self.script)
        if args.run_dir is not None and not str(args.run_dir):
            raise UserError("--run-dir must not be empty.")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu.")
        self.device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        try:
            if json.loads(json.dumps(args.env_kwargs, allow_nan=False)) != args.env_kwargs:
                raise ValueError("it comes back as something else")
        except (TypeError, ValueError) as error:
            raise UserError(f"--env-kwargs must be plain JSON: {error}.") from None
        env = args.env_id.replace("/", "-").replace(":", "-")
        default = f"runs/{env}__{self.script.stem}__{args.seed}__{time.time_ns()}"
        self.name = ranks.by_first(lambda: str(args.resume or args.run_dir or default))
        self.dir = Path(self.name).absolute()  # an environment may change the working directory
        ranks.by_first(lambda: self._check_folder() and None)
        torch.set_num_threads(args.num_threads)
        seed_generators(args.seed)

    def _check_folder(self) -> dict | None:
        """The checkpoint of a run to be resumed; UserError if flags do not fit it, or a new run's folder is in use."""
        args = self.args
        if args.resume is None:
            if self.dir.exists() and (not self.dir.is_dir() or any(self.dir.iterdir())):
                raise UserError(f"--run-dir {self.name!r} is already in use; name another, or go on with --resume.")
            return None
        if args.run_dir is not None:
            raise UserError("--resume goes on in its own folder; leave --run-dir away.")
        flags = vars(saved_args(args.resume, type(args), self.script.stem))
        differing = [name for name in flags if name != "resume" and flags[name] != getattr(args, name)]
        if differing and not isinstance(args.resume, Saved):
            raise UserError(
                f"Args(resume={self.name!r}) differs from that run in {', '.join(differing)}; write "
                "dataclasses.replace(load_args(run_dir), ...) with load_args of evaluate.py to change flags."
            )
        saved = load_checkpoint(args.resume, self.script.stem)
        if args.total_timesteps < min(saved["env_steps"], flags["total_timesteps"]):
            steps = f"{saved['env_steps']:,} environment steps already"
            raise UserError(f"{self.name!r} has {steps}; give more --total-timesteps.")
        return saved

    @contextmanager
    def open(self, **parts):
        """Makes or resumes the run folder; `parts`, which have (load_)state_dict(), are saved in every checkpoint."""
        self._parts, args = parts, self.args
        try:
            with ExitStack() as stack:  # whatever happens, closes what has been opened
                stack.push(after_all(lambda kind: parts["envs"].close(terminate=kind not in (None, SystemExit))))
                try:
                    saved = ranks.by_first(lambda: self._claim_folder(stack))
                    ranks.join(self, parts["agent"])
                    if saved is not None:
                        self._restore(saved)
                    chosen = saved and saved.get("matmul_precision")
                    self.precision = ranks.by_first(
                        lambda: choose_precision(args.matmul_precision, parts["agent"], self.device, chosen)
                    )
                    set_precision(self.precision, "bf16" if args.matmul_precision == "medium" else "none")
                    self.logger = ranks.Follower()
                    if ranks.RANK == 0:
                        (self.dir / "results.json").unlink(missing_ok=True)  # until it holds for the longer run
                        made_by = {"script": self.script.stem} | ({"job": ranks.JOB} if ranks.JOB else {})
                        write_json(self.dir / "args.json", made_by | vars(args) | {"resume": None})
                        print(
                            f"{self.script.name} on {args.env_id}, {self.device}, matrix products {self.precision}, "
                            f"run folder {self.name}",
                            file=sys.stderr,
                        )
                        self.logger = Logger(self.dir, args.total_timesteps, self.env_steps, saved and saved["logger"])
                except OSError as error:
                    raise UserError(f"The run folder {self.name!r} cannot be used: {error.strerror}.") from None
                stack.push(after_all(lambda kind: self.logger.close()))
                new, saved = saved is None, None  # frees the file that the checkpoint was read from
                if threading.current_thread() is threading.main_thread():  # else who started the thread handles signals
                    for number in (signal.SIGINT, signal.SIGTERM):
                        stack.callback(signal.signal, number, signal.signal(number, self._request_stop))
                # Resets that come before an episode's end would keep it from ever being seen
                self._every = args.checkpoint_every or max(args.total_timesteps // 10, 2_000 * args.total_envs())
                self._next_checkpoint = (self.env_steps // self._every + 1) * self._every
                if new:
                    self.save()
                yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"{error.strerror}: make room, then go on with --resume {self.name!r}.") from None
        except NotFinite as error:
            raise UserError(
                f"{error} is not finite at environment step {self.env_steps:,}; "
                f"the last good checkpoint is in {self.name!r}."
            ) from None

    def _claim_folder(self, stack: ExitStack) -> dict | None:
        self.dir.mkdir(parents=True, exist_ok=True)
        stack.callback(*lock(self.dir, self.name))
        return self._check_folder()  # again: another process may have been here until now

    def _request_stop(self, number, _frame):
        self._stop_signal = number
        if number == signal.SIGINT:  # a second Ctrl-C ends at once; of SIGTERM, timeout(1) sends two
            signal.signal(number, signal.default_int_handler)

    def env_seed(self) -> int:
        """For the reset of all environments at this step. Simulators cannot be saved, so every checkpoint resets them:
        an uninterrupted run at the same steps, so that a resumed one sees what it would have seen."""
        return env_seed(self.args.seed, self.env_steps, ranks.RANK)  # a single process's are rank 0's

    def checkpoint_due(self) -> bool:
        return self.env_steps >= self._next_checkpoint or self._stops()

    def _stops(self) -> bool:
        return self._stop_signal is not None if ranks.SIZE == 1 else self._all_stop

    def save(self):
        """Writes a checkpoint; on Ctrl-C and SIGTERM the run ends here."""
        random_states = ranks.gathered(random_state()) if ranks.SIZE > 1 else []
        self._gather_episodes()
        states = {name: own(part.state_dict()) for name, part in self._parts.items()}
        for name, part in self._parts.items():
            if isinstance(part, torch.nn.Module) and not all(p.isfinite().all() for p in states[name].values()):
                raise NotFinite(f"{name}'s weights")
        resets = hasattr(self._parts["envs"], "reset")  # worker processes go on
        early = 0 < self.env_steps < self.args.total_timesteps and not self._stops()
        if resets and early and not self.logger.longest and not self._warned:
            self._warned = True
            tqdm.write(
                f"No episode has ended in {self.env_steps:,} environment steps. A checkpoint resets all environments; "
                "where episodes are longer than that, use a larger --checkpoint-every.",
                file=sys.stderr,
            )
        counters = {"env_steps": self.env_steps, "updates": self.updates, "next_log": self._next_log}
        content = {"script": self.script.stem, **counters, "logger": self.logger.state_dict(), "parts": states}
        # What --matmul-precision auto has chosen; a flag's own value is a flag's, and on a GPU there is no choice
        chosen = self.precision if self.args.matmul_precision == "auto" and self.device.type == "cpu" else None
        content |= {"matmul_precision": chosen, "ranks": random_states}
        if ranks.RANK == 0:
            save_checkpoint(self.dir, content)
        self._next_checkpoint = (self.env_steps // self._every + 1) * self._every
        if self._stops():
            self._stop()

    def _stop(self):
        self.logger.close()
        ranks.wait()  # torchrun ends all ranks when one has ended: not before the first has saved
        if ranks.RANK > 0:
            raise SystemExit(128 + signal.SIGTERM)
        launcher = "python" if ranks.SIZE == 1 else "torchrun ..."
        module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
        called = shlex.quote(os.path.relpath(self.script))
        called = f"-m {module.name}" if module and module.origin == str(self.script) else called
        command = f"{launcher} {called} --resume {shlex.quote(self.name)}"
        print(f"Stopped at environment step {self.env_steps:,}. Go on with\n  {command}", file=sys.stderr)
        raise SystemExit(128 + (self._stop_signal or signal.SIGTERM))

    def _restore(self, saved: dict):
        try:
            for name, part in self._parts.items():
                state = saved["parts"][name]
                if (found := layout(state)) != (wanted := layout(part.state_dict())):
                    raise ValueError(f"{name} holds {found}, not {wanted}")
                if "param_groups" in state:  # learning rates and the like are the flags', perhaps new ones
                    state = copy.deepcopy(state) | {"param_groups": part.state_dict()["param_groups"]}
                part.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"The checkpoint in {self.name!r} does not fit these flags: {reason}") from None
        self.env_steps, self.updates, self._next_log = saved["env_steps"], saved["updates"], saved["next_log"]
        self._restored = self.env_steps, saved["parts"]["envs"]
        restore_random(ranks.own_random_state(saved, self.args))

    def count(self, steps: int, episodes: list):
        """Counts environment steps; `episodes` are those that ended in them: (environment, return, length) each."""
        self.env_steps += steps
        self._new_steps += steps
        if episodes:
            self.logger.episodes(self.env_steps, episodes)
            self.logger.progress(self.env_steps)

    def new_steps(self) -> int:
        """Environment steps since the last call, under torchrun those of all ranks, which hear of a signal here."""
        own_steps, self._new_steps = self._new_steps, 0
        steps, signals = ranks.total(own_steps, self._stop_signal is not None)
        self.share, self._all_stop = own_steps / max(steps, 1), signals > 0
        self.env_steps += int(steps) - own_steps
        return int(steps)

    def _gather_episodes(self):
        for episodes in ranks.episodes_of_others(self.logger):
            self.logger.episodes(self.env_steps, episodes)

    def log_due(self) -> bool:
        return self.env_steps >= self._next_log

    def log(self, metrics: dict):
        """Logs the metrics of the last update when it is time to; stops the run if a loss is not finite."""
        if self.log_due():
            if ranks.SIZE > 1:
                names, values = metrics.keys(), ranks.total(*(self.share * float(x) for x in metrics.values()))
                metrics = dict(zip(names, values))
                self._gather_episodes()
            self._next_log = self.env_steps + max(LOG_EVERY, self.args.total_timesteps // 1_000)
            for name, value in metrics.items():
                if name.endswith("loss") and not math.isfinite(value):
                    raise NotFinite(name)
            self.logger.log(self.env_steps, metrics)

    def finish(self, **extra) -> dict:
        """Last checkpoint, greedy evaluation, results.json, summary. `extra` goes into results.json."""
        args, seconds = self.args, self.logger.seconds()
        if self.env_steps == self._restored[0]:  # not a step more: statistics must not count the reset before it
            self._parts["envs"].load_state_dict(self._restored[1])
        self.save()
        self.logger.progress(self.env_steps)
        self.logger.close()
        ranks.wait()
        if ranks.RANK > 0:
            return {}
        env_state, returns, failure = self._parts["envs"].state_dict(), [math.nan], None
        try:
            self._parts["envs"].close()  # a simulator may be there once only
            stop = lambda *_: self._stop() if self._stop_signal is not None else None  # noqa: E731
            max_steps = max(30_000, 10 * self.logger.longest)
            returns, _ = evaluate(self._parts["agent"], args, env_state, args.eval_episodes, 0, max_steps, stop)
        except Exception as error:  # whatever it is, the training's result stays
            failure = error
        results = {
            "script": self.script.stem,
            "env_id": args.env_id,
            "seed": args.seed,
            "env_steps": self.env_steps,
            "updates": self.updates,
            "matmul_precision": self.precision,
            "seconds": seconds,
            "sps": self.env_steps / seconds,
            "eval_return_mean": float(np.mean(returns)),
            "eval_return_std": float(np.std(returns)),
            "eval_episodes": 0 if failure else len(returns),
            "train_return_mean": self.logger.recent_return(),
        } | extra
        results = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in results.items()}
        write_json(self.dir / "results.json", results)
        if failure is not None:
            reason = " ".join(f"{type(failure).__name__}: {failure}".split())
            raise UserError(
                f"The training is done and {self.name!r} holds it, but not its evaluation. {reason}"
            ) from failure
        folder = shlex.quote(self.name)
        video = " --video" if importlib.util.find_spec("imageio_ffmpeg") else ""
        print(
            f"greedy return {np.mean(returns):.1f} ± {np.std(returns):.1f} "
            f"over {len(returns)} episodes of {args.env_id}\n"
            f"after {self.env_steps:,} environment steps in {seconds / 60:.1f} minutes "
            f"({results['sps']:,.0f} steps/s), run folder {self.name}\n"
            f"  see it play    python {shlex.quote(os.path.relpath(ROOT / 'evaluate.py'))} {folder}{video}\n"
            f"  see it learn   tensorboard --logdir {folder}"
        )
        return results


def own(state):
    """The same nested state, with copies of the tensors that other processes may be changing while it is saved."""
    if isinstance(state, torch.Tensor):
        return state.clone() if state.is_shared() else state
    if isinstance(state, dict):
        return {name: own(value) for name, value in state.items()}
    return [own(value) for value in state] if isinstance(state, list) else state


def layout(state: dict):
    """What two states of a part must have in common: names, or an optimizer's groups with their sizes and settings."""
    if "param_groups" in state:
        return [(len(group["params"]), *sorted(group)) for group in state["param_groups"]]
    return sorted(state)


def after_all(close):
    """A callback of ExitStack: close(kind of exception), whose own failure does not hide the fault that came first."""

    def exit(kind, *_):
        try:
            close(kind)
        except Exception as error:
            if kind is None:
                raise
            print(f"closing failed, too: {type(error).__name__}: {error}", file=sys.stderr)

    return exit


def lock(folder: Path, name: str) -> tuple:
    """Refuses a folder in which another process trains, where the system can tell; returns the call that unlocks it."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # dropped by the kernel when the process dies
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{name!r} is in use by another process.") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        return (int,)
    return os.close, descriptor


def write_json(path: Path, content: dict):
    """Atomic: a killed run leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    text = json.dumps(content, indent=2, allow_nan=False, default=os.fspath)  # a Path
    temporary.write_text(text + "\n")
    temporary.replace(path)
