"""Soft actor-critic (SAC): decisions D16-D18 of the lecture in one file.

Against off_policy_ac.py: the policy gradient goes through the action into Q (reparameterization, D16), the reward
includes the policy's entropy, weighed by a temperature α that is learned, and Q is the least of several critics (D17).
Actions are a Gaussian's squashed into [-1, 1] by tanh; the environment's own bounds are applied behind it.

    (1)  a = tanh u,  u = μ_θ(s) + σ_θ(s) ε,  ε ~ N(0, 1)
    (2)  log π(a|s) = Σ_dim log N(u; μ, σ) − 2 (log 2 − u − softplus(−2u))
    (3)  y = r + γ (1 − terminated) (min_i Q̄_i(s', a') − α log π(a'|s'))      a' ~ π_θ(·|s')
    (4)  L_critic = Σ_i ½ mean (Q_i(s, a) − y)²
    (5)  L_actor = mean [α log π(a^π|s) − min_i Q_i(s, a^π)]                  a^π ~ π_θ(·|s)
    (6)  L_alpha = −log α mean (log π(a^π|s) − dim A)
    (7)  φ̄ ← τ φ + (1 − τ) φ̄

γ --gamma, τ --tau, α --alpha, Q_i one of the --num-critics, Q̄_i its averaged copy, of parameters φ and φ̄.
arXiv 1812.05905: (2) eq. 26, (3) eq. 2-5, (5) eq. 9, (6) eq. 18.
`--estimator score` replaces the gradient of (5) by the score function's, as in off_policy_ac.py, all else equal.

    python sac.py                                     Pendulum-v1: greedy return -142 after 10,000 of its steps
    python sac.py --env-id HalfCheetah-v5 --total-timesteps 100000 --learning-starts 10000 --critic-lr 3e-4     return 5100

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
from common.run import Run, RunArgs, require_compiler, run_cli

# --- Config -----------------------------------------------------------------------------------------------------------


@dataclass
class Args(RunArgs):
    env_id: str = "Pendulum-v1"
    """environment with bounded continuous actions; `package:Name-v0` imports the package first"""
    total_timesteps: int = 20_000
    """environment steps (transitions of all environments together) to train for"""
    num_envs: int = 1
    """environments that step in parallel"""
    num_threads: int = 2
    """CPU threads of torch"""
    gamma: float = 0.99
    """discount γ"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds"""
    learning_starts: int = 1_000
    """transitions, of uniformly random actions, before the first update"""
    batch_size: int = 256
    """transitions of the buffer in one update"""
    updates_per_step: float = 1.0
    """updates for every transition, of however many environments"""
    num_critics: int = 2
    """critics, of whose estimates the least counts"""
    layer_norm: bool = False
    """normalize the critics' hidden layers"""
    estimator: Literal["reparam", "score"] = "reparam"
    """gradient of the actor: through the action into Q (D16), or the score function's with leave-one-out baseline"""
    num_action_samples: int = 1
    """K, actions the policy samples at every state of the batch; --estimator score needs 2 or more (D14)"""
    alpha: Literal["auto"] | float = "auto"
    """α, weight of the entropy: tuned to an entropy of −dim A, or a fixed number"""
    tau: float = 0.005
    """τ, share of the critics that their averaged copy takes over in an update"""
    actor_lr: float = 3e-4
    """learning rate of the actor and of the temperature"""
    critic_lr: float = 1e-3
    """learning rate of the critics"""
    compile: bool = False
    """torch.compile the update; on a GPU with CUDA graphs"""


def check(args: Args):
    """Raises UserError for flags that contradict each other."""
    if args.alpha != "auto" and not (isinstance(args.alpha, (int, float)) and 0 < args.alpha < math.inf):
        raise UserError(f"--alpha must be auto or lie in (0, inf), got {args.alpha!r}.")
    if args.estimator == "score" and args.num_action_samples < 2:
        raise UserError("--estimator score compares an action with others: it needs --num-action-samples 2 or more.")
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


class SquashedGaussian:
    """π over actions tanh u (..., A), u from independent Gaussians; mean and log σ (..., A) from the network."""

    def __init__(self, mean: torch.Tensor, log_std: torch.Tensor):
        self.mean, self.log_std = mean, log_std

    def sample(self, *num: int) -> torch.Tensor:
        """u, differentiable in mean and σ; the action is tanh u."""
        return self.mean + self.log_std.exp() * torch.randn(*num, *self.mean.shape, device=self.mean.device)  # (1)

    def mode(self) -> torch.Tensor:
        return self.mean

    def log_prob(self, u: torch.Tensor) -> torch.Tensor:
        """log density of the action tanh u; exact where log(1 − tanh² u) has lost all digits."""
        z = (u - self.mean) / self.log_std.exp()
        log_normal = -(0.5 * z**2 + self.log_std + 0.5 * math.log(2 * math.pi))
        return (log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)  # (2)


