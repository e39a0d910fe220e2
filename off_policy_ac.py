"""Off-policy actor-critic with a replay buffer: decisions D8-D15 of the lecture in one file.

Against a2c_sync.py: transitions go into a ring buffer (D8), and every update learns from a random batch of it, most of
which older policies made. So the critic becomes Q, and its target takes a fresh action of the current policy (D10). The
policy gradient takes fresh actions, too (D11). Three actions, three names: `batch.actions` a from the buffer,
`next_actions` a' ~ π(·|s'), `pi_actions` a^π ~ π(·|s).

    (1)  y = r + γ (1 − terminated) Q̄(s', a')                  a' ~ π_θ(·|s')
    (2)  L_critic = ½ mean (Q_φ(s, a) − y)²
    (3)  b_k = 1/(K − 1) Σ_{j≠k} Q_φ(s, a^π_j)                  a^π_1 ... a^π_K ~ π_θ(·|s)
    (4)  w = min(π_θ(a|s) / π_old(a|s), w_max)
    (5)  L_actor  = −mean_{s,k} log π_θ(a^π_k|s) (Q_φ(s, a^π_k) − b_k) − β mean H(π_θ(·|s))
    (6)  φ̄ ← τ φ + (1 − τ) φ̄

γ --gamma, K --num-action-samples, β --ent-coef, τ --tau, Q̄ an averaged copy of Q, of parameters φ̄ and φ, w_max = 10.
The lecture's mistakes and alternatives, a flag each: --critic v fits V to the actions of older policies (D9a);
--actor-actions buffer takes those for the policy's own (D9b); --actor-actions importance weighs them by (4) instead
(D12); --baseline none is plain Q, b = 0 (D13).

The states in (5) are still those of older policies (D15). Beyond D8-D15 the file has the baseline (3), the entropy
bonus and the target network (6), each of which it mostly needs (docs/off_policy_ac.md). Against a2c_sync.py it
also has 256 units of ReLU a layer and Adam; it has no decay of the rates, no clipping of gradients, and no images.

    python off_policy_ac.py                                 CartPole-v1: greedy return 500, in 2 to 5 minutes
    python off_policy_ac.py --env-id Pendulum-v1 --total-timesteps 15000

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

from common.compile import compiled
from common.envs import make_envs
from common.flags import Count, Fraction, Natural, NonNegative, Positive, RunArgs, Share, UserError
from common.ring_buffer import RingBuffer
from common.run import Run, run_cli

# --- Config -----------------------------------------------------------------------------------------------------------


@dataclass
class Args(RunArgs):
    total_timesteps: Count = 30_000  # environment steps (of all environments together) to train for
    num_envs: Count = 1  # N, environments that step in parallel
    gamma: Fraction = 0.99  # discount γ
    buffer_size: Count = 1_000_000  # transitions that the replay buffer holds (D8)
    learning_starts: Natural = 1_000  # transitions that the first update waits for
    batch_size: Count = 128  # B, transitions of the buffer in one update
    updates_per_step: Positive = 1.0  # updates for every transition, of however many environments (D19)
    critic: Literal["q", "v"] = "q"  # Q(s, a), valid for any policy's actions (D10); V(s), naive (D9a)
    actor_actions: Literal["policy", "buffer", "importance"] = "policy"  # D11; naive (D9b); the buffer's weighted (D12)
    num_action_samples: Count = 8  # K, actions sampled at every state of the batch (D14)
    baseline: Literal["samples", "none"] = "samples"  # the mean Q of the other samples; plain Q (D13)
    ent_coef: NonNegative = 0.05  # β, weight of the entropy bonus
    tau: Share = 0.02  # τ, share of the critic that its averaged copy takes over in an update; 1: no target network
    actor_lr: Positive = 1e-3  # learning rate of the actor
    critic_lr: Positive | None = None  # learning rate of the critic; by default that of the actor
    compile: bool = False  # torch.compile the update, which takes up to a minute before the first one


def check_flags(args: Args):
    """Raises UserError for flags that contradict each other."""
    if args.critic == "v" and args.actor_actions == "policy":
        raise UserError("--critic v cannot score an action that was not taken: --actor-actions buffer, or importance.")
    if args.actor_actions == "policy" and args.baseline == "samples" and args.num_action_samples < 2:
        raise UserError("--baseline samples compares an action with others: it needs --num-action-samples 2 or more.")
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


class Categorical:
    """π over n actions, from logits (..., n). Samples 5 times as fast as torch.distributions."""

    def __init__(self, logits):
        self.log_probs = logits.log_softmax(-1)

    def sample(self, *num):
        # The Gumbel-max trick: the largest of log p + Gumbel noise, here −log ε, is action a with probability p(a)
        noise = self.log_probs.new_empty(*num, *self.log_probs.shape).exponential_()  # ε
        return (self.log_probs - noise.log()).argmax(-1)

    def mode(self):
        return self.log_probs.argmax(-1)

    def log_prob(self, actions):
        return self.log_probs.expand(*actions.shape, -1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self):
        return -(self.log_probs.exp() * self.log_probs).sum(-1)


class Gaussian:
    """π over actions (..., A): independent Gaussians; mean (..., A) from the network, log σ (A,) a parameter."""

    def __init__(self, mean, log_std):
        self.mean, self.log_std = mean, log_std

    def sample(self, *num):
        noise = torch.randn(*num, *self.mean.shape, device=self.mean.device)
        return self.mean + self.log_std.exp() * noise

    def mode(self):
        return self.mean

    def log_prob(self, actions):
        z = (actions - self.mean) / self.log_std.exp()
        return -(0.5 * z**2 + self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self):
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(self.mean.shape[:-1])


class Actor(nn.Module):
    """(..., obs or features) -> π_θ(·|s)"""

    def __init__(self, body, num_features, num_actions, discrete):
        super().__init__()
        self.body = body
        self.head = orthogonal(nn.Linear(num_features, num_actions), gain=0.01)  # at first nearly the same everywhere
        self.log_std = None if discrete else nn.Parameter(torch.zeros(num_actions))

    def forward(self, x):
        outputs = self.head(self.body(x))
        if self.log_std is None:
            return Categorical(outputs)
        # The environment clips actions to its bounds, [-1, 1] here: a mean outside them would get no learning signal
        return Gaussian(outputs.tanh(), self.log_std)

    def bound_std(self):
        """After an update: σ ≤ e, or an entropy bonus could raise it without limit."""
        if self.log_std is not None:
            self.log_std.data.clamp_(max=1.0)  # a clamp in forward() would have no gradient back to smaller σ


class Critic(nn.Module):
    """Q_φ: (B, obs or features), (..., B) or (..., B, A) actions -> (..., B). As V_φ it ignores the actions."""

    def __init__(self, body, num_features, num_actions, discrete, sees_actions):
        super().__init__()
        self.num_actions, self.discrete, self.sees_actions = num_actions, discrete, sees_actions
        self.body = body
        self.head = orthogonal(nn.Linear(num_features, 1), gain=1.0)

    def forward(self, x, actions):
        # What the environment sees of an action: one of its choices, or a vector clipped to the bounds
        inputs = F.one_hot(actions, self.num_actions).float() if self.discrete else actions.clamp(-1, 1)
        x = x.expand(*inputs.shape[:-1], -1)  # (..., B, D): K actions of each state
        x = torch.cat([x, inputs], -1) if self.sees_actions else x
        return self.head(self.body(x)).squeeze(-1)  # like the rewards; with a last dimension of 1 it would broadcast


class ActorCritic(nn.Module):
    """Two networks that share nothing (D1), and the averaged copy of the critic that targets are made of (D17)."""

    def __init__(self, num_obs, num_actions, discrete, sees_actions):
        super().__init__()
        self.actor = Actor(MLP(num_obs), MLP.num_features, num_actions, discrete)
        critic_body = MLP(num_obs + num_actions if sees_actions else num_obs)
        self.critic = Critic(critic_body, MLP.num_features, num_actions, discrete, sees_actions)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    @torch.no_grad()
    def act(self, obs, greedy=False):
        """obs (N, ...) -> actions (N,) or (N, A), sampled or the most likely ones."""
        policy = self.actor(obs)
        return policy.mode() if greedy else policy.sample()


# --- Equations --------------------------------------------------------------------------------------------------------


def td_target(rewards, terminated, next_value, gamma):
    """Regression target of the critic; a time limit is no end, so only `terminated` cuts the bootstrap. All (B,)."""
    assert rewards.shape == terminated.shape == next_value.shape
    return rewards + gamma * (1 - terminated.to(rewards.dtype)) * next_value  # (1)


def critic_loss_fn(q, q_target):
    """Regression on the targets, which are constants. Both (B,)."""
    assert q.shape == q_target.shape
    return 0.5 * ((q - q_target) ** 2).mean()  # (2)


def leave_one_out(q):
    """Baseline of sample k: the mean of the others; it does not depend on action k, so it adds no bias. (K, B)."""
    return (q.sum(0) - q) / (len(q) - 1)  # (3)


def importance_weights(log_probs, old_log_probs, w_max=10.0):
    """π_θ(a|s) / π_old(a|s) of the buffer's actions, a constant. Clipped: biased, but of finite variance. (B,)."""
    return (log_probs.detach() - old_log_probs).exp().clamp(max=w_max)  # (4)


