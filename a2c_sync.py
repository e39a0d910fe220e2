"""Synchronous advantage actor-critic (A2C): decisions D1-D5 of the lecture in one file.

N environments take T steps with the same parameters; their T x N transitions form one batch (D5). With
`--num-envs 1 --num-steps 1` it is the fully online algorithm (D3). Learned in the lecture's order (D4): targets,
critic, actor; by two separate networks (D1) or two heads of a shared trunk (D2).

    (1)  δ_t = r_t + γ (1 − terminated_t) V(s_{t+1}) − V(s_t)
    (2)  Â_t = δ_t + γλ (1 − done_t) Â_{t+1}                    done = terminated | truncated
    (3)  R_t = Â_t + V(s_t)
    (4)  L_critic = ½ mean (V_φ(s_t) − R_t)²
    (5)  L_actor  = −mean log π_θ(a_t|s_t) Â_t − β mean H(π_θ(·|s_t))
    (6)  L = L_actor + c L_critic

γ --gamma, λ --gae-lambda (1: n-step returns), β --ent-coef, c --value-coef. (1)-(3): arXiv 1506.02438 eq. 11-16.

    python a2c_sync.py                                          CartPole-v1: greedy return 500 in half a minute
    python a2c_sync.py --env-id Acrobot-v1 --total-timesteps 200000       greedy return -84

The step after an episode's end only resets the environment (gymnasium's NEXT_STEP): it is not a transition, and
`valid` keeps it out of losses and counts. In return every obs[t + 1] is the true successor of obs[t].
"""

import math
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn

from common.envs import make_envs
from common.errors import UserError
from common.optim import Adam, RMSpropA3C, clip_grad_norm_
from common.run import Run, RunArgs, run_cli

# --- Config -----------------------------------------------------------------------------------------------------------


@dataclass
class Args(RunArgs):
    num_envs: int = 16
    """N, environments that step in parallel"""
    num_steps: int = 8
    """T, steps of every environment between two updates"""
    network: Literal["separate", "shared"] = "separate"
    """two networks (D1), or one trunk with two heads (D2)"""
    gamma: float = 0.99
    """discount γ"""
    gae_lambda: float = 0.95
    """λ of the advantage; 1 gives n-step returns, 0 the one-step δ"""
    ent_coef: float = 0.01
    """β, weight of the entropy bonus"""
    value_coef: float = 0.5
    """c, weight of the critic's loss; for networks that share a trunk, others have --critic-lr"""
    actor_lr: float = 1e-2
    """learning rate of the actor; with --network shared of everything"""
    critic_lr: float | None = None
    """learning rate of the critic; by default that of the actor"""
    lr_decay: bool = True
    """let the learning rates fall linearly to 0 at --total-timesteps"""
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """rmsprop: with ε inside the root, as in the published A3C and A2C results"""
    max_grad_norm: float = math.inf
    """gradients of a network are scaled down to this norm; 0.5 is usual, but makes V forget what is rare (docs)"""
    normalize_obs: bool = False
    """scale each element of a vector observation by its running mean and variance"""


def check(args: Args):
    """Raises UserError for flags that contradict each other."""
    if args.network == "shared" and args.critic_lr is not None:
        raise UserError(
            "--critic-lr needs a critic of its own; with --network shared, use --actor-lr and --value-coef."
        )


# --- Networks ---------------------------------------------------------------------------------------------------------


def layer(module: nn.Module, gain: float = 2**0.5) -> nn.Module:
    nn.init.orthogonal_(module.weight, gain)
    nn.init.zeros_(module.bias)
    return module


class MLP(nn.Sequential):
    """(..., D) -> (..., 64)"""

    num_features = 64

    def __init__(self, num_inputs: int):
        super().__init__(layer(nn.Linear(num_inputs, 64)), nn.Tanh(), layer(nn.Linear(64, 64)), nn.Tanh())


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


def make_body(space: gym.spaces.Box) -> nn.Module:
    return NatureCNN(space.shape) if len(space.shape) == 3 else MLP(space.shape[0])


class Categorical:
    """π over n actions, from logits (..., n). Samples 6 times as fast as torch.distributions; NaN goes on to the loss."""

    def __init__(self, logits: torch.Tensor):
        self.log_probs = logits.log_softmax(-1)

    def sample(self) -> torch.Tensor:
        gumbel = -torch.empty_like(self.log_probs).exponential_().log()
        return (self.log_probs + gumbel).argmax(-1)

    def mode(self) -> torch.Tensor:
        return self.log_probs.argmax(-1)

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        return self.log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> torch.Tensor:
        return -(self.log_probs.exp() * self.log_probs).sum(-1)


