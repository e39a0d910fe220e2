"""One run of a2c_sync.py on several processes or machines, each with its share of the environments (D5).

    torchrun --standalone --nproc-per-node 2 a2c_sync.py --num-envs 64

torchrun starts the processes and restarts them; torch.distributed adds up. Every rank holds the same parameters and
optimizer state and makes the same updates; only the first one writes. common/run.py takes DistributedRun and run_cli
from here where torchrun has started it.
"""

import atexit
import copy
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import checkpoint
from common.checkpoint import env_seed, random_state, seed_generators
from common.flags import UserError, parse, read_args, saved_args
from common.run import Run

JOB = os.environ.get("TORCHELASTIC_RUN_ID")  # of torchrun; a cluster may set WORLD_SIZE for purposes of its own
SIZE, RANK = (int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])) if JOB else (1, 0)
RESTARTED = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
TIMEOUT = timedelta(minutes=10)  # for the slowest rank, at whatever all wait for


def run_cli(train, Args):
    """As that of common/run.py."""
    try:
        train(by_first(lambda: restarted(parse(train, Args))))
        leave()
    except UserError as error:
        sys.exit(failed(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        sys.exit(lost(error))


class DistributedRun(Run):
    """A rank's view of the one run: counts are those of all ranks, the script's args.num_envs is the rank's share."""

    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(SIZE)
    launcher = f"torchrun --standalone --nproc-per-node {SIZE}" if one_machine else "torchrun ..."

    def __init__(self, args, script: str):
        start()
        check(args, Path(script))
        self._heard, self.share = None, 1.0  # signal; part of the last batch
        super().__init__(copy.copy(args), script)
        self._made_by["job"] = JOB
        args.num_envs = part(args.num_envs)

    def find_folder(self, *args):
        return by_first(lambda: checkpoint.find_folder(*args))

    def open(self, agent, envs, **parts):
        """All ranks begin with the same parameters, add up their gradients, and draw other noise each."""
        GradientSum(agent, lambda: self.share)
        if self.args.normalize_obs:
            envs.env.obs_rms.update = Moments(envs.env.obs_rms)
        seed_generators(env_seed(self.args.seed, 2**62, RANK))
        return super().open(agent=agent, envs=envs, **parts)

    def _open_folder(self, stack, log):
        by_first(lambda: super(DistributedRun, self)._open_folder(stack, log))
        if RANK > 0:
            self.logger = Follower()

    def _restore(self, saved: dict):
        super()._restore(saved | {"random": own_random_state(saved, self.args)})

    def _on_signal(self, number, frame):
        if self._is_trained or number == self._heard == signal.SIGINT:
            self._stop_signal = self._heard
            super()._on_signal(number, frame)
        self._heard = number

    def _stop(self, number: int):
        self.logger.close()
        if not self._is_trained:  # else the others have left
            wait()  # torchrun ends all ranks when one has ended: not before the first has saved
        if RANK > 0:
            raise SystemExit(128 + signal.SIGTERM)
        super()._stop(number)

    def env_seed(self) -> int:
        return env_seed(self.args.seed, self.env_steps, RANK)

    def save(self):
        self._gather_episodes()
        super().save(ranks=gathered(random_state()))

    def _write(self, content: dict):
        if RANK == 0:
            super()._write(content)

    def new_steps(self) -> int:
        """Those of all ranks, which hear of a signal here."""
        own_steps = super().new_steps()
        steps, signals = total(own_steps, self._heard is not None)
        self.share = own_steps / max(steps, 1)
        if signals > 0:
            self._stop_signal = self._heard or signal.SIGTERM
        self.env_steps += int(steps) - own_steps
        self.count(0, [])  # with those of the others, --eval-every may be due
        return int(steps)

    def log(self, metrics: dict):
        if self.log_due():
            values = total(*(self.share * float(x) for x in metrics.values()))
            metrics = dict(zip(metrics, values))
            self._gather_episodes()
        super().log(metrics)

    def _evaluate(self):
        if RANK == 0:
            super()._evaluate()

    def _gather_episodes(self):
        """On the first rank, the episodes that the others have seen end since the last call."""
        things = gathered(getattr(self.logger, "unsent", []))
        if RANK > 0:
            self.logger.unsent = []
        else:
            for episodes in (episodes for one in things[1:] for episodes in one):
                self.logger.episodes(self.env_steps, episodes)

    def finish(self, **extra) -> dict:
        if self.env_steps > self._saved_steps:
            self.save()
        wait()
        return super().finish(**extra) if RANK == 0 else {}


def start():
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group(timeout=TIMEOUT)  # gloo for a CPU's tensors, NCCL for a GPU's
        atexit.register(dist.destroy_process_group)


def leave():
    """Ends this rank, when all is done. In Python's own way torch's threads may abort it (once in 22 launches)."""
    atexit._run_exitfuncs()  # destroys the process group, too
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def wait():
    """Until all ranks are here."""
    dist.barrier()


def part(num_envs: int) -> int:
    """Environments of this rank: equal shares, the first ranks take one more if that leaves some over."""
    return num_envs // SIZE + (RANK < num_envs % SIZE)


def total(*numbers: float) -> list[float]:
    """Each number added up over all ranks."""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(numbers)
    return numbers.tolist()


def gathered(thing) -> list:
    """What each rank gives, on all of them."""
    things = [None] * SIZE
    dist.all_gather_object(things, thing)
    return things


def by_first(make):
    """What make() returns on the first rank, on all of them. Where it fails there, all end."""
    start()
    result, failure = [None], None
    if RANK == 0:
        try:
            result = [make()]
        except BaseException as error:
            code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
            result, failure = [SystemExit(code)], error
    dist.broadcast_object_list(result)
    if failure is not None:
        raise failure
    if isinstance(result[0], SystemExit):
        raise result[0]
    return result[0]


def check(args, script: Path):
    if script.stem != "a2c_sync":
        raise UserError(f"{script.name} is one process; torchrun is for a2c_sync.py (docs/scale.md).")
    if args.compile:
        raise UserError("--compile is for one process.")
    if args.device != "cpu" and 0 < torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        raise UserError("a machine has more ranks than GPUs: fewer ranks, or --device cpu.")
    if args.num_envs < SIZE:
        raise UserError(f"--num-envs {args.num_envs} does not give each of {SIZE} ranks an environment.")


def restarted(args):
    """After a restart by torchrun: from the last checkpoint of the same job, or anew if it had none yet."""
    if not RESTARTED or args.resume is not None:
        return args
    if args.run_dir is None:
        raise UserError("torchrun --max-restarts needs --run-dir, to find the last checkpoint.")
    folder = Path(args.run_dir)
    if not (folder / "args.json").exists() or read_args(folder).get("job") != JOB:
        return args
    if (folder / "checkpoint.pt").exists():
        return saved_args(folder, type(args), "a2c_sync")
    shutil.rmtree(folder)
    return args


def failed(error: UserError) -> str:
    """What a rank ends with. Where all fail alike, the first says it, and torchrun ends the others meanwhile."""
    if RANK == 0:
        return f"error: {error}"
    time.sleep(3)
    return f"error on rank {RANK}: {error}"


def lost(error: RuntimeError) -> str:
    """What a rank ends with that another one has left; raises what has another cause."""
    if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
        raise error
    return f"rank {RANK} has lost the others: {' '.join(str(error).split())[:200]}"


def own_random_state(saved: dict, args) -> dict:
    """Of the generators of this rank, if as many ranks made the checkpoint; else they get new seeds."""
    states = saved.get("ranks") or [saved["random"]]
    if len(states) == SIZE:
        return states[RANK]
    if RANK == 0:
        print(f"resumed with {SIZE} ranks instead of {len(states)}: their noise gets new seeds", file=sys.stderr)
    seed_generators(env_seed(args.seed, saved["env_steps"], RANK, SIZE))
    return random_state()


class Follower:
    """The logger of every rank but the first, which writes what all have seen."""

    def __init__(self):
        self.unsent = []

    def episodes(self, env_steps: int, episodes: list):
        self.unsent.append(episodes)

    def state_dict(self) -> dict:
        return {}

    def recent_return(self) -> float:
        return 0.0

    def log(self, *_): ...
    def close(self): ...


class GradientSum:
    """Makes backward() end with the gradient of the whole job's batch: the sum over ranks of share x gradient.

    One message for all parameters, sent when the last of them has its gradient. `share` says what part of the whole
    job's transitions are this rank's: a mean over ranks would weigh a transition more where there are fewer of them.
    """

    def __init__(self, module: torch.nn.Module, share):
        self._params, self._share, self._arrived = list(module.parameters()), share, 0
        for p in self._params:
            dist.broadcast(p.data, 0)  # all begin with the first rank's
            p.register_post_accumulate_grad_hook(self._count)

    def _count(self, _):
        self._arrived += 1
        if self._arrived == len(self._params):
            self._arrived = 0
            grads = [p.grad for p in self._params]
            flat = torch.cat([g.flatten() for g in grads]) * self._share()
            dist.all_reduce(flat)
            for g, summed in zip(grads, flat.split([g.numel() for g in grads])):
                g.copy_(summed.view(g.shape))


class Moments:
    """The update of gymnasium's RunningMeanStd, with the observations of all ranks as one batch."""

    def __init__(self, rms):
        self._rms = rms

    def __call__(self, x: np.ndarray):
        x = np.asarray(x, np.float64)
        sums = np.stack([np.full(x.shape[1:], float(len(x))), x.sum(0), (x**2).sum(0)])
        dist.all_reduce(torch.from_numpy(sums))
        n, first, second = sums
        self._rms.update_from_moments(first / n, second / n - (first / n) ** 2, float(n.flat[0]))