def actor_loss_fn(log_probs, scores, entropy, ent_coef):
    """Score-function gradient with entropy bonus; log_probs and scores, which are constants, (K, B) or (B,)."""
    assert log_probs.shape == scores.shape
    return -(log_probs * scores).mean() - ent_coef * entropy.mean()  # (5)


@torch.no_grad()
def polyak_update(target, source, tau):
    """The target network follows slowly, so that the critic does not chase itself (D17)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)  # (6)


# --- Update -----------------------------------------------------------------------------------------------------------


def loss_fn(agent, batch, args):
    """Loss of a batch (B, ...) from the buffer and its metrics, in the lecture's order (D4)."""
    # Targets
    with torch.no_grad():
        next_actions = agent.actor(batch.next_obs).sample()  # (B,): what the policy would do now (D10)
        next_value = agent.target_critic(batch.next_obs, next_actions)  # --critic v: of the policy that acted (D9a)
        q_target = td_target(batch.rewards, batch.terminated, next_value, args.gamma)

    # Critic
    q = agent.critic(batch.obs, batch.actions)  # (B,): valid for any action, of whichever policy
    critic_loss = critic_loss_fn(q, q_target)

    # Actor
    policy = agent.actor(batch.obs)  # at states of older policies (D15)
    with torch.no_grad():
        pi_actions = policy.sample(args.num_action_samples)  # (K, B): fresh, without the simulator (D11, D14)
        pi_q = agent.critic(batch.obs, pi_actions)  # (K, B)
    if args.actor_actions == "policy":
        log_probs = policy.log_prob(pi_actions)
        scores, baseline = pi_q, leave_one_out(pi_q)
    else:
        log_probs = policy.log_prob(batch.actions)  # (B,): of an action that another policy chose (D9b)
        scores = q.detach() if args.critic == "q" else q_target
        baseline = pi_q.mean(0)  # an estimate of V(s); with --critic v it is V(s)
    advantages = scores if args.baseline == "none" else scores - baseline  # none: plain Q (D13)
    if args.actor_actions == "importance":
        advantages = advantages * importance_weights(log_probs, batch.old_log_probs)  # (D12)
    entropy = policy.entropy()  # (B,)
    actor_loss = actor_loss_fn(log_probs, advantages, entropy, args.ent_coef)

    loss = actor_loss + critic_loss
    metrics = {"critic_loss": critic_loss, "actor_loss": actor_loss}
    metrics |= {"value": q.mean(), "entropy": entropy.mean()}
    return loss, {name: value.detach() for name, value in metrics.items()}


