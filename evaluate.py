"""Greedy evaluation of a run:  python evaluate.py RUN_DIR [--episodes N] [--video]"""

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from common.checkpoint import load_checkpoint, set_precision
from common.envs import make_envs
from common.evaluate import evaluate
from common.flags import ROOT, Count, RunArgs, Seed, UserError, check_ranges, read_args, saved_args


@dataclass
class Options:
    run_dir: Annotated[str, tyro.conf.Positional]
    """run folder of a trained agent"""
    episodes: Count = 20
    """episodes to play"""
    video: bool = False
    """write the first episode to RUN_DIR/video.mp4"""
    seed: Seed = 0
    """seed of the environments; 0 gives the episodes of the evaluation after training"""
    max_steps: Count = 100_000
    """steps after which an episode is given up"""


def load_args(run_dir: str | Path) -> RunArgs:
    """The flags of a run folder, to train on: train(dataclasses.replace(load_args(run_dir), total_timesteps=...))."""
    script = read_args(run_dir)["script"]
    if not (ROOT / f"{script}.py").is_file():
        raise UserError(f"{str(run_dir)!r} was made by {script}.py, which is none of the scripts here.")
    return saved_args(run_dir, importlib.import_module(script).Args, script)


def load_agent(run_dir: str | Path):
    """The trained agent of a run folder, its Args, the statistics of its environments, and its environment steps."""
    agent, args, content = restore(run_dir)
    return agent, args, content["parts"]["envs"], content["env_steps"]


def restore(run_dir: str | Path):
    """The trained agent of a run folder, its Args, and all that its checkpoint holds."""
    args = load_args(run_dir)
    check_ranges(args)
    script = importlib.import_module(type(args).__module__)
    content = load_checkpoint(run_dir, script.__name__)
    envs = make_envs(args, 1, evaluation=True)
    agent = script.make_agent(envs, args)
    envs.close()
    try:
        agent.load_state_dict(content["parts"]["agent"])
    except (KeyError, RuntimeError):
        raise UserError(f"The checkpoint in {str(run_dir)!r} does not fit its args.json.") from None
    return agent, args, content


def frame(envs, obs: np.ndarray) -> np.ndarray:
    """The first environment as an RGB picture (H, W, 3). Atari's does not render: what the agent sees, enlarged."""
    if envs.render_mode == "rgb_array":
        return envs.render()[0]
    return np.repeat(obs[0, -1].repeat(4, 0).repeat(4, 1)[..., None], 3, axis=-1)


def write_video(agent, args: RunArgs, env_state: dict, run_dir: Path, seed: int = 0, max_steps: int = 30_000):
    """The first episode, as RUN_DIR/video.mp4; frames go to the file as they come. Raises UserError if that fails."""
    try:
        import imageio_ffmpeg
    except ImportError:
        raise UserError('--video needs an extra: pip install -e ".[video]"') from None
    for driver in ("SDL_VIDEODRIVER", "SDL_AUDIODRIVER"):  # pictures need neither
        os.environ.setdefault(driver, "dummy")
    path, temporary, shapes, writer = run_dir / "video.mp4", run_dir / "video.tmp.mp4", [], None

    def write(envs, obs):
        nonlocal writer
        picture = np.ascontiguousarray(frame(envs, obs), np.uint8)
        shapes.append(picture.shape)
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.shape != shapes[0]:
            raise ValueError(f"frames must be (height, width, 3), of one size, not {shapes[0]} and {picture.shape}")
        if writer is None:
            height, width, _ = picture.shape
            writer = imageio_ffmpeg.write_frames(str(temporary), (width, height), fps=30, macro_block_size=2)
            writer.send(None)
        writer.send(picture)

    try:
        evaluate(agent, args, env_state, 1, seed, max_steps, write, render=True)
        writer.close()
        temporary.replace(path)
    except Exception as error:
        raise UserError(f"No video of {args.env_id}: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error
    finally:
        if writer is not None:
            writer.close()
        temporary.unlink(missing_ok=True)
    print(f"video of one episode, {len(shapes)} frames: {path}")


def main():
    options = tyro.cli(Options, description=__doc__)
    failure = None
    try:
        check_ranges(options)
        agent, args, content = restore(options.run_dir)
        env_state = content["parts"]["envs"]
        max_steps = options.max_steps
        torch.set_num_threads(args.num_threads)  # as in the evaluation after training
        set_precision(args.matmul_precision)
        if options.video:
            try:
                write_video(agent, args, env_state, Path(options.run_dir), options.seed, max_steps)
            except UserError as error:
                failure = f"error: {error}"  # the numbers are printed all the same
        returns, lengths = evaluate(agent, args, env_state, options.episodes, options.seed, max_steps)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(
        f"greedy return {np.mean(returns):.1f} ± {np.std(returns):.1f} over {len(returns)} episodes of {args.env_id} "
        f"(mean length {np.mean(lengths):.0f}), trained for {content['env_steps']:,} environment steps"
    )
    sys.exit(failure)


if __name__ == "__main__":
    main()
