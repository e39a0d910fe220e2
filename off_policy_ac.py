"""Off-policy actor-critic with a replay buffer: decisions D8-D15 of the lecture in one file.

Against a2c_sync.py: transitions go into a ring buffer (D8) and every update learns from a random batch of it, most of
which older policies made. So the critic becomes Q, whose target takes a fresh action of the current policy (D10), and
the policy gradient takes fresh actions, too (D11). Three actions, three names: `batch.actions` a from the buffer,
`next_actions` a' ~ π(·|s'), `pi_actions` a^π ~ π(·|s).

    (1)  y = r + γ (1 − terminated) Q̄(s', a')                  a' ~ π_θ(·|s')
    (2)  L_critic = ½ mean (Q_φ(s, a) − y)²
    (3)  b_k = 1/(K − 1) Σ_{j≠k} Q_φ(s, a^π_j)                  a^π_1 ... a^π_K ~ π_θ(·|s)
    (4)  w = min(π_θ(a|s) / π_old(a|s), w_max)
    (5)  L_actor  = −mean_{s,k} log π_θ(a^π_k|s) (Q_φ(s, a^π_k) − b_k) − β mean H(π_θ(·|s))
    (6)  φ̄ ← τ φ + (1 − τ) φ̄

γ --gamma, K --num-action-samples, β --ent-coef, τ --tau, Q̄ an averaged copy of Q, of parameters φ̄ and φ, w_max = 10.
The lecture's mistakes and alternatives, a flag each: --critic v fits V to the actions of older policies (D9a);
--actor-actions buffer takes those for the policy's own (D9b); --actor-actions importance weighs them by (4) instead (D12);
--baseline none is plain Q, b = 0 (D13).

Beyond the lecture it needs, with the greedy return without each (mean of seeds 1-3; with all: 500 and -141):

                                                  CartPole-v1    Pendulum-v1
    the baseline (3); without it still K = 8              393          -1186
    the entropy bonus in (5)                              396           -139
    the target network (6), --tau                         435           -141
    256 units a layer; 64 instead                         392           -139

    python off_policy_ac.py                                 CartPole-v1: greedy return 500 in 3 to 5 minutes
    python off_policy_ac.py --env-id Pendulum-v1 --total-timesteps 15000

The step after an episode's end only resets the environment (gymnasium's NEXT_STEP): it is not a transition, and
`valid` keeps it out of the buffer and the counts. In return every next_obs is the true successor of obs.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.envs import make_envs
from common.errors import UserError
from common.optim import Adam
from common.ring_buffer import RingBuffer
from common.run import Run, RunArgs, run_cli

# --- Config -----------------------------------------------------------------------------------------------------------


@dataclass
class Args(RunArgs):
    total_timesteps: int = 30_000
    """environment steps (transitions of all environments together) to train for"""
    num_envs: int = 1
    """environments that step in parallel"""
    gamma: float = 0.99
    """discount γ"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds"""
    learning_starts: int = 1_000
    """transitions before the first update"""
    batch_size: int = 128
    """transitions of the buffer in one update"""
    updates_per_step: float = 1.0
    """updates for every transition, of however many environments"""
    critic: Literal["q", "v"] = "q"
    """q: Q(s, a), valid for any policy's actions (D10); v: V(s), naive (D9a)"""
    actor_actions: Literal["policy", "buffer", "importance"] = "policy"
    """whose actions the policy gradient takes: the policy's (D11), the buffer's, naive (D9b), or those weighted (D12)"""
    num_action_samples: int = 8
    """K, actions the policy samples at every state of the batch (D14)"""
    baseline: Literal["samples", "none"] = "samples"
    """what is subtracted from Q(s, a): the mean Q of the other samples, or nothing (D13)"""
    ent_coef: float = 0.05
    """β, weight of the entropy bonus"""
    tau: float = 0.02
    """τ, share of the critic that its averaged copy takes over in an update; 1: no target network"""
    actor_lr: float = 1e-3
    """learning rate of the actor"""
    critic_lr: float = 1e-3
    """learning rate of the critic"""
    lr_decay: bool = True
    """let the learning rates fall linearly to 0 at --total-timesteps"""


