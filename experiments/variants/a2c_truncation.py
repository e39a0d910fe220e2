"""a2c_sync.py that takes a time limit for an end: no bootstrap from the state after it."""

import a2c_sync
from experiments import time_limits  # noqa: F401

a2c_sync.__file__ = __file__  # a run's folder tells this from a2c_sync.py

if __name__ == "__main__":
    a2c_sync.run_cli(a2c_sync.train, a2c_sync.Args)
