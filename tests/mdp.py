"""A small MDP that can be enumerated exactly."""

import numpy as np
import torch

S, A = 3, 2
TERMINAL = S  # entering it terminates


def exact_values(P, R, pi, gamma):
    """V (S + 1,) with 0 for the terminal state, and Q (S, A), from P (S, A, S + 1), R and pi (S, A)."""
    P_pi, R_pi = torch.einsum("sa,sat->st", pi, P[..., :S]), (pi * R).sum(1)
    V = torch.linalg.solve(torch.eye(S) - gamma * P_pi, R_pi)
    V = torch.cat([V, torch.zeros(1)])
    return V, R + gamma * P @ V


class MDP:
    """3 states, 2 actions, random transitions that may terminate, rewards r(s, a)."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.P = torch.tensor(rng.dirichlet(np.ones(S + 1), (S, A)))  # (S, A, S + 1)
        self.R = torch.tensor(rng.normal(size=(S, A)))
        self.start = torch.tensor(rng.dirichlet(np.ones(S)))

    def rollouts(self, T):
        """Every (s_0, a_0, ..., s_T): states (T + 1, N), actions (T, N), probability of the states given actions (N,).

        After termination the reset step leads to a start state, as gymnasium's autoreset does.
        """
        paths = [([s], [], self.start[s]) for s in range(S)]
        for _ in range(T):
            longer = []
            for states, actions, p in paths:
                for a in range(A):
                    if states[-1] == TERMINAL:  # both actions lead to a reset; the policy's probabilities sum to 1
                        successors = [(s, self.start[s]) for s in range(S)]
                    else:
                        successors = [(s, self.P[states[-1], a, s]) for s in range(S + 1)]
                    longer += [(states + [s], actions + [a], p * q) for s, q in successors]
            paths = longer
        states, actions, p = zip(*paths)
        return torch.tensor(states).T, torch.tensor(actions).T, torch.stack(p)
