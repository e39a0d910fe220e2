"""Soft actor-critic (SAC): decisions D16-D18 of the lecture in one file.

Against off_policy_ac.py: the policy gradient goes through the action into Q (reparameterization, D16). The reward
includes the policy's entropy, weighed by a temperature α that is learned, and targets use the smallest estimate of
several critics (D17). Actions are samples of a Gaussian, squashed into [-1, 1] by tanh; make_envs scales them to the
environment's own bounds.

    (1)  a = tanh u,  u = μ_θ(s) + σ_θ(s) ε,  ε ~ N(0, 1)
    (2)  log π(a|s) = Σ_dim [log N(u; μ, σ) − 2 (log 2 − u − softplus(−2u))]
    (3)  y = r + γ (1 − terminated) (min_i Q̄_i(s', a') − α log π(a'|s'))      a' ~ π_θ(·|s')
    (4)  L_critic = Σ_i ½ mean (Q_i(s, a) − y)²
    (5)  L_actor = mean [α log π(a^π|s) − min_i Q_i(s, a^π)]                  a^π ~ π_θ(·|s)
    (6)  b_k = 1/(K − 1) Σ_{j≠k} S_j,   S_k = min_i Q_i(s, a^π_k) − α log π(a^π_k|s)
    (7)  L_score = −mean_{s,k} log π(a^π_k|s) (S_k − b_k)
    (8)  L_alpha = −log α mean (log π(a^π|s) − dim A)
    (9)  φ̄ ← τ φ + (1 − τ) φ̄

γ --gamma, τ --tau, α --alpha, Q_i one of the --num-critics, Q̄_i its averaged copy, of parameters φ and φ̄.
arXiv 1812.05905: (2) eq. 26, (3) eq. 2-5, (5) eq. 9, (8) eq. 18 with log α for α. `--estimator score` takes (7) in
place of (5), the score function's gradient as in off_policy_ac.py, all else equal.

    python sac.py                                     Pendulum-v1: greedy return -142 after 10,000 of its steps
    python sac.py --env-id HalfCheetah-v5 --total-timesteps 100000 --learning-starts 10000 --critic-lr 3e-4      5100

The step after an episode's end only resets the environment (gymnasium's NEXT_STEP mode). It is not a transition, and
the mask `valid` keeps it out of the buffer and the counts. In all other steps next_obs is the true successor of obs.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from common.compile import compiled
from common.envs import make_envs
from common.flags import Count, Fraction, Natural, Positive, RunArgs, Share, UserError
from common.ring_buffer import RingBuffer
from common.run import Run, run_cli

# --- Config -----------------------------------------------------------------------------------------------------------


@dataclass
class Args(RunArgs):
    env_id: str = "Pendulum-v1"  # environment with bounded continuous actions; `package:Name-v0` imports the package
    total_timesteps: Count = 20_000  # environment steps (of all environments together) to train for
    num_envs: Count = 1  # N, environments that step in parallel
    gamma: Fraction = 0.99  # discount γ
    buffer_size: Count = 1_000_000  # transitions that the replay buffer holds
    learning_starts: Natural = 1_000  # transitions, of uniformly random actions, that the first update waits for
    batch_size: Count = 256  # B, transitions of the buffer in one update
    updates_per_step: Positive = 1.0  # updates for every transition, of however many environments
    num_critics: Count = 2  # M, number of critics; targets use the smallest estimate
    estimator: Literal["reparam", "score"] = "reparam"  # through the action into Q (D16); the score function's
    num_action_samples: Count = 1  # K, actions sampled at every state of the batch; score needs 2 or more (D14)
    alpha: Literal["auto"] | Positive = "auto"  # α, weight of the entropy: tuned to an entropy of −dim A, or fixed
    tau: Share = 0.005  # τ, share of the critics that their averaged copy takes over in an update
    actor_lr: Positive = 3e-4  # learning rate of the actor and of the temperature
    critic_lr: Positive = 1e-3  # learning rate of the critics
    compile: bool = False  # torch.compile the update, which takes up to a minute before the first one


def check_flags(args: Args):
    """Raises UserError for flags that contradict each other."""
    if args.estimator == "score" and args.num_action_samples < 2:
        raise UserError("--estimator score compares an action with others: it needs --num-action-samples 2 or more.")
    if args.buffer_size < max(args.num_envs, args.batch_size):
        raise UserError("--buffer-size must be at least --num-envs and --batch-size.")
    if args.learning_starts >= args.total_timesteps:
        raise UserError("--learning-starts must be below --total-timesteps: nothing would be learned.")


# --- Networks ---------------------------------------------------------------------------------------------------------


def orthogonal(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Sequential):
    """(..., num_inputs) -> (..., 256)"""

    num_features = 256

    def __init__(self, num_inputs):
        hidden = orthogonal(nn.Linear(num_inputs, 256))
        super().__init__(hidden, nn.ReLU(), orthogonal(nn.Linear(256, 256)), nn.ReLU())


class SquashedGaussian:
    """π over actions tanh u (..., A), u from independent Gaussians; mean and log σ (..., A) from the network."""

    def __init__(self, mean, log_std):
        self.mean, self.log_std = mean, log_std

    def sample(self, *num):
        return self.sample_u(*num).tanh()  # (1)

    def mode(self):
        return self.mean.tanh()

    def sample_with_log_prob(self, *num, reparam=True):
        """Actions and their log-density; without `reparam` the actions are constants, for the score function."""
        u = self.sample_u(*num)
        u = u if reparam else u.detach()
        log_probs = self.log_prob(u)
        return u.tanh(), log_probs

    def sample_u(self, *num):
        noise = torch.randn(*num, *self.mean.shape, device=self.mean.device)
        return self.mean + self.log_std.exp() * noise  # (1)

    def log_prob(self, u):
        """Log-density of the action tanh u. Exact also where log(1 − tanh² u) has lost all digits."""
        z = (u - self.mean) / self.log_std.exp()
        log_normal = -(0.5 * z**2 + self.log_std + 0.5 * math.log(2 * math.pi))
        return (log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)  # (2)


class Actor(nn.Module):
    """(..., obs) -> π_θ(·|s)"""

    def __init__(self, body, num_features, num_actions):
        super().__init__()
        self.body = body
        self.head = orthogonal(nn.Linear(num_features, 2 * num_actions), gain=0.01)  # at first nearly 0 everywhere

    def forward(self, x):
        mean, log_std = self.head(self.body(x)).chunk(2, -1)
        return SquashedGaussian(mean, log_std.clamp(-20, 2))  # the usual bounds; beyond them log σ has no gradient


class BatchedLinear(nn.Module):
    """M linear layers as one batched product: (M, B, num_inputs) -> (M, B, num_outputs)"""

    def __init__(self, num, num_inputs, num_outputs, gain=2**0.5):
        super().__init__()
        layers = [orthogonal(nn.Linear(num_inputs, num_outputs), gain) for _ in range(num)]
        self.weight = nn.Parameter(torch.stack([layer.weight.T for layer in layers]).detach())
        self.bias = nn.Parameter(torch.zeros(num, 1, num_outputs))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


class Critics(nn.Module):
    """Q_1 ... Q_M: (B, D) observations, (..., B, A) actions -> (M, ..., B)"""

    def __init__(self, num, num_obs, num_actions):
        super().__init__()
        self.num = num
        hidden, last = BatchedLinear(num, num_obs + num_actions, 256), BatchedLinear(num, 256, 256)
        self.body = nn.Sequential(hidden, nn.ReLU(), last, nn.ReLU())
        self.head = BatchedLinear(num, 256, 1, gain=1.0)

    def forward(self, obs, actions):
        obs = obs.expand(*actions.shape[:-1], -1)  # (..., B, D): K actions of each state
        x = torch.cat([obs, actions], -1).flatten(0, -2).expand(self.num, -1, -1)
        q = self.head(self.body(x))  # (M, ... * B, 1)
        return q.view(self.num, *actions.shape[:-1])  # like the rewards; (..., B, 1) would broadcast


class ActorCritic(nn.Module):
    """Networks that share nothing (D1), the averaged copy of the critics that targets are made of (D17), and log α."""

    def __init__(self, num_obs, num_actions, num_critics, alpha):
        super().__init__()
        self.actor = Actor(MLP(num_obs), MLP.num_features, num_actions)
        self.critics = Critics(num_critics, num_obs, num_actions)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(float(alpha)).log())

    @torch.no_grad()
    def act(self, obs, greedy=False):
        """obs (N, ...) -> actions (N, A), sampled, or tanh of the Gaussian's mean."""
        policy = self.actor(obs)
        return policy.mode() if greedy else policy.sample()


