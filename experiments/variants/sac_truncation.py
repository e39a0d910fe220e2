"""sac.py that takes a time limit for an end: the critic learns that nothing follows."""

import sac
from experiments import time_limits  # noqa: F401

sac.__file__ = __file__  # a run's folder tells this from sac.py

if __name__ == "__main__":
    sac.run_cli(sac.train, sac.Args)
