"""What every script does that is not reinforcement learning: seeds, run folder, checkpoints, signals, results."""

import errno
import math
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from common import checkpoint
from common.evaluate import evaluate
from common.flags import ROOT, RunArgs, UserError, check_ranges, parse
from common.logger import Logger

LOG_EVERY = 500  # environment steps, or a thousandth of the run where that is more


def run_cli(train, Args):
    """Parses and trains; what the user can mend ends in one sentence, without a traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as in a daemon
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="replace")  # γ on a terminal without UTF-8
    try:
        train(parse(train, Args))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # before there is anything to go on with
        sys.exit(130)


def is_under_way(thread: int, call) -> bool:
    """Whether a call, given as its frame, has not come to an end in its thread."""
    frame = sys._current_frames().get(thread)
    while frame not in (None, call):
        frame = frame.f_back
    return frame is not None


class Run:
    """One training run; `env_steps` and `updates` count what has been done. Nothing is written before open()."""

    launcher, find_folder = "python", staticmethod(checkpoint.find_folder)
    _trains = None  # thread and frame of the last train(): a process has one set of random generators

    def __init__(self, args: RunArgs, script: str):
        vars(args).update({name: x.item() for name, x in vars(args).items() if isinstance(x, np.generic)})
        check_ranges(args)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu.")
        main = sys.modules["__main__"]
        if not os.path.exists(getattr(main, "__file__", None) or "."):
            del main.__file__  # "<stdin>", which worker processes could not import
        self.args, self.script = args, Path(script)
        self._made_by = {"script": self.script.stem}
        self.device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        self.env_steps = self.updates = self._new_steps = self._next_log = self._saved_steps = self._eval_steps = 0
        self._stop_signal, self._is_trained = None, False
        self.name, self._saved = self.find_folder(args, self.script.stem)
        self.dir = Path(self.name).absolute()  # an environment may change the working directory
        if Run._trains is not None and is_under_way(*Run._trains):
            raise UserError("Another run of this process is under way, and would draw from the same random generators.")
        Run._trains = threading.get_ident(), sys._getframe(1)
        self._at_exit = ExitStack()  # of what the process has in common with the program that called train()
        self._at_exit.callback(checkpoint.restore_random, checkpoint.random_state())
        self._at_exit.callback(torch.set_num_threads, torch.get_num_threads())
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            self._at_exit.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
        with suppress(RuntimeError):  # where the program has used the newer names, which stand above
            self._at_exit.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_num_threads(args.num_threads)
        checkpoint.set_precision(args.matmul_precision, self.device.type)
        checkpoint.seed_generators(args.seed)

    @contextmanager
    def open(self, **parts):
        """Makes or resumes the run folder; `parts`, which have (load_)state_dict(), are saved in every checkpoint. At
        the end all is closed, and generators, threads and signals are the caller's again."""
        self._parts, args, saved = parts, self.args, self._saved
        parts["envs"].go_on = self._command  # Ray may end the program without a word
        with self._at_exit as stack:  # whatever happens, closes what has been opened
            stack.callback(setattr, Run, "_trains", None)
            stack.callback(parts["envs"].close)
            if saved is not None:
                self._restore(saved)
            self._open_folder(stack, saved and saved["logger"])
            is_new, saved, self._saved = saved is None, None, None  # frees the file that the checkpoint was read from
            if threading.current_thread() is threading.main_thread():  # else who started the thread handles signals
                for number in (signal.SIGINT, signal.SIGTERM):
                    stack.callback(signal.signal, number, signal.signal(number, self._on_signal))
            # Resets that come before an episode's end would keep it from ever being seen
            self._every = args.checkpoint_every or max(args.total_timesteps // 10, 2_000 * args.num_envs)
            try:
                if is_new:
                    self.save()
                yield
            except FloatingPointError as error:
                where = f"at environment step {self.env_steps:,}; the last good checkpoint is in {self.name!r}"
                raise UserError(f"{error} is not finite {where}.") from None
            except (UserError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE):
                    raise
                where = f"\nGo on from environment step {self._saved_steps:,} with\n  {self._command()}"
                raise UserError(f"{error}{where if (self.dir / 'checkpoint.pt').exists() else ''}") from None

    def _open_folder(self, stack: ExitStack, log: dict | None):
        args = self.args
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.logger = Logger(self.dir, args.total_timesteps, self.env_steps, log)
            stack.callback(self.logger.close)
            (self.dir / "results.json").unlink(missing_ok=True)  # until it holds for the longer run
            flags = self._made_by | vars(args) | {"resume": None}
            checkpoint.write_json(self.dir / "args.json", flags | {"made_with": checkpoint.made_with(args.env_id)})
            self.logger.flags(flags)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", "its name is not UTF-8")
            reason = "another process uses it" if isinstance(error, BlockingIOError) else reason
            raise UserError(f"The run folder {self.name!r} cannot be used: {reason}.") from None
        tqdm.write(f"{self.script.name} on {args.env_id}, {self.device}, run folder {self.name}", file=sys.stderr)
        if self.env_steps >= args.total_timesteps:
            tqdm.write("Nothing is left to train; a larger --total-timesteps trains on.", file=sys.stderr)

    def _restore(self, saved: dict):
        try:
            for name, part in self._parts.items():
                state, own = saved["parts"][name], part.state_dict()
                fits = state.keys() == own.keys()
                if "param_groups" in own:  # learning rates and the like are the flags', perhaps new ones
                    fits = [group.keys() for group in state["param_groups"]] == [g.keys() for g in own["param_groups"]]
                    state = state | {"param_groups": own["param_groups"]}
                if not fits:
                    raise ValueError(f"{name} has other entries")
                part.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"The checkpoint in {self.name!r} does not fit these flags: {reason}.") from None
        self.env_steps, self.updates, self._next_log = saved["env_steps"], saved["updates"], saved["next_log"]
        self._saved_steps = self._eval_steps = self.env_steps
        self._env_state = saved["parts"]["envs"]
        checkpoint.restore_random(saved["random"])

    def _on_signal(self, number, _frame):
        if self._is_trained:  # what is left is the evaluation
            self._stop(number)
        if number == self._stop_signal == signal.SIGINT:  # a second Ctrl-C ends at once; of SIGTERM, timeout sends two
            raise KeyboardInterrupt
        self._stop_signal = number

    def _stop(self, number: int):
        self.logger.close()
        print(f"Stopped at environment step {self.env_steps:,}. Go on with\n  {self._command()}", file=sys.stderr)
        raise SystemExit(128 + number)

    def _command(self) -> str:
        return f"{self.launcher} {shlex.quote(os.path.relpath(self.script))} --resume {shlex.quote(self.name)}"

    def env_seed(self) -> int:
        """For the reset of all environments at this step. Simulators cannot be saved, so every checkpoint resets them:
        an uninterrupted run at the same steps, so that a resumed one sees what it would have seen."""
        return checkpoint.env_seed(self.args.seed, self.env_steps, 0)

    def checkpoint_due(self) -> bool:
        return self.env_steps // self._every > self._saved_steps // self._every or self._stop_signal is not None

    def save(self, **more):
        """Writes a checkpoint; on Ctrl-C and SIGTERM the run ends here."""
        copy = partial(tree_map_only, torch.Tensor, lambda x: x.clone() if x.is_shared() else x)
        states = {name: copy(part.state_dict()) for name, part in self._parts.items()}  # others may go on changing it
        if not all(weight.isfinite().all() for weight in states["agent"].values()):
            raise FloatingPointError("agent's weights")
        is_early = 0 < self.env_steps < self.args.total_timesteps and self._stop_signal is None
        if is_early and self.logger.recent_return() is None and hasattr(self._parts["envs"], "reset"):
            words = "No episode has ended yet, and a checkpoint resets all: a larger --checkpoint-every lets them end."
            tqdm.write(words, file=sys.stderr)
        counters = {"env_steps": self.env_steps, "updates": self.updates, "next_log": self._next_log}
        content = {"script": self.script.stem, **counters, "logger": self.logger.state_dict(), "parts": states}
        self._write(content | more)
        self._saved_steps, self._env_state = self.env_steps, states["envs"]
        if self._stop_signal is not None:
            self._stop(self._stop_signal)

    def _write(self, content: dict):
        checkpoint.save_checkpoint(self.dir, content)

    def count(self, steps: int, episodes: list):
        """Counts environment steps; `episodes` are those that ended in them: (environment, return, length) each."""
        self.env_steps += steps
        self._new_steps += steps
        if episodes:
            self.logger.episodes(self.env_steps, episodes)
        every = self.args.eval_every
        if every and self.env_steps // every > self._eval_steps // every:
            self._eval_steps = self.env_steps
            self._evaluate()

    def new_steps(self) -> int:
        """Environment steps since the last call."""
        steps, self._new_steps = self._new_steps, 0
        return steps

    def log_due(self) -> bool:
        return self.env_steps >= self._next_log

    def log(self, metrics: dict):
        """Logs the metrics of the last update when it is time to; stops the run if a loss is not finite."""
        if self.log_due():
            self._next_log = self.env_steps + max(LOG_EVERY, self.args.total_timesteps // 1_000)
            for name, value in metrics.items():
                if name.endswith("loss") and not math.isfinite(value):
                    raise FloatingPointError(name)
            self.logger.log(self.env_steps, metrics)

    def _evaluate(self):
        """Leaves the training's random numbers as they are, and its time."""
        random, parts, begin = checkpoint.random_state(), self._parts, time.perf_counter()
        returns, _ = evaluate(parts["agent"], self.args, parts["envs"].state_dict(), self.args.eval_episodes)
        checkpoint.restore_random(random)
        self.logger.start += time.perf_counter() - begin
        self.logger.evaluation(self.env_steps, float(np.mean(returns)))

    def finish(self, **extra) -> dict:
        """Last checkpoint, greedy evaluation, results.json, summary. `extra` goes into results.json."""
        args, seconds = self.args, self.logger.seconds()
        if self.env_steps > self._saved_steps:
            self.save()
        self._is_trained = True
        self.logger.close()
        self._parts["envs"].close()  # a simulator may be there once only
        returns, _ = evaluate(self._parts["agent"], args, self._env_state, args.eval_episodes)
        mean, std, sps = float(np.mean(returns)), float(np.std(returns)), self.env_steps / seconds
        results = {"script": self.script.stem, "env_id": args.env_id, "seed": args.seed, "env_steps": self.env_steps}
        results |= {"updates": self.updates, "seconds": seconds, "sps": sps, "eval_return_mean": mean}
        results |= {"eval_return_std": std, "eval_episodes": len(returns)}
        results |= {"train_return_mean": self.logger.recent_return()} | extra
        checkpoint.write_json(self.dir / "results.json", results)
        print(
            f"greedy return {mean:.1f} ± {std:.1f} over {len(returns)} episodes of {args.env_id}\n"
            f"after {self.env_steps:,} environment steps in {seconds / 60:.1f} minutes ({sps:,.0f} steps/s), "
            f"run folder {self.name}\n"
            f"  see it play    python {shlex.quote(os.path.relpath(ROOT / 'evaluate.py'))} {shlex.quote(self.name)}\n"
            f"  see it learn   tensorboard --logdir {shlex.quote(self.name)}"
        )
        return results


if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
    from common.ranks import DistributedRun as Run  # noqa: F401, F811
    from common.ranks import run_cli  # noqa: F401, F811
