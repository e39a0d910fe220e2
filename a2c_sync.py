"""Synchronous advantage actor-critic (A2C): decisions D1-D5 of the lecture in one file.

N environments take T steps with the same parameters; their T x N transitions form one batch (D5). With
`--num-envs 1 --num-steps 1` it is the fully online algorithm (D3). Each update follows the lecture's order: targets,
critic, actor (D4); with two separate networks (D1) or two heads on a shared trunk (D2).

    (1)  δ_t = r_t + γ (1 − terminated_t) V(s_{t+1}) − V(s_t)
    (2)  Â_t = δ_t + γλ (1 − done_t) Â_{t+1}                    done = terminated | truncated
    (3)  R_t = Â_t + V(s_t)
    (4)  L_critic = ½ mean (V_φ(s_t) − R_t)²
    (5)  L_actor  = −mean log π_θ(a_t|s_t) Â_t − β mean H(π_θ(·|s_t))
    (6)  L = L_actor + c L_critic

γ --gamma, λ --gae-lambda (1: n-step returns), β --ent-coef, c --value-coef. (1)-(3): arXiv 1506.02438 eq. 11-16.

    python a2c_sync.py                                          CartPole-v1: greedy return 500 in half a minute
    python a2c_sync.py --env-id Acrobot-v1 --total-timesteps 200000       greedy return -83

The step after an episode's end only resets the environment (gymnasium's NEXT_STEP mode). It is not a transition, and
the mask `valid` keeps it out of what is learned and counted. All other steps show the true successor of a state.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn

from common.compile import compiled
from common.envs import make_envs
from common.flags import Count, Fraction, NonNegative, Positive, RunArgs, UserError
from common.optim import RMSpropA3C
from common.run import Run, run_cli

# --- Config -----------------------------------------------------------------------------------------------------------


@dataclass
class Args(RunArgs):
    num_envs: Count = 16  # N, environments that step in parallel (D5); 1, with 1 step, is fully online (D3)
    num_steps: Count = 8  # T, steps of every environment between two updates
    network: Literal["separate", "shared"] = "separate"  # two networks (D1), or one trunk with two heads (D2)
    gamma: Fraction = 0.99  # discount γ
    gae_lambda: Fraction = 0.95  # λ of the advantage; 1 gives n-step returns, 0 the one-step δ
    ent_coef: NonNegative = 0.01  # β, weight of the entropy bonus
    value_coef: NonNegative = 0.5  # c, weight of the critic's loss; matters for a shared trunk
    actor_lr: Positive = 1e-2  # learning rate of the actor; with --network shared of everything
    critic_lr: Positive | None = None  # learning rate of the critic; by default that of the actor
    lr_decay: bool = True  # let the learning rates fall linearly to 0 at --total-timesteps
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"  # with ε inside the root, and clipped updates; or Adam
    rmsprop_eps: Positive = 1e-5  # ε inside RMSProp's root; 1e-8 for images, whose gradients are smaller (docs)
    max_grad_norm: Positive | None = None  # gradients of a network are scaled down to this norm; 0.5 is usual (docs)
    normalize_obs: bool = False  # shift and scale each element of a vector observation by its running mean and variance
    reward_scale: Positive = 1.0  # factor of the rewards that are learned from; less than 1 for returns in the hundreds
    compile: bool = False  # torch.compile the update, which takes up to a minute before the first one


def check_flags(args: Args):
    """Raises UserError for flags that contradict each other."""
    if args.network == "shared" and args.critic_lr is not None:
        raise UserError("--critic-lr needs separate networks; with --network shared use --actor-lr and --value-coef.")


# --- Networks ---------------------------------------------------------------------------------------------------------


def orthogonal(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Sequential):
    """(..., num_inputs) -> (..., num_features)"""

    num_features = 64

    def __init__(self, num_inputs):
        hidden = orthogonal(nn.Linear(num_inputs, self.num_features))
        super().__init__(hidden, nn.Tanh(), orthogonal(nn.Linear(self.num_features, self.num_features)), nn.Tanh())


class NatureCNN(nn.Module):
    """(..., channels, height, width) uint8 -> (..., 512), the network of Mnih et al. 2015."""

    num_features = 512

    def __init__(self, channels, height, width):
        super().__init__()
        conv = nn.Sequential(
            orthogonal(nn.Conv2d(channels, 32, 8, stride=4)), nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        num_inputs = conv(torch.zeros(1, channels, height, width)).shape[1]
        self.net = nn.Sequential(conv, orthogonal(nn.Linear(num_inputs, 512)), nn.ReLU())
        self.to(memory_format=torch.channels_last)  # a layout in memory; convolutions take a third less time on a CPU

    def forward(self, obs):
        images = obs.reshape(-1, *obs.shape[-3:]).contiguous(memory_format=torch.channels_last) / 255.0
        return self.net(images).view(*obs.shape[:-3], 512)


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
    """V_φ: (..., obs or features) -> (...)"""

    def __init__(self, body, num_features):
        super().__init__()
        self.body = body
        self.head = orthogonal(nn.Linear(num_features, 1), gain=1.0)

    def forward(self, x):
        return self.head(self.body(x)).squeeze(-1)  # like the rewards; with a last dimension of 1 it would broadcast


class ActorCritic(nn.Module):
    """Two networks, each with a body of its own (D1), or two heads on a shared encoder, the trunk (D2)."""

    def __init__(self, obs_shape, num_actions, discrete, shared):
        super().__init__()
        Body = NatureCNN if len(obs_shape) == 3 else MLP
        self.encoder = Body(*obs_shape) if shared else nn.Identity()
        actor_body = nn.Identity() if shared else Body(*obs_shape)
        critic_body = nn.Identity() if shared else Body(*obs_shape)
        self.actor = Actor(actor_body, Body.num_features, num_actions, discrete)
        self.critic = Critic(critic_body, Body.num_features)

    @torch.no_grad()
    def act(self, obs, greedy=False):
        """obs (N, ...) -> actions (N,) or (N, A), sampled or the most likely ones."""
        policy = self.actor(self.encoder(obs))
        return policy.mode() if greedy else policy.sample()


# --- Equations --------------------------------------------------------------------------------------------------------


def gae(values, rewards, terminated, done, gamma, gae_lambda):
    """Â and R, generalized advantage estimation (arXiv 1506.02438 eq. 11, 16); values (T + 1, N), the rest (T, N)."""
    assert values[1:].shape == rewards.shape == terminated.shape == done.shape
    terminated, done = terminated.to(values.dtype), done.to(values.dtype)  # from bool, too
    deltas = rewards + gamma * (1 - terminated) * values[1:] - values[:-1]  # (1)
    decays = gamma * gae_lambda * (1 - done)
    advantage, advantages = torch.zeros_like(rewards[0]), []
    for delta, decay in zip(reversed(deltas.unbind()), reversed(decays.unbind())):
        advantage = delta + decay * advantage  # (2)
        advantages.append(advantage)
    advantages = torch.stack(advantages[::-1])
    return advantages, advantages + values[:-1]  # (3)


def critic_loss_fn(values, returns, valid):
    """Regression on the λ-returns; values carry the gradient, returns are constants. All (T, N)."""
    return 0.5 * masked_mean((values - returns) ** 2, valid)  # (4)


def actor_loss_fn(log_probs, advantages, entropy, ent_coef, valid):
    """Policy gradient with entropy bonus, arXiv 1602.01783 section 4; advantages are constants. All (T, N)."""
    return -masked_mean(log_probs * advantages, valid) - ent_coef * masked_mean(entropy, valid)  # (5)


def masked_mean(x, valid):
    """Mean over the transitions; x and valid (T, N)."""
    assert x.shape == valid.shape
    return (x * valid).sum() / valid.sum().clamp(min=1)


# --- Update -----------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """T steps of N environments; the last row of obs and done is the state after them."""

    obs: torch.Tensor  # (T + 1, N, *obs_shape)
    actions: torch.Tensor  # (T, N) or (T, N, A)
    rewards: torch.Tensor  # (T, N)
    terminated: torch.Tensor  # (T, N)
    done: torch.Tensor  # (T + 1, N), 1 where s_t ended its episode, so that step t only resets


def loss_fn(agent, batch, args):
    """Loss of a rollout and its metrics, in the lecture's order (D4)."""
    valid, done = 1 - batch.done[:-1], batch.done[1:]  # (T, N): step t is a transition; it ended the episode

    # Targets
    features = agent.encoder(batch.obs)  # (T + 1, N, ...); with separate networks the observations themselves
    values = agent.critic(features)  # (T + 1, N): one pass gives every V(s) and every V(s')
    advantages, returns = gae(values.detach(), batch.rewards, batch.terminated, done, args.gamma, args.gae_lambda)

    # Critic
    critic_loss = critic_loss_fn(values[:-1], returns, valid)

    # Actor
    policy = agent.actor(features[:-1])
    entropy = policy.entropy()  # (T, N)
    log_probs = policy.log_prob(batch.actions)  # (T, N)
    actor_loss = actor_loss_fn(log_probs, advantages, entropy, args.ent_coef, valid)

    loss = actor_loss + args.value_coef * critic_loss  # (6)
    metrics = {"critic_loss": critic_loss, "actor_loss": actor_loss}
    metrics |= {"value": masked_mean(values[:-1], valid), "entropy": masked_mean(entropy, valid)}
    return loss, {name: value.detach() for name, value in metrics.items()}


