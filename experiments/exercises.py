"""What the planted faults of docs/exercises.md look like:  python -m experiments.exercises

Runs each script with and without its fault (seed 1, some minutes in all), and draws the metric that gives it away.
Needs the extra: pip install -e ".[plot]"
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

from common.flags import ROOT
from experiments.patch import patched
from experiments.runner import read_log

FAULTS = {  # script, flags, the metric that gives it away
    1: ("a2c_sync", "--env-id Acrobot-v1 --total-timesteps 200000", "losses/value"),
    2: ("sac", "--total-timesteps 5000 --actor-tau 1", "losses/alpha"),
    3: ("a2c_sync", "--total-timesteps 100000", "losses/value"),
    4: ("off_policy_ac", "--total-timesteps 15000", "losses/entropy"),
    5: ("a3c_async", "--total-timesteps 200000", "losses/value"),
    6: ("off_policy_ac", "--env-id Pendulum-v1 --total-timesteps 8000", "losses/value"),
    7: ("off_policy_ac", "--env-id Pendulum-v1 --total-timesteps 8000", "losses/critic_loss"),
    8: ("sac", "--total-timesteps 5000 --actor-tau 1", "losses/actor_loss"),
}


def run(number: int, faulty: bool, out: Path) -> dict:
    """The log of a run of a copy of the repository, made once."""
    script, flags, _ = FAULTS[number]
    folder = out / f"{number}{'-faulty' * faulty}"
    if not (folder / "results.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(ROOT / "common", Path(copy, "common"))
            if faulty:
                patched(number, script, copy)
            else:
                shutil.copy(ROOT / f"{script}.py", copy)
            words = [sys.executable, f"{script}.py", *flags.split(), "--seed", "1", "--run-dir", str(folder.absolute())]
            subprocess.run(words, cwd=copy, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           env=os.environ | {"PYTHONPATH": copy, "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    return read_log(folder)


def main(out: Path = Path("runs/exercises")):
    """Args:
    out: folder of the runs
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(12, 5.4), layout="constrained")
    for number, one in zip(FAULTS, axes.flat):
        script, _, tag = FAULTS[number]
        for faulty, style in ((False, "-"), (True, "--")):
            env_steps, _, values = zip(*run(number, faulty, out)[tag])
            one.plot(
                env_steps, values, style, color="C1" if faulty else "C0", label="with the fault" if faulty else "right"
            )
        one.set_title(f"{number}. {script}.py", fontsize=9)
        one.set(xlabel="environment steps", ylabel=tag)
        one.xaxis.set_major_locator(plt.MaxNLocator(3))
        one.grid(alpha=0.3)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(ROOT / "docs" / "figures" / "exercises.png", dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