def check(args: Args):
    """Raises UserError for flags that contradict each other."""
    if args.critic == "v" and args.actor_actions == "policy":
        raise UserError(
            "--critic v cannot score an action that was not taken, so it needs the buffer's: "
            "--actor-actions buffer, or importance."
        )
    if args.actor_actions == "policy" and args.baseline == "samples" and args.num_action_samples < 2:
        raise UserError("--baseline samples compares an action with others: it needs --num-action-samples 2 or more.")
    if args.buffer_size < args.num_envs:
        raise UserError("--buffer-size must be at least --num-envs.")
    if args.learning_starts >= args.total_timesteps:
        raise UserError("--learning-starts must be below --total-timesteps: nothing would be learned.")


# --- Networks ---------------------------------------------------------------------------------------------------------


def layer(module: nn.Module, gain: float = 2**0.5) -> nn.Module:
    nn.init.orthogonal_(module.weight, gain)
    nn.init.zeros_(module.bias)
    return module


class MLP(nn.Sequential):
    """(..., D) -> (..., 256)"""

    num_features = 256

    def __init__(self, num_inputs: int):
        super().__init__(layer(nn.Linear(num_inputs, 256)), nn.ReLU(), layer(nn.Linear(256, 256)), nn.ReLU())


class NatureCNN(nn.Module):
    """(..., C, H, W) uint8 -> (..., 512), the network of Mnih et al. 2015."""

    num_features = 512

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        conv = nn.Sequential(
            layer(nn.Conv2d(shape[0], 32, 8, stride=4)), nn.ReLU(),
            layer(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
            layer(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        num_inputs = conv(torch.zeros(1, *shape)).shape[1]
        self.net = nn.Sequential(conv, layer(nn.Linear(num_inputs, self.num_features)), nn.ReLU())
        self.to(memory_format=torch.channels_last)  # in memory only: a third less time on CPU

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        images = obs.reshape(-1, *obs.shape[-3:]).contiguous(memory_format=torch.channels_last) / 255.0
        return self.net(images).view(*obs.shape[:-3], self.num_features)


def make_encoder(space: gym.spaces.Box) -> tuple[nn.Module, int]:
    """What turns observations into vectors, and their length."""
    if len(space.shape) == 3:
        return NatureCNN(space.shape), NatureCNN.num_features
    return nn.Identity(), space.shape[0]


class Categorical:
    """π over n actions, from logits (..., n). Samples 6 times as fast as torch.distributions; NaN goes on to the loss."""

    def __init__(self, logits: torch.Tensor):
        self.log_probs = logits.log_softmax(-1)

    def sample(self, *num: int) -> torch.Tensor:
        gumbel = -self.log_probs.new_empty(*num, *self.log_probs.shape).exponential_().log()
        return (self.log_probs + gumbel).argmax(-1)

    def mode(self) -> torch.Tensor:
        return self.log_probs.argmax(-1)

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        return self.log_probs.expand(*actions.shape, -1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> torch.Tensor:
        return -(self.log_probs.exp() * self.log_probs).sum(-1)


class Gaussian:
    """π over actions (..., A): independent Gaussians; mean (..., A) from the network, log σ (A,) the same everywhere."""

    def __init__(self, mean: torch.Tensor, log_std: torch.Tensor):
        self.mean, self.log_std = mean, log_std

    def sample(self, *num: int) -> torch.Tensor:
        return self.mean + self.log_std.exp() * torch.randn(*num, *self.mean.shape, device=self.mean.device)

    def mode(self) -> torch.Tensor:
        return self.mean

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        z = (actions - self.mean) / self.log_std.exp()
        return -(0.5 * z**2 + self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> torch.Tensor:
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(self.mean.shape[:-1])


class Actor(nn.Module):
    """(..., obs) -> π_θ(·|s)"""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.Space):
        super().__init__()
        discrete = isinstance(action_space, gym.spaces.Discrete)
        num_outputs = int(action_space.n) if discrete else action_space.shape[0]
        self.encoder, num_features = make_encoder(observation_space)
        self.body = MLP(num_features)
        self.head = layer(nn.Linear(MLP.num_features, num_outputs), gain=0.01)  # at first nearly the same everywhere
        self.log_std = None if discrete else nn.Parameter(torch.zeros(num_outputs))

    def forward(self, obs: torch.Tensor) -> Categorical | Gaussian:
        outputs = self.head(self.body(self.encoder(obs)))
        if self.log_std is None:
            return Categorical(outputs)
        return Gaussian(outputs.tanh(), self.log_std)  # beyond the bounds all actions are one: nothing to learn from

    def bound_std(self):
        """σ ≤ e after an update; no reward would keep an entropy bonus from raising it for ever."""
        if self.log_std is not None:
            self.log_std.data.clamp_(max=1.0)


class Critic(nn.Module):
    """Q_φ: (B, ...) observations, (..., B) or (..., B, A) actions -> (..., B). As V_φ it takes actions and ignores them."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.Space, sees_actions: bool):
        super().__init__()
        self.encoder, num_features = make_encoder(observation_space)
        self.num_choices = int(action_space.n) if isinstance(action_space, gym.spaces.Discrete) else None
        self.num_inputs = (self.num_choices or action_space.shape[0]) if sees_actions else 0
        self.body = MLP(num_features + self.num_inputs)
        self.head = layer(nn.Linear(MLP.num_features, 1), gain=1.0)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        if self.num_choices and actions.dim() == 2 and len(actions) > self.num_choices:  # K samples of fewer choices:
            choices = torch.arange(self.num_choices, device=obs.device).view(-1, 1).expand(-1, len(obs))
            return self(obs, choices).gather(0, actions)  # one Q each
        # What the environment sees of an action: one of its choices, or a vector clipped to the bounds
        actions = F.one_hot(actions, self.num_choices).float() if self.num_choices else actions.clamp(-1, 1)
        features = self.encoder(obs).expand(*actions.shape[:-1], -1)  # K actions share the features of their state
        features = torch.cat([features, actions[..., : self.num_inputs]], -1)
        return self.head(self.body(features)).squeeze(-1)  # (B,) like the rewards; (B, 1) would broadcast


class ActorCritic(nn.Module):
    """Two networks that share nothing (D1), and the averaged copy of the critic that targets are made of (D17)."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.Space, args: Args):
        super().__init__()
        self.actor = Actor(observation_space, action_space)
        self.critic = Critic(observation_space, action_space, sees_actions=args.critic == "q")
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    def act(self, obs: torch.Tensor, greedy: bool = False) -> torch.Tensor:
        """obs (N, ...) -> actions (N,) or (N, A), sampled or the most likely ones."""
        policy = self.actor(obs)
        return policy.mode() if greedy else policy.sample()


# --- Equations --------------------------------------------------------------------------------------------------------


def td_target(rewards, terminated, next_value, gamma):
    """Regression target of the critic; a time limit is no end, so only `terminated` cuts the bootstrap. All (B,)."""
    return rewards + gamma * (1 - terminated) * next_value  # (1)


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
def polyak_update(target: nn.Module, source: nn.Module, tau: float):
    """The target network follows slowly, so that the critic does not chase itself (D17)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)  # (6)


# --- Train ------------------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """Trains, evaluates greedily, and returns what results.json holds."""
    run = Run(args, __file__)
    args, device = run.args, run.device
    check(args)
    envs = make_envs(args)
    space, action_space = envs.single_observation_space, envs.single_action_space
    agent = ActorCritic(space, action_space, args).to(device)
    actor, critic, target_critic = agent.actor, agent.critic, agent.target_critic
    groups = [
        {"params": list(actor.parameters()), "lr": args.actor_lr},
        {"params": list(critic.parameters()), "lr": args.critic_lr},
    ]
    learning_rates = [group["lr"] for group in groups]
    optimizer = Adam(groups)

    buffer = RingBuffer(
        args.buffer_size,
        {
            "obs": (space.shape, space.dtype),  # float32, or uint8 images
            "actions": (action_space.shape, action_space.dtype),
            "old_log_probs": ((), np.float32),
            "rewards": ((), np.float32),
            "next_obs": (space.shape, space.dtype),
            "terminated": ((), np.float32),
        },
        device,
    )

    def learn(batch):
        """One update from a batch of the buffer; what it returns is logged."""
        # Targets
        with torch.no_grad():
            next_actions = actor(batch.next_obs).sample()  # (B,): what the policy would do now (D10)
            next_value = target_critic(batch.next_obs, next_actions)  # --critic v: of whoever acted (D9a)
            q_target = td_target(batch.rewards, batch.terminated, next_value, args.gamma)

        # Critic
        q = critic(batch.obs, batch.actions)  # valid for any action, whoever chose it
        critic_loss = critic_loss_fn(q, q_target)

        # Actor
        policy = actor(batch.obs)
        with torch.no_grad():
            pi_actions = policy.sample(args.num_action_samples)  # (K, B): fresh (D11), without the simulator
            pi_q = critic(batch.obs, pi_actions)
        if args.actor_actions == "policy":
            log_probs = policy.log_prob(pi_actions)
            scores, baseline = pi_q, leave_one_out(pi_q)
        else:
            log_probs = policy.log_prob(batch.actions)  # (B,): of an action that another policy chose (D9b)
            scores = q.detach() if args.critic == "q" else q_target
            baseline = pi_q.mean(0)  # an estimate of V(s); with --critic v it is V(s)
        advantages = scores - baseline if args.baseline == "samples" else scores
        if args.actor_actions == "importance":
            advantages = advantages * importance_weights(log_probs, batch.old_log_probs)
        entropy = policy.entropy()  # (B,)
        actor_loss = actor_loss_fn(log_probs, advantages, entropy, args.ent_coef)

        optimizer.zero_grad()
        (critic_loss + actor_loss).backward()
        optimizer.step()
        actor.bound_std()
        polyak_update(target_critic, critic, args.tau)
        return {"critic_loss": critic_loss, "actor_loss": actor_loss, "value": q.mean(), "entropy": entropy.mean()}

    with run.open(agent=agent, envs=envs, optimizer=optimizer, buffer=buffer):
        env_steps, updates = run.env_steps, run.updates
        log_every = max(1, int(500 * args.updates_per_step))  # updates; losses at least every 1000 environment steps
        while env_steps < args.total_timesteps:
            if run.checkpoint(env_steps, updates):  # at the start too: simulators cannot be saved, so all begin anew
                obs, _ = envs.reset(seed=run.env_seed(env_steps))
                valid = np.ones(args.num_envs, bool)

            remaining = 1 - env_steps / args.total_timesteps if args.lr_decay else 1.0
            for group, learning_rate in zip(optimizer.param_groups, learning_rates):
                group["lr"] = learning_rate * remaining

            # Act with the latest policy
            with torch.no_grad():
                policy = actor(torch.as_tensor(obs, device=device))
                actions = policy.sample()
                old_log_probs = policy.log_prob(actions)
            actions, old_log_probs = actions.cpu().numpy(), old_log_probs.cpu().numpy()
            run.require_finite(env_steps, action=actions.sum())
            next_obs, rewards, terminated, truncated, infos = envs.step(actions)

            # Store
            run.require_finite(env_steps, reward=rewards.sum(), observation=next_obs.sum())  # before they are saved
            buffer.add(
                valid, obs=obs, actions=actions, old_log_probs=old_log_probs,
                rewards=rewards, next_obs=next_obs, terminated=terminated,
            )  # fmt: skip
            new_steps = int(valid.sum())
            env_steps += new_steps
            obs, valid = next_obs, ~(terminated | truncated)  # the step after an end only resets
            run.logger.episodes(env_steps, infos)
            if env_steps <= args.learning_starts:
                continue

            # Learn: so many updates for each transition, not for each step of all environments
            due = int(env_steps * args.updates_per_step) - int((env_steps - new_steps) * args.updates_per_step)
            for _ in range(due):
                losses = learn(buffer.sample(args.batch_size))
                if updates % log_every == 0:
                    run.require_finite(env_steps, critic_loss=losses["critic_loss"], actor_loss=losses["actor_loss"])
                    run.logger.log(env_steps, **losses)
                updates += 1
        return run.finish(env_steps, updates)


if __name__ == "__main__":
    run_cli(train, Args)