def update(agent, optimizer, batch, args):
    """One gradient step on a batch, and a step of the target network."""
    loss, metrics = loss_fn(agent, batch, args)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agent.actor.bound_std()
    polyak_update(agent.target_critic, agent.critic, args.tau)
    return metrics


# --- Train ------------------------------------------------------------------------------------------------------------
# Run checks the flags and seeds all random generators. run.open makes or resumes the run folder, keeps its arguments in
# checkpoints, and closes all at the end; run.count and run.log write metrics.csv and TensorBoard; run.finish evaluates.
# make_envs builds the environments: observations are float32 (images: uint8), actions lie in [-1, 1] or begin at 0.


def make_agent(envs, args: Args) -> ActorCritic:
    return ActorCritic(*envs.obs_spec[0], envs.num_actions, envs.discrete, args.critic == "q")


def make_optimizer(agent: ActorCritic, args: Args) -> torch.optim.Optimizer:
    """A group for each network, so that nothing ties them together."""
    networks = [(agent.actor, args.actor_lr), (agent.critic, args.critic_lr or args.actor_lr)]
    groups = [{"params": list(network.parameters()), "lr": lr} for network, lr in networks]
    return torch.optim.Adam(groups, fused=True)


def train(args: Args) -> dict:
    """Trains, evaluates greedily, and returns what results.json holds."""
    run = Run(args, __file__)
    check_flags(args)
    update_fn = compiled(update, run.device) if args.compile else update
    envs = make_envs(args, images=False)
    agent = make_agent(envs, args).to(run.device)
    optimizer = make_optimizer(agent, args)
    buffer = RingBuffer(args.buffer_size, run.device)

    with run.open(agent=agent, envs=envs, optimizer=optimizer, buffer=buffer):
        obs, _ = envs.reset(seed=run.env_seed())
        valid = np.ones(args.num_envs, bool)
        while run.env_steps < args.total_timesteps:
            if run.checkpoint_due():
                run.save()
                obs, _ = envs.reset(seed=run.env_seed())  # simulators cannot be saved: all start anew
                valid[:] = True

            # Act with the latest policy
            with torch.no_grad():
                policy = agent.actor(torch.as_tensor(obs, device=run.device))
                actions = policy.sample()
                old_log_probs = policy.log_prob(actions).cpu().numpy()
            actions = actions.cpu().numpy()
            next_obs, rewards, terminated, truncated, episodes = envs.step(actions)

            # Store
            transition = {"obs": obs, "actions": actions, "rewards": rewards, "next_obs": next_obs}
            buffer.add(valid, **transition, terminated=terminated, old_log_probs=old_log_probs)
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