# --- Equations --------------------------------------------------------------------------------------------------------


def soft_td_target(rewards, terminated, next_q, next_log_probs, alpha, gamma):
    """Regression target of every critic, the entropy of what follows included. next_q (M, B), the rest (B,)."""
    next_value = next_q.amin(0) - alpha * next_log_probs
    return rewards + gamma * (1 - terminated) * next_value  # (3)


def critic_loss_fn(q, q_target):
    """Regression of every critic on the same targets, which are constants. (M, B) and (B,)."""
    assert q.shape[1:] == q_target.shape
    return 0.5 * ((q - q_target) ** 2).mean(-1).sum()  # (4)


def actor_loss_fn(log_probs, q, alpha):
    """Its gradient flows through the actions into Q (D16), arXiv 1812.05905 eq. 9. (K, B) and (M, K, B)."""
    assert log_probs.shape == q.shape[1:]
    return (alpha * log_probs - q.amin(0)).mean()  # (5)


def leave_one_out(q):
    """Baseline of sample k: the mean of the others; it does not depend on action k, so it adds no bias. (K, B)."""
    return (q.sum(0) - q) / (len(q) - 1)  # (6)


def score_loss_fn(log_probs, q, alpha):
    """The same gradient in expectation, by the score function; q is a constant. (K, B) and (M, K, B)."""
    scores = q.amin(0) - alpha * log_probs.detach()
    return -(log_probs * (scores - leave_one_out(scores))).mean()  # (7)