class Gaussian:
    """π over actions (..., A): independent Gaussians; mean (..., A) from the network, log σ (A,) the same everywhere."""

    def __init__(self, mean: torch.Tensor, log_std: torch.Tensor):
        self.mean, self.log_std = mean, log_std

    def sample(self) -> torch.Tensor:
        return self.mean + self.log_std.exp() * torch.randn_like(self.mean)

    def mode(self) -> torch.Tensor:
        return self.mean

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        z = (actions - self.mean) / self.log_std.exp()
        return -(0.5 * z**2 + self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> torch.Tensor:
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(self.mean.shape[:-1])


class Actor(nn.Module):
    """(..., features) -> π_θ(·|s)"""

    def __init__(self, body: nn.Module, num_features: int, action_space: gym.Space):
        super().__init__()
        discrete = isinstance(action_space, gym.spaces.Discrete)
        num_outputs = int(action_space.n) if discrete else action_space.shape[0]
        self.body = body
        self.head = layer(nn.Linear(num_features, num_outputs), gain=0.01)  # at first nearly the same everywhere
        self.log_std = None if discrete else nn.Parameter(torch.zeros(num_outputs))

    def forward(self, features: torch.Tensor) -> Categorical | Gaussian:
        outputs = self.head(self.body(features))
        if self.log_std is None:
            return Categorical(outputs)
        return Gaussian(outputs.tanh(), self.log_std)  # beyond the bounds all actions are one: nothing to learn from

    def bound_std(self):
        """σ ≤ e after an update; no reward would keep an entropy bonus from raising it for ever."""
        if self.log_std is not None:
            self.log_std.data.clamp_(max=1.0)


class Critic(nn.Module):
    """V_φ: (..., features) -> (...)"""

    def __init__(self, body: nn.Module, num_features: int):
        super().__init__()
        self.body = body
        self.head = layer(nn.Linear(num_features, 1), gain=1.0)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(features)).squeeze(-1)  # (T, N) like the rewards; (T, N, 1) would broadcast