class Actor(nn.Module):
    """(..., obs) -> π_θ(·|s)"""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box):
        super().__init__()
        self.encoder, num_features = make_encoder(observation_space)
        self.body = MLP(num_features)
        self.head = layer(nn.Linear(MLP.num_features, 2 * action_space.shape[0]), gain=0.01)

    def forward(self, obs: torch.Tensor) -> SquashedGaussian:
        mean, log_std = self.head(self.body(self.encoder(obs))).chunk(2, -1)
        return SquashedGaussian(mean, log_std.clamp(-20, 2))


class Linears(nn.Module):
    """M linear layers as one batched product: (M, B, in) -> (M, B, out)"""

    def __init__(self, num: int, num_inputs: int, num_outputs: int, gain: float = 2**0.5):
        super().__init__()
        layers = [layer(nn.Linear(num_inputs, num_outputs), gain) for _ in range(num)]
        self.weight = nn.Parameter(torch.stack([each.weight.T for each in layers]).detach())
        self.bias = nn.Parameter(torch.zeros(num, 1, num_outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Critics(nn.Module):
    """Q_1 ... Q_M: (B, ...) observations, (..., B, A) actions -> (M, ..., B)"""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, args: Args):
        super().__init__()
        self.encoder, num_features = make_encoder(observation_space)
        self.num = args.num_critics

        def hidden(num_inputs):
            norm = [nn.LayerNorm(256, elementwise_affine=False)] if args.layer_norm else []
            return [Linears(self.num, num_inputs, 256), *norm, nn.ReLU()]

        self.net = nn.Sequential(
            *hidden(num_features + action_space.shape[0]), *hidden(256), Linears(self.num, 256, 1, gain=1.0)
        )

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        features = self.encoder(obs).expand(*actions.shape[:-1], -1)  # K actions share the features of their state
        inputs = torch.cat([features, actions], -1).flatten(0, -2).expand(self.num, -1, -1)
        return self.net(inputs).view(self.num, *actions.shape[:-1])  # like the rewards; (..., B, 1) would broadcast


class ActorCritic(nn.Module):
    """Networks that share nothing (D1), the averaged copy of the critics that targets are made of (D17), and log α."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, args: Args):
        super().__init__()
        self.actor = Actor(observation_space, action_space)
        self.critics = Critics(observation_space, action_space, args)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        alpha = 1.0 if args.alpha == "auto" else args.alpha
        self.log_alpha = nn.Parameter(torch.tensor(float(alpha)).log())

    def act(self, obs: torch.Tensor, greedy: bool = False) -> torch.Tensor:
        """obs (N, ...) -> actions (N, A), sampled or the most likely ones before they are squashed."""
        policy = self.actor(obs)
        return (policy.mode() if greedy else policy.sample()).tanh()


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
    return (q.sum(0) - q) / (len(q) - 1)


def score_loss_fn(log_probs, q, alpha):
    """The same gradient in expectation, by the score function; q is a constant. (K, B) and (M, K, B)."""
    scores = q.amin(0) - alpha * log_probs.detach()
    return -(log_probs * (scores - leave_one_out(scores))).mean()


def alpha_loss_fn(log_alpha, log_probs, num_dims):
    """Raises α where the policy's entropy is below the target −dim A, lowers it above. log_probs are constants."""
    return -log_alpha * (log_probs.detach() - num_dims).mean()  # (6)


@torch.no_grad()
def polyak_update(target: nn.Module, source: nn.Module, tau: float):
    """The target network follows slowly, so that the critic does not chase itself (D17)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)  # (7)


# --- Train ------------------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """Trains, evaluates greedily, and returns what results.json holds."""
    run = Run(args, __file__)
    args, device = run.args, run.device
    check(args)
    if args.compile:
        require_compiler(device)
    envs = make_envs(args)
    if not isinstance(envs.single_action_space, gym.spaces.Box):
        envs.close()
        raise UserError(f"sac.py needs continuous actions; for those of {args.env_id} use off_policy_ac.py.")
    space, action_space = envs.single_observation_space, envs.single_action_space
    agent = ActorCritic(space, action_space, args).to(device)
    actor, critics, target_critics, log_alpha = agent.actor, agent.critics, agent.target_critics, agent.log_alpha
    groups = [
        {"params": list(actor.parameters()), "lr": args.actor_lr},
        {"params": list(critics.parameters()), "lr": args.critic_lr},
        {"params": [log_alpha], "lr": args.actor_lr if args.alpha == "auto" else 0.0},
    ]
    learning_rates = [group["lr"] for group in groups]
    optimizer = Adam(groups)
    frozen_critics = copy.deepcopy(critics).requires_grad_(False)  # the same weights in the same memory: the actor's
    for frozen_param, param in zip(frozen_critics.parameters(), critics.parameters()):  # gradient flows through the
        frozen_param.data = param.data  # critics, but not into them

    buffer = RingBuffer(
        args.buffer_size,
        {
            "obs": (space.shape, space.dtype),  # float32, or uint8 images
            "actions": (action_space.shape, action_space.dtype),
            "rewards": ((), np.float32),
            "next_obs": (space.shape, space.dtype),
            "terminated": ((), np.float32),
        },
        device,
    )

    def learn(batch):
        """One update from a batch of the buffer; what it returns is logged."""
        alpha = log_alpha.exp().detach()

        # Targets
        with torch.no_grad():
            next_policy = actor(batch.next_obs)
            next_u = next_policy.sample()  # (B, A): what the policy would do now (D10)
            next_q = target_critics(batch.next_obs, next_u.tanh())  # (M, B)
            next_log_probs = next_policy.log_prob(next_u)
            q_target = soft_td_target(batch.rewards, batch.terminated, next_q, next_log_probs, alpha, args.gamma)

        # Critics
        q = critics(batch.obs, batch.actions)  # (M, B): valid for any action, whoever chose it
        critic_loss = critic_loss_fn(q, q_target)

        # Actor
        policy = actor(batch.obs)
        pi_u = policy.sample(args.num_action_samples)  # (K, B, A): fresh (D11), without the simulator
        if args.estimator == "reparam":
            log_probs = policy.log_prob(pi_u)
            actor_loss = actor_loss_fn(log_probs, frozen_critics(batch.obs, pi_u.tanh()), alpha)
        else:
            pi_u = pi_u.detach()
            log_probs = policy.log_prob(pi_u)
            with torch.no_grad():
                pi_q = critics(batch.obs, pi_u.tanh())
            actor_loss = score_loss_fn(log_probs, pi_q, alpha)

        # Temperature
        alpha_loss = alpha_loss_fn(log_alpha, log_probs, action_space.shape[0])

        optimizer.zero_grad()
        (critic_loss + actor_loss + alpha_loss).backward()
        optimizer.step()
        polyak_update(target_critics, critics, args.tau)
        return {
            "critic_loss": critic_loss, "actor_loss": actor_loss, "value": q.mean(),
            "entropy": -log_probs.mean(), "alpha": alpha, "alpha_loss": alpha_loss,
        }  # fmt: skip

    if args.compile:
        graphs = {"triton.cudagraphs": True} if device.type == "cuda" else {}
        learn = torch.compile(learn, options={"fallback_random": True} | graphs)

    with run.open(agent=agent, envs=envs, optimizer=optimizer, buffer=buffer):
        env_steps, updates = run.env_steps, run.updates
        for group, learning_rate in zip(optimizer.param_groups, learning_rates):  # with --resume they may be new ones
            group["lr"] = learning_rate
        if args.alpha != "auto":
            log_alpha.data.fill_(math.log(args.alpha))
        log_every = max(1, int(500 * args.updates_per_step))  # updates; losses at least every 1000 environment steps
        while env_steps < args.total_timesteps:
            if run.checkpoint(env_steps, updates):  # at the start too: simulators cannot be saved, so all begin anew
                obs, _ = envs.reset(seed=run.env_seed(env_steps))
                valid = np.ones(args.num_envs, bool)

            # Act with the latest policy, at first at random
            if env_steps < args.learning_starts:
                actions = 2 * torch.rand(args.num_envs, *action_space.shape) - 1
            else:
                with torch.no_grad():
                    actions = agent.act(torch.as_tensor(obs, device=device))
            actions = actions.cpu().numpy()
            run.require_finite(env_steps, action=actions.sum())
            next_obs, rewards, terminated, truncated, infos = envs.step(actions)

            # Store
            run.require_finite(env_steps, reward=rewards.sum(), observation=next_obs.sum())  # before they are saved
            buffer.add(valid, obs=obs, actions=actions, rewards=rewards, next_obs=next_obs, terminated=terminated)
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