def update(agent, optimizer, batch, args):
    """One gradient step on a rollout."""
    loss, metrics = loss_fn(agent, batch, args)
    optimizer.zero_grad()
    loss.backward()
    if args.max_grad_norm is not None:
        for group in optimizer.param_groups:  # each network on its own
            nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
    optimizer.step()
    agent.actor.bound_std()
    return metrics


def decay_learning_rates(optimizer, progress):
    """Linearly to 0, as progress goes from 0 to 1."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * max(0.0, 1 - progress)


def trunk_gradients(agent, batch, args):
    """How the two losses pull at the shared trunk (D2): the norm of either gradient, and the cosine between them."""
    grads = []
    for value_coef in (0.0, args.value_coef):
        loss, _ = loss_fn(agent, batch, SimpleNamespace(**vars(args) | {"value_coef": value_coef}))
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.encoder.parameters()))]))
    actor, critic = grads[0], grads[1] - grads[0]  # the loss is a sum of the two
    cosine = torch.cosine_similarity(actor, critic, dim=0)
    return {"trunk_actor_grad": actor.norm(), "trunk_critic_grad": critic.norm(), "trunk_grad_cosine": cosine}


# --- Train ------------------------------------------------------------------------------------------------------------
# Run checks the flags and seeds all random generators. run.open makes or resumes the run folder, keeps its arguments in
# checkpoints, and closes all at the end; run.count and run.log write metrics.csv and TensorBoard; run.finish evaluates.
# make_envs builds the environments: observations are float32 (images: uint8), actions lie in [-1, 1] or begin at 0.


def make_agent(envs, args: Args) -> ActorCritic:
    return ActorCritic(envs.obs_spec[0], envs.num_actions, envs.discrete, args.network == "shared")


def make_optimizer(agent: ActorCritic, args: Args) -> torch.optim.Optimizer:
    """A group for each network, so that nothing ties them together."""
    networks = [(agent.actor, args.actor_lr), (agent.critic, args.critic_lr or args.actor_lr)]
    if args.network == "shared":
        networks = [(agent, args.actor_lr)]
    groups = [{"params": list(network.parameters()), "lr": lr, "initial_lr": lr} for network, lr in networks]
    if args.optimizer == "adam":
        return torch.optim.Adam(groups, fused=True)
    return RMSpropA3C(groups, eps=args.rmsprop_eps)


def make_rollout(envs, T: int, N: int) -> Rollout:
    """Storage for T steps of N environments, in NumPy arrays."""
    (obs_shape, obs_dtype), (action_shape, action_dtype) = envs.obs_spec, envs.action_spec
    obs = np.zeros((T + 1, N, *obs_shape), obs_dtype)  # float32, or uint8 images
    actions = np.zeros((T, N, *action_shape), action_dtype)
    rewards, terminated, done = (np.zeros((rows, N), np.float32) for rows in (T, T, T + 1))
    return Rollout(obs, actions, rewards, terminated, done)


def act(agent: ActorCritic, envs, rollout: Rollout):
    """Fills the rollout with the agent's parameters (D5); yields transitions and ended episodes of each step."""
    obs, actions, rewards, terminated, done = rollout
    device = next(agent.parameters()).device
    obs[0], done[0] = obs[-1], done[-1]
    for t in range(len(actions)):
        actions[t] = agent.act(torch.as_tensor(obs[t], device=device)).cpu()
        obs[t + 1], rewards[t], terminated[t], truncated, episodes = envs.step(actions[t])
        done[t + 1] = np.maximum(terminated[t], truncated)
        yield envs.num_envs - int(done[t].sum()), episodes


