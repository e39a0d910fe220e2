"""The flags that all scripts share; the range of a flag stands beside the flag."""

import inspect
import json
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import tyro

ROOT = Path(__file__).resolve().parent.parent

# Types of flags with a range, which only check_ranges reads
Count = Annotated[int, "[1, inf)", lambda x: 1 <= x]
Natural = Annotated[int, "[0, inf)", lambda x: 0 <= x]
Seed = Annotated[int, "[0, 4294967295]", lambda x: 0 <= x < 2**32]
Share = Annotated[float, "(0, 1]", lambda x: 0 < x <= 1]
Fraction = Annotated[float, "[0, 1]", lambda x: 0 <= x <= 1]
Positive = Annotated[float, "(0, inf)", lambda x: 0 < x < float("inf")]
NonNegative = Annotated[float, "[0, inf)", lambda x: 0 <= x < float("inf")]
Json = tyro.constructors.PrimitiveConstructorSpec(  # nargs, metavar, from words, whether it is one, to words
    1, "JSON", lambda words: json.loads(words[0]), lambda x: isinstance(x, dict), lambda x: [json.dumps(x)]
)


class UserError(ValueError):
    """Something that the user can mend; the command line prints its one sentence instead of a traceback."""


@dataclass
class RunArgs:
    """Flags that all scripts share."""

    env_id: str = "CartPole-v1"  # environment; `package:Name-v0` imports the package first
    env_kwargs: Annotated[dict, Json] = field(default_factory=dict)  # arguments of its constructor: '{"gravity": 9.8}'
    total_timesteps: Count = 500_000  # environment steps (of all environments together) to train for
    num_envs: Count = 8  # N, environments that step in parallel
    seed: Seed = 1  # seed of networks, actions and environments
    vectorization: Literal["auto", "sync", "async"] = "auto"  # the environment's own, else one process; a process each
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks live; cuda pays for images, or with --compile
    num_threads: Count = 1  # CPU threads of torch; more pay for large networks on idle cores only
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"  # torch's; auto: exact, on AMD by oneDNN
    run_dir: str | None = None  # folder of all that is written; by default runs/<env>__<script>__<seed>__<time>
    resume: str | None = None  # run folder to go on with: all flags are those of then, except those given beside it
    checkpoint_every: Count | None = None  # steps between checkpoints, which reset environments; by default 10 a run
    eval_episodes: Count = 20  # episodes of a greedy evaluation, which there is at the end
    eval_every: Count | None = None  # steps between more of them, logged as eval/return


def check_ranges(args):
    """Raises UserError for the first flag outside its range (NaN included) or its choices."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise UserError(f"{flag} must be one of {', '.join(get_args(hint))}, got {value!r}.")
        for kind in (hint, *get_args(hint)):  # of `Positive | None`, Positive
            limits = getattr(kind, "__metadata__", ())
            if len(limits) == 2 and not isinstance(value, (str, type(None))) and not limits[1](value):
                raise UserError(f"{flag} must lie in {limits[0]}, got {value!r}.")


def read_args(run_dir: str | Path) -> dict:
    """The flags (and the script's name) that a run folder was made with."""
    try:
        saved = json.loads((Path(run_dir) / "args.json").read_text())
        if saved["script"].isidentifier() and saved["total_timesteps"] > 0:
            return saved
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{str(run_dir)!r} is no run folder: its args.json is missing or damaged.")


def saved_args(run_dir: str | Path, Args: type[RunArgs], script: str) -> RunArgs:
    """The flags of a run folder, to go on with."""
    saved = read_args(run_dir)
    if saved["script"] != script:
        raise UserError(f"{str(run_dir)!r} was made by {saved['script']}.py; resume it with that script.")
    names = {each.name for each in fields(Args)} - {"resume", "run_dir"}
    return Args(resume=str(run_dir), **{name: value for name, value in saved.items() if name in names})


def parse(train, Args) -> RunArgs:
    """The command line of a script; with --resume, the flags of that run are the defaults."""
    module = sys.modules[train.__module__]
    script, (title, _, text) = Path(module.__file__).stem, module.__doc__.partition("\n\n")
    folder = re.search(r"\0--resume[=\0]([^\0]+)", "\0".join(sys.argv))
    default = saved_args(folder[1], Args, script) if folder else Args()
    hints, helps = get_type_hints(Args, include_extras=True), {}
    for each in Args.__mro__[-2::-1]:
        with suppress(OSError):  # where there is no source, there is no help
            helps |= re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(each), re.M)

    def box(names):
        types = {n: Annotated[hints[n], tyro.conf.arg(help=helps.get(n, ""))] for n in names}
        flags = [(n, kind, field(default_factory=lambda n=n: getattr(default, n))) for n, kind in types.items()]
        return tyro.conf.OmitArgPrefixes[make_dataclass("Flags", flags)]

    shared = RunArgs.__annotations__
    boxes = [("algorithm", box(name for name in hints if name not in shared)), ("run", box(shared))]
    try:
        given = tyro.cli(make_dataclass("Flags", boxes), description=title)
    except SystemExit as end:
        if not end.code:  # of --help
            print(f"More in docs/{script}.md. Examples:", *re.findall(r"^    python .*", text, re.M), sep="\n")
        raise
    return Args(**vars(given.algorithm), **vars(given.run))
