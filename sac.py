"""Soft actor-critic (SAC): decisions D16-D18 of the lecture in one file.

Against off_policy_ac.py: the policy gradient goes through the action into Q (reparameterization, D16). The reward
includes the policy's entropy, weighed by a temperature α that is learned, and targets use the smallest estimate of
several critics (D17). Actions are samples of a Gaussian, squashed into [-1, 1] by tanh; make_envs scales them to the
environment's own bounds.

    (1)  y = r + γ (1 − terminated) S̄(s', a')                  a' ~ π_θ(·|s')
    (2)  L_critic = Σ_i ½ mean (Q_i(s, a) − y)²
    (3)  b_k = 1/(K − 1) Σ_{j≠k} S(s, a^π_j)                   a^π_1 ... a^π_K ~ π_θ(·|s)
    (4)  S(s, a) = min_i Q_i(s, a) − α log π_θ(a|s)
    (5)  L_actor = −mean_{s,k} S(s, a^π_k)
    (6)  φ̄ ← τ φ + (1 − τ) φ̄
    (7)  a = tanh u,  u = μ_θ(s) + σ_θ(s) ε,  ε ~ N(0, 1)
    (8)  log π_θ(a|s) = Σ_dim [log N(u; μ, σ) − 2 (log 2 − u − softplus(−2u))]
    (9)  L_alpha = −log α mean (log π_θ(a^π|s) − dim A)
    (10) L_score = −mean_{s,k} log π_θ(a^π_k|s) (S(s, a^π_k) − b_k)

γ --gamma, K --num-action-samples, τ --tau, α --alpha, Q_i one of the --num-critics, S̄ made of their averaged copies, of
parameters φ̄ and φ. Greedy actions are those of an averaged actor, by (6) with --actor-tau. arXiv 1812.05905: (1) eq.
2-5, (5) eq. 9, (8) eq. 26, (9) eq. 18 with log α for α. `--estimator score` takes (10) in place of (5), the score
function's gradient as in off_policy_ac.py, all else equal.

    python sac.py                                     Pendulum-v1: greedy return -140, in two to four minutes
    python sac.py --env-id HalfCheetah-v5 --total-timesteps 100000 --learning-starts 10000      5500

The step after an episode's end only resets the environment (gymnasium's NEXT_STEP mode). It is not a transition, and
the mask `valid` keeps it out of what is learned and counted. All other steps show the true successor of a state.
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
    buffer_size: Count = 1_000_000  # transitions that the replay buffer holds (D8)
    learning_starts: Natural = 1_000  # transitions, of uniformly random actions, that the first update waits for
    batch_size: Count = 256  # B, transitions of the buffer in one update
    updates_per_step: Positive = 1.0  # updates for every transition, of however many environments (D19)
    num_critics: Count = 2  # M, number of critics; targets use the smallest estimate
    estimator: Literal["reparam", "score"] = "reparam"  # through the action into Q (D16); the score function's
    num_action_samples: Count = 1  # K, actions sampled at every state of the batch; score needs 2 or more (D14)
    alpha: Literal["auto"] | Positive = "auto"  # α, weight of the entropy: tuned to an entropy of −dim A, or fixed
    tau: Share = 0.005  # τ, share of the critics that their averaged copy takes over in an update
    actor_tau: Share = 0.001  # the same for the actor, whose averaged copy acts greedily; 1: the actor itself does
    actor_lr: Positive = 3e-4  # learning rate of the actor and of the temperature
    critic_lr: Positive | None = 1e-3  # learning rate of the critics; None: that of the actor
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
    """(..., num_inputs) -> (..., num_features)"""

    num_features = 256

    def __init__(self, num_inputs):
        hidden, relu = orthogonal(nn.Linear(num_inputs, self.num_features)), nn.ReLU(inplace=True)  # takes less memory
        super().__init__(hidden, relu, orthogonal(nn.Linear(self.num_features, self.num_features)), relu)


class SquashedGaussian:
    """π over actions tanh u (..., A), given as u: independent Gaussians, mean and log σ (..., A) from the network."""

    def __init__(self, mean, log_std):
        self.mean, self.log_std = mean, log_std

    def sample(self, *num):
        noise = torch.randn(*num, *self.mean.shape, device=self.mean.device)
        return self.mean + self.log_std.exp() * noise  # (7)

    def mode(self):
        return self.mean

    def log_prob(self, u):
        """Log-density of the action tanh u. Exact also where log(1 − tanh² u) has lost all digits."""
        z = (u - self.mean) / self.log_std.exp()
        log_normal = -(0.5 * z**2 + self.log_std + 0.5 * math.log(2 * math.pi))
        return (log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)  # (8)


class Actor(nn.Module):
    """(..., obs or features) -> π_θ(·|s)"""

    def __init__(self, body, num_features, num_actions):
        super().__init__()
        self.body = body
        self.head = orthogonal(nn.Linear(num_features, 2 * num_actions), gain=0.01)  # at first nearly 0 everywhere

    def forward(self, x):
        mean, log_std = self.head(self.body(x)).chunk(2, -1)
        return SquashedGaussian(mean, log_std.clamp(-20, 2))  # the usual bounds; beyond them log σ has no gradient


class BatchedLinear(nn.Module):
    """M linear layers as one batched product, for speed: (M, B, num_inputs) -> (M, B, num_outputs)"""

    def __init__(self, num, num_inputs, num_outputs, gain=2**0.5):
        super().__init__()
        layers = [orthogonal(nn.Linear(num_inputs, num_outputs), gain) for _ in range(num)]
        self.weight = nn.Parameter(torch.stack([layer.weight.T for layer in layers]).detach())
        self.bias = nn.Parameter(torch.zeros(num, 1, num_outputs))

    def forward(self, x):
        return torch.bmm(x, self.weight).add_(self.bias)


class Critic(nn.Module):
    """Q_1 ... Q_M: (B, obs or features), (..., B, A) actions -> (M, ..., B). The same as M copies of a critic."""

    def __init__(self, body, num_features, num_critics):
        super().__init__()
        self.num_critics = num_critics
        self.body = body
        self.head = BatchedLinear(num_critics, num_features, 1, gain=1.0)

    def forward(self, x, actions):
        x = x.expand(*actions.shape[:-1], -1)  # (..., B, D): K actions of each state
        x = torch.cat([x, actions], -1).flatten(0, -2).expand(self.num_critics, -1, -1)
        return self.head(self.body(x)).view(-1, *actions.shape[:-1])  # like the rewards; (..., 1) would broadcast


class ActorCritic(nn.Module):
    """Networks that share nothing (D1), the averaged copy of the critics that targets are made of (D17), and log α."""

    def __init__(self, num_obs, num_actions, num_critics, alpha):
        super().__init__()
        self.actor = Actor(MLP(num_obs), MLP.num_features, num_actions)
        size, relu = MLP.num_features, nn.ReLU(inplace=True)
        hidden, last = BatchedLinear(num_critics, num_obs + num_actions, size), BatchedLinear(num_critics, size, size)
        self.critic = Critic(nn.Sequential(hidden, relu, last, relu), size, num_critics)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.averaged_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(float(alpha)).log())

    @torch.no_grad()
    def act(self, obs, greedy=False):
        """obs (N, ...) -> actions (N,) or (N, A), sampled or the most likely ones."""
        return (self.averaged_actor(obs).mode() if greedy else self.actor(obs).sample()).tanh()


# --- Equations --------------------------------------------------------------------------------------------------------


def td_target(rewards, terminated, next_value, gamma):
    """Regression target of the critic; a time limit is no end, so only `terminated` cuts the bootstrap. All (B,)."""
    assert rewards.shape == terminated.shape == next_value.shape
    return rewards + gamma * (1 - terminated.to(rewards.dtype)) * next_value  # (1)


def critic_loss_fn(q, q_target):
    """Regression of every critic on the targets, which are constants. (M, B) and (B,)."""
    assert q.shape[1:] == q_target.shape
    return 0.5 * ((q - q_target) ** 2).mean(-1).sum()  # (2)


def leave_one_out(q):
    """Baseline of sample k: the mean of the others; it does not depend on action k, so it adds no bias. (K, B)."""
    return (q.sum(0) - q) / (len(q) - 1)  # (3)


def soft_value(q, log_probs, alpha):
    """What the smallest estimate and the entropy of an action are worth together (D18). (M, ...) and (...)."""
    assert q.shape[1:] == log_probs.shape
    return q.amin(0) - alpha * log_probs  # (4)


def actor_loss_fn(scores):
    """Its gradient flows through the actions into Q (D16), arXiv 1812.05905 eq. 9. Soft values, (K, B)."""
    return -scores.mean()  # (5)


def score_loss_fn(log_probs, scores):
    """The same gradient in expectation, by the score function; scores are constants. Both (K, B)."""
    assert log_probs.shape == scores.shape
    return -(log_probs * (scores - leave_one_out(scores))).mean()  # (10)


def alpha_loss_fn(log_alpha, log_probs, num_dims):
    """Raises α where the policy's entropy is below the target −dim A, lowers it above; log_probs are constants."""
    return -log_alpha * (log_probs.detach() - num_dims).mean()  # (9)