class ActorCritic(nn.Module):
    """separate (D1): the trunk is the identity, actor and critic share nothing. shared (D2): two heads of one trunk."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.Space, args: Args):
        super().__init__()
        shared = args.network == "shared"
        self.trunk = make_body(observation_space) if shared else nn.Identity()
        actor_body = nn.Identity() if shared else make_body(observation_space)
        critic_body = nn.Identity() if shared else make_body(observation_space)
        num_features = (self.trunk if shared else actor_body).num_features
        self.actor = Actor(actor_body, num_features, action_space)
        self.critic = Critic(critic_body, num_features)

    def act(self, obs: torch.Tensor, greedy: bool = False) -> torch.Tensor:
        """obs (N, ...) -> actions (N,) or (N, A), sampled or the most likely ones."""
        policy = self.actor(self.trunk(obs))
        return policy.mode() if greedy else policy.sample()


# --- Equations --------------------------------------------------------------------------------------------------------


def gae(values, rewards, terminated, done, gamma, gae_lambda):
    """Â and R, generalized advantage estimation (arXiv 1506.02438 eq. 11, 16); values (T + 1, N), the rest (T, N)."""
    deltas = rewards + gamma * (1 - terminated) * values[1:] - values[:-1]  # (1)
    decays = gamma * gae_lambda * (1 - done)
    advantage, advantages = torch.zeros_like(rewards[0]), []
    for delta, decay in zip(reversed(deltas.unbind()), reversed(decays.unbind())):
        advantage = delta + decay * advantage  # (2)
        advantages.append(advantage)
    advantages = torch.stack(advantages[::-1])
    return advantages, advantages + values[:-1]  # (3)


def masked_mean(x, valid):
    """Mean over the transitions; x and valid (T, N)."""
    assert x.shape == valid.shape
    return (x * valid).sum() / valid.sum()


def critic_loss_fn(values, returns, valid):
    """Regression on the λ-returns; values carry the gradient, returns are constants. All (T, N)."""
    return 0.5 * masked_mean((values - returns) ** 2, valid)  # (4)


def actor_loss_fn(log_probs, advantages, entropy, ent_coef, valid):
    """Policy gradient with entropy bonus, arXiv 1602.01783 section 4; advantages are constants. All (T, N)."""
    return -masked_mean(log_probs * advantages, valid) - ent_coef * masked_mean(entropy, valid)  # (5)


def trunk_gradients(actor_loss, critic_loss, trunk):
    """How the two losses pull at the shared trunk (D2): the norm of either gradient, and the cosine between them."""
    grads = [
        torch.autograd.grad(loss, list(trunk.parameters()), retain_graph=True) for loss in (actor_loss, critic_loss)
    ]
    actor_grad, critic_grad = (torch.cat([g.flatten() for g in grad]) for grad in grads)
    return {
        "trunk_actor_grad": actor_grad.norm(),
        "trunk_critic_grad": critic_grad.norm(),
        "trunk_grad_cosine": torch.cosine_similarity(actor_grad, critic_grad, dim=0),
    }


def gradient_step(optimizer, loss, max_grad_norm):
    optimizer.zero_grad()
    loss.backward()
    if max_grad_norm < math.inf:
        for group in optimizer.param_groups:
            clip_grad_norm_(group["params"], max_grad_norm)
    optimizer.step()


# --- Train ------------------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """Trains, evaluates greedily, and returns what results.json holds."""
    run = Run(args, __file__)
    args, device = run.args, run.device
    check(args)
    envs = make_envs(args)
    agent = ActorCritic(envs.single_observation_space, envs.single_action_space, args).to(device)
    actor, critic, trunk = agent.actor, agent.critic, agent.trunk

    # Separate networks: a group each, so that neither learning rates nor clipping tie them together
    if args.network == "shared":
        groups = [{"params": list(agent.parameters()), "lr": args.actor_lr}]
    else:
        groups = [
            {"params": list(actor.parameters()), "lr": args.actor_lr},
            {"params": list(critic.parameters()), "lr": args.critic_lr or args.actor_lr},
        ]
    learning_rates = [group["lr"] for group in groups]
    optimizer = RMSpropA3C(groups) if args.optimizer == "rmsprop" else Adam(groups)

    # One rollout: T steps of N environments. obs and done have a row more, for what the last step led to
    T, N = args.num_steps, args.num_envs
    space = envs.single_observation_space
    obs = torch.from_numpy(np.zeros((T + 1, N) + space.shape, space.dtype)).to(device)  # float32, or uint8 images
    actions = [torch.empty(0)] * T  # (N,) or (N, A) each
    rewards, terminated = np.zeros((T, N), np.float32), np.zeros((T, N), np.float32)
    done = np.zeros((T + 1, N), np.float32)  # done[t]: s_t ended its episode, step t only resets

    with run.open(agent=agent, envs=envs, optimizer=optimizer):
        env_steps, updates = run.env_steps, run.updates
        log_every = max(1, 1000 // (T * N))  # updates; losses at least every 1000 environment steps
        while env_steps < args.total_timesteps:
            if run.checkpoint(env_steps, updates):  # at the start too: simulators cannot be saved, so all begin anew
                obs[T] = torch.as_tensor(envs.reset(seed=run.env_seed(env_steps))[0])
                done[T] = 0

            remaining = 1 - env_steps / args.total_timesteps if args.lr_decay else 1.0
            for group, learning_rate in zip(optimizer.param_groups, learning_rates):
                group["lr"] = learning_rate * remaining

            # Act: all environments with the same parameters (D5)
            obs[0], done[0] = obs[T], done[T]
            for t in range(T):
                with torch.no_grad():
                    actions[t] = agent.act(obs[t])
                next_obs, rewards[t], terminated[t], truncated, infos = envs.step(actions[t].cpu().numpy())
                obs[t + 1] = torch.as_tensor(next_obs)
                done[t + 1] = np.maximum(terminated[t], truncated)
                env_steps += N - int(done[t].sum())
                run.logger.episodes(env_steps, infos)
            if done[:-1].all():
                continue  # T = N = 1 and the step was a reset: there is nothing to average over
            rollout = [torch.as_tensor(x, device=device) for x in (rewards, terminated, done[1:])]  # (T, N) each
            valid = torch.as_tensor(1 - done[:-1], device=device)
            log_now = updates % log_every == 0
            updates += 1

            # Targets
            features = trunk(obs)  # (T + 1, N, ...); with separate networks obs itself
            values = critic(features)  # (T + 1, N): one pass gives every V(s) and every V(s')
            advantages, returns = gae(values.detach(), *rollout, args.gamma, args.gae_lambda)

            # Critic; a step of its own before the advantage is evaluated (D4 to the letter) measured no better: docs
            critic_loss = critic_loss_fn(values[:-1], returns, valid)

            # Actor
            policy = actor(features[:-1])
            entropy = policy.entropy()  # (T, N)
            log_probs = policy.log_prob(torch.stack(actions))
            actor_loss = actor_loss_fn(log_probs, advantages, entropy, args.ent_coef, valid)

            loss = actor_loss + args.value_coef * critic_loss  # (6)
            conflict = {}
            if log_now and args.network == "shared":
                conflict = trunk_gradients(actor_loss, args.value_coef * critic_loss, trunk)
            gradient_step(optimizer, loss, args.max_grad_norm)
            actor.bound_std()

            # Log
            run.require_finite(env_steps, critic_loss=critic_loss, actor_loss=actor_loss)
            if log_now:
                run.logger.log(
                    env_steps,
                    actor_loss=actor_loss,
                    critic_loss=critic_loss,
                    value=masked_mean(values[:-1], valid),
                    entropy=masked_mean(entropy, valid),
                    **conflict,
                )
        return run.finish(env_steps, updates)


if __name__ == "__main__":
    run_cli(train, Args)