def train(args: Args) -> dict:
    """Trains, evaluates greedily, and returns what results.json holds."""
    run = Run(args, __file__)
    check_flags(args)
    update_fn = compiled(update, run.device) if args.compile else update
    envs = make_envs(args)
    agent = make_agent(envs, args).to(run.device)
    optimizer = make_optimizer(agent, args)
    rollout = make_rollout(envs, args.num_steps, envs.num_envs)

    with run.open(agent=agent, envs=envs, optimizer=optimizer):
        rollout.obs[-1], _ = envs.reset(seed=run.env_seed())
        while run.env_steps < args.total_timesteps:
            if run.checkpoint_due():
                run.save()
                rollout.obs[-1], _ = envs.reset(seed=run.env_seed())  # simulators cannot be saved: all start anew
                rollout.done[-1] = 0
            if args.lr_decay:
                decay_learning_rates(optimizer, run.env_steps / args.total_timesteps)

            # Act
            for steps, episodes in act(agent, envs, rollout):
                run.count(steps, episodes)
            if run.new_steps() == 0:  # all environments have only reset
                continue

            # Learn
            batch = Rollout(*(torch.as_tensor(array, device=run.device) for array in rollout))
            conflict = trunk_gradients(agent, batch, args) if args.network == "shared" and run.log_due() else {}
            metrics = update_fn(agent, optimizer, batch, args)
            run.updates += 1
            run.log(metrics | conflict)
        return run.finish()


if __name__ == "__main__":
    run_cli(train, Args)