@torch.no_grad()
def polyak_update(target, source, tau):
    """The target network follows slowly, so that the critic does not chase itself (D17)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)  # (6)


# --- Update -----------------------------------------------------------------------------------------------------------


def loss_fn(agent, batch, args):
    """Loss of a batch (B, ...) from the buffer and its metrics, in the lecture's order (D4)."""
    alpha = agent.log_alpha.exp().detach()

    # Targets
    with torch.no_grad():
        next_policy = agent.actor(batch.next_obs)
        next_u = next_policy.sample()  # (B, A): what the policy would do now (D10)
        next_actions = next_u.tanh()  # (7)
        next_q = agent.target_critic(batch.next_obs, next_actions)  # (M, B)
        next_value = soft_value(next_q, next_policy.log_prob(next_u), alpha)
        q_target = td_target(batch.rewards, batch.terminated, next_value, args.gamma)

    # Critic
    q = agent.critic(batch.obs, batch.actions)  # (M, B): valid for any action, of whichever policy
    critic_loss = critic_loss_fn(q, q_target)

    # Actor
    policy = agent.actor(batch.obs)  # at states of older policies (D15)
    pi_u = policy.sample(args.num_action_samples)  # (K, B, A): fresh, without the simulator (D11, D14)
    pi_u = pi_u if args.estimator == "reparam" else pi_u.detach()
    log_probs, pi_actions = policy.log_prob(pi_u), pi_u.tanh()  # (K, B) and (K, B, A)
    # The gradient goes through Q into the actions (D16), not into the critics' parameters
    constants = {name: p.detach() for name, p in agent.critic.named_parameters()}
    pi_q = functional_call(agent.critic, constants, (batch.obs, pi_actions))  # (M, K, B)
    scores = soft_value(pi_q, log_probs, alpha)
    if args.estimator == "reparam":
        actor_loss = actor_loss_fn(scores)
    else:
        actor_loss = score_loss_fn(log_probs, scores.detach())

    # Temperature
    alpha_loss = alpha_loss_fn(agent.log_alpha, log_probs, pi_actions.shape[-1])

    loss = actor_loss + critic_loss + alpha_loss
    metrics = {"critic_loss": critic_loss, "actor_loss": actor_loss, "alpha_loss": alpha_loss}
    metrics |= {"value": q.mean(), "entropy": -log_probs.mean(), "alpha": alpha}
    return loss, {name: value.detach() for name, value in metrics.items()}


