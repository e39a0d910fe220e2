"""off_policy_ac.py that takes a time limit for an end: the critic learns that nothing follows."""

import off_policy_ac
from common.envs import Envs

step = Envs.step


def step_with_ends(envs, actions):
    obs, rewards, terminated, truncated, episodes = step(envs, actions)
    return obs, rewards, terminated | truncated, truncated, episodes


Envs.step = step_with_ends

if __name__ == "__main__":
    off_policy_ac.run_cli(off_policy_ac.train, off_policy_ac.Args)
