"""The flags that all scripts share; the range of a flag stands beside the flag."""

import dataclasses
import json
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import tyro

ROOT = Path(__file__).resolve().parent.parent

# Types of flags with a range, which only check_ranges reads
Count = Annotated[int, "[1, inf)"]
Share = Annotated[float, "(0, 1]"]
Fraction = Annotated[float, "[0, 1]"]
Positive = Annotated[float, "(0, inf)"]
NonNegative = Annotated[float, "[0, inf)"]


Json = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="JSON",
    instance_from_str=lambda words: json.loads(words[0]),
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [json.dumps(value)],
)


class UserError(ValueError):
    """Something that the user can mend; the command line prints its one sentence instead of a traceback."""


class NotFinite(UserError):
    """NaN or infinite: an observation, reward, action, loss or weight, which the message names."""


@dataclass
class RunArgs:
    """Flags that all scripts share."""

    env_id: str = "CartPole-v1"
    """environment; `package:Name-v0` imports the package first"""
    env_kwargs: Annotated[dict, Json] = dataclasses.field(default_factory=dict)
    """arguments for the environment's constructor: '{"gravity": 9.8}', in Python a dict"""
    seed: Annotated[int, "[0, 4294967295]"] = 1
    """seed of networks, actions and environments"""
    total_timesteps: Count = 500_000
    """environment steps (transitions of all environments together) to train for"""
    num_envs: Count = 8
    """environments that step in parallel"""
    vectorization: Literal["auto", "sync", "async"] = "auto"
    """auto: the environment's own vector form, else sync: one process; async: a process each, for slow simulators"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto: cuda if there is one, which pays for images, or with --compile"""
    num_threads: Count = 1
    """CPU threads of torch; more pay for large networks on idle cores only, since they wait for each other"""
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"
    """of products of float32 matrices; auto: exact, by the fastest route; highest: exact; high: TF32 on a GPU, else as
    highest; medium: bfloat16 where the machine has units for it, on a CPU in convolutions, too"""
    run_dir: str | None = None
    """folder for everything this run writes; by default runs/<env>__<script>__<seed>__<time>"""
    resume: str | None = None
    """run folder to go on with: takes every flag from there, flags given beside it override"""
    checkpoint_every: Count | None = None
    """environment steps between checkpoints, at each of which all environments start anew (not those of a3c_async.py);
    by default ten a run, but not below 2000 steps of each environment"""
    eval_episodes: Count = 20
    """episodes of the greedy evaluation at the end"""

    def total_envs(self) -> int:
        """Environments at a time, which evaluation does not exceed."""
        return self.num_envs


def check_ranges(args: RunArgs):
    """Raises UserError for the first flag outside its range (NaN included), its choices or its type."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        if words := unmet(value := getattr(args, name), hint):
            raise UserError(f"--{name.replace('_', '-')} must {words}, got {value!r}.")


def unmet(value, hint) -> str:
    """What a flag's type, range or choices ask for, in words; nothing if the value fits."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        words = [unmet(value, each) for each in options]
        return " or ".join(words) if all(words) else ""
    if origin is Literal:
        fits, words = value in options, f"be one of {', '.join(options)}"
    elif origin is Annotated and not isinstance(options[1], str):
        return unmet(value, options[0])
    elif origin is Annotated:
        low, high = (float(bound) for bound in options[1][1:-1].split(","))
        fits = not unmet(value, options[0]) and (low <= value if options[1][0] == "[" else low < value)
        fits, words = fits and (value <= high if options[1][-1] == "]" else value < high), f"lie in {options[1]}"
    else:
        fits = isinstance(value, {int: Integral, float: Real, str: (str, Path)}.get(hint, hint))
        fits, words = fits and (hint is bool or not isinstance(value, bool)), f"be {hint.__name__.removesuffix('Type')}"
    return "" if fits else words


class Saved(str):
    """The run folder that flags were read from, as their `resume`: what is changed in them afterwards, overrides."""


def read_args(run_dir: str | Path) -> dict:
    """The flags (and the script's name) that a run folder was made with."""
    path = Path(run_dir) / "args.json"
    try:
        saved = json.loads(path.read_text())
        if not saved["script"].isidentifier():
            raise ValueError
        return saved
    except FileNotFoundError:
        raise UserError(f"{str(run_dir)!r} is no run folder: it has no args.json.") from None
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{str(path)!r} is damaged or was not written by this project.") from None


def saved_args(run_dir: str | Path, Args: type[RunArgs], script: str) -> RunArgs:
    """The flags of a run folder, to go on with."""
    saved = read_args(run_dir)
    if saved["script"] != script:
        raise UserError(f"{str(run_dir)!r} was made by {saved['script']}.py; resume it with that script.")
    names = {field.name for field in dataclasses.fields(Args)} - {"resume", "run_dir"}
    args = Args(resume=Saved(run_dir), **{name: value for name, value in saved.items() if name in names})
    check_ranges(args)  # somebody may have edited the file
    return args