def alpha_loss_fn(log_alpha, log_probs, num_dims):
    """Raises α where the policy's entropy is below the target −dim A, lowers it above. log_probs are constants."""
    return -log_alpha * (log_probs.detach() - num_dims).mean()  # (8)


@torch.no_grad()
def polyak_update(target, source, tau):
    """The target network follows slowly, so that the critic does not chase itself (D17)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)  # (9)


# --- Update -----------------------------------------------------------------------------------------------------------


def loss_fn(agent, batch, args):
    """Loss of a batch (B, ...) from the buffer and its metrics, in the lecture's order (D4)."""
    alpha = agent.log_alpha.exp().detach()

    # Targets
    with torch.no_grad():
        next_policy = agent.actor(batch.next_obs)
        next_actions, next_log_probs = next_policy.sample_with_log_prob()  # what the policy would do now (D10)
        next_q = agent.target_critics(batch.next_obs, next_actions)  # (M, B)
        q_target = soft_td_target(batch.rewards, batch.terminated, next_q, next_log_probs, alpha, args.gamma)

    # Critics
    q = agent.critics(batch.obs, batch.actions)  # (M, B): valid for any action, of whichever policy
    critic_loss = critic_loss_fn(q, q_target)

    # Actor
    reparam = args.estimator == "reparam"
    policy = agent.actor(batch.obs)
    # (K, B, A) and (K, B): fresh actions, not the buffer's (D11)
    pi_actions, log_probs = policy.sample_with_log_prob(args.num_action_samples, reparam=reparam)
    # The gradient goes through Q into the actions (D16), not into the critics' parameters
    constants = {name: p.detach() for name, p in agent.critics.named_parameters()}
    pi_q = functional_call(agent.critics, constants, (batch.obs, pi_actions))  # (M, K, B)
    actor_loss = (actor_loss_fn if reparam else score_loss_fn)(log_probs, pi_q, alpha)

    # Temperature
    alpha_loss = alpha_loss_fn(agent.log_alpha, log_probs, pi_actions.shape[-1])

    loss = actor_loss + critic_loss + alpha_loss
    metrics = {
        "critic_loss": critic_loss,
        "actor_loss": actor_loss,
        "alpha_loss": alpha_loss,
        "value": q.mean(),
        "entropy": -log_probs.mean(),
        "alpha": alpha,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def update(agent, optimizer, batch, args):
    """One gradient step on a batch, and a step of the target networks."""
    loss, metrics = loss_fn(agent, batch, args)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    polyak_update(agent.target_critics, agent.critics, args.tau)
    return metrics


# --- Train ------------------------------------------------------------------------------------------------------------


def make_agent(envs, args: Args) -> ActorCritic:
    alpha = 1.0 if args.alpha == "auto" else args.alpha
    return ActorCritic(*envs.obs_spec[0], envs.num_actions, args.num_critics, alpha)


def make_optimizer(agent: ActorCritic, args: Args) -> torch.optim.Optimizer:
    """A group for each network, so that learning rates do not tie them together; log α has the actor's."""
    groups = [
        {"params": list(agent.actor.parameters()), "lr": args.actor_lr},
        {"params": list(agent.critics.parameters()), "lr": args.critic_lr},
        {"params": [agent.log_alpha], "lr": args.actor_lr if args.alpha == "auto" else 0.0},
    ]
    return torch.optim.Adam(groups, fused=True)


def train(args: Args) -> dict:
    """Trains, evaluates greedily, and returns what results.json holds."""
    run = Run(args, __file__)
    check_flags(args)
    update_fn = compiled(update, run.device) if args.compile else update
    envs = make_envs(args, images=False, discrete=False)
    agent = make_agent(envs, args).to(run.device)
    optimizer = make_optimizer(agent, args)
    buffer = RingBuffer(args.buffer_size, run.device)

    with run.open(agent=agent, envs=envs, optimizer=optimizer, buffer=buffer):
        if args.alpha != "auto":
            agent.log_alpha.data.fill_(math.log(args.alpha))  # with --resume it may be another one
        obs, _ = envs.reset(seed=run.env_seed())
        valid = np.ones(args.num_envs, bool)
        while run.env_steps < args.total_timesteps:
            if run.checkpoint_due():
                run.save()
                obs, _ = envs.reset(seed=run.env_seed())  # simulators cannot be saved: all start anew
                valid[:] = True

            # Act with the latest policy, at first at random
            if run.env_steps < args.learning_starts:
                actions = 2 * torch.rand(args.num_envs, envs.num_actions) - 1
            else:
                actions = agent.act(torch.as_tensor(obs, device=run.device))
            actions = actions.cpu().numpy()
            next_obs, rewards, terminated, truncated, episodes = envs.step(actions)

            # Store
            buffer.add(valid, obs=obs, actions=actions, rewards=rewards, next_obs=next_obs, terminated=terminated)
            new_steps = int(valid.sum())
            run.count(new_steps, episodes)
            obs, valid = next_obs, ~(terminated | truncated)  # the step after an end only resets
            if run.env_steps <= args.learning_starts:
                continue

            # Learn: so many updates for each transition, not for each step of all environments
            rate = args.updates_per_step
            for _ in range(int(run.env_steps * rate) - int((run.env_steps - new_steps) * rate)):
                metrics = update_fn(agent, optimizer, buffer.sample(args.batch_size), args)
                run.updates += 1
                run.log(metrics)
        return run.finish()


if __name__ == "__main__":
    run_cli(train, Args)
