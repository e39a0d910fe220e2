"""The flags that all scripts share; the range of a flag stands beside the flag."""

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import tyro

ROOT = Path(__file__).resolve().parent.parent

# Types of flags with a range, which only check_flags reads
Count = Annotated[int, "[1, inf)", lambda x: 1 <= x]
Natural = Annotated[int, "[0, inf)", lambda x: 0 <= x]
Seed = Annotated[int, "[0, 4294967295]", lambda x: 0 <= x < 2**32]
Share = Annotated[float, "(0, 1]", lambda x: 0 < x <= 1]
Fraction = Annotated[float, "[0, 1]", lambda x: 0 <= x <= 1]
Positive = Annotated[float, "(0, inf)", lambda x: 0 < x < inf]
NonNegative = Annotated[float, "[0, inf)", lambda x: 0 <= x < inf]
Json = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="JSON",
    instance_from_str=lambda words: json.loads(words[0]),
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [json.dumps(value)],
)


class UserError(ValueError):
    """Something that the user can mend; the command line prints its one sentence instead of a traceback."""


@dataclass
class RunArgs:
    """Flags that all scripts share."""

    env_id: str = "CartPole-v1"  # environment; `package:Name-v0` imports the package first
    env_kwargs: Annotated[dict, Json] = dataclasses.field(default_factory=dict)  # its arguments: '{"gravity": 9.8}'
    seed: Seed = 1  # seed of networks, actions and environments
    total_timesteps: Count = 500_000  # environment steps (of all environments together) to train for
    num_envs: Count = 8  # environments that step in parallel
    vectorization: Literal["auto", "sync", "async"] = "auto"  # own C++ form, else one process; a process each
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks live; cuda pays for images, or with --compile
    num_threads: Count = 1  # CPU threads of torch; more pay for large networks on idle cores only
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # torch.set_float32_matmul_precision
    run_dir: str | None = None  # folder of all that is written; by default runs/<env>__<script>__<seed>__<time>
    resume: str | None = None  # run folder to go on with: all flags are those of then, except those given beside it
    checkpoint_every: Count | None = None  # steps between checkpoints, at which environments start anew; by default 10
    eval_episodes: Count = 20  # episodes of the greedy evaluation at the end


def check_ranges(args):
    """Raises UserError for the first flag outside its range (NaN included) or its choices."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise UserError(f"{flag} must be one of {', '.join(get_args(hint))}, got {value!r}.")
        for kind in (hint, *get_args(hint)):  # of `Positive | None`, Positive
            if isinstance(value, (int, float)) and (range := getattr(kind, "__metadata__", ())):
                if not range[1](value):
                    raise UserError(f"{flag} must lie in {range[0]}, got {value!r}.")


def read_args(run_dir: str | Path) -> dict:
    """The flags (and the script's name) that a run folder was made with."""
    try:
        saved = json.loads((Path(run_dir) / "args.json").read_text())
        if saved["script"].isidentifier():
            return saved
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{str(run_dir)!r} is no run folder: its args.json is missing or damaged.")


def saved_args(run_dir: str | Path, Args: type[RunArgs], script: str) -> RunArgs:
    """The flags of a run folder, to go on with."""
    saved = read_args(run_dir)
    if saved["script"] != script:
        raise UserError(f"{str(run_dir)!r} was made by {saved['script']}.py; resume it with that script.")
    names = {field.name for field in dataclasses.fields(Args)} - {"resume", "run_dir"}
    return Args(resume=str(run_dir), **{name: value for name, value in saved.items() if name in names})


def parse(train, Args) -> RunArgs:
    """The command line of a script; with --resume, the flags of that run are the defaults."""
    module, finder = sys.modules[train.__module__], argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume")
    folder = finder.parse_known_args()[0].resume
    default = saved_args(folder, Args, Path(module.__file__).stem) if folder else None
    return tyro.cli(Args, default=default, description=module.__doc__.partition("\n\n")[0])
