"""off_policy_ac.py that takes a time limit for an end: the critic learns that nothing follows."""

import off_policy_ac
from experiments import time_limits  # noqa: F401

off_policy_ac.__file__ = __file__  # a run's folder tells this from off_policy_ac.py

if __name__ == "__main__":
    off_policy_ac.run_cli(off_policy_ac.train, off_policy_ac.Args)