def update(agent, optimizer, batch, args):
    """One gradient step on a batch, and a step of the target network."""
    loss, metrics = loss_fn(agent, batch, args)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    polyak_update(agent.target_critic, agent.critic, args.tau)
    polyak_update(agent.averaged_actor, agent.actor, args.actor_tau)
    return metrics


# --- Train ------------------------------------------------------------------------------------------------------------
# Run checks the flags and seeds all random generators. run.open makes or resumes the run folder, keeps its arguments in
# checkpoints, and closes all at the end; run.count and run.log write metrics.csv and TensorBoard; run.finish evaluates.
# make_envs builds the environments: observations are float32 (images: uint8), actions lie in [-1, 1] or begin at 0.


def make_agent(envs, args: Args) -> ActorCritic:
    alpha = 1.0 if args.alpha == "auto" else args.alpha
    return ActorCritic(*envs.obs_spec[0], envs.num_actions, args.num_critics, alpha)


def make_optimizer(agent: ActorCritic, args: Args) -> torch.optim.Optimizer:
    """A group for each network, so that nothing ties them together; log α has the actor's."""
    networks = [(agent.actor, args.actor_lr), (agent.critic, args.critic_lr or args.actor_lr)]
    groups = [{"params": list(network.parameters()), "lr": lr} for network, lr in networks]
    groups += [{"params": [agent.log_alpha], "lr": args.actor_lr if args.alpha == "auto" else 0.0}]
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
            transition = {"obs": obs, "actions": actions, "rewards": rewards, "next_obs": next_obs}
            buffer.add(valid, **transition, terminated=terminated)
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
