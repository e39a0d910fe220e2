"""Asynchronous advantage actor-critic (A3C): decisions D6 and D7 of the lecture in one file.

Against a2c_sync.py: every worker process acts at its own speed, and nobody waits for a slow one. There are two ways:

--update hogwild (arXiv 1602.01783): each worker computes the gradient of its own T steps and applies it to the shared
parameters itself, without a lock.
--update pooled (D6): workers act with the latest parameters that they have pulled and hand over T steps at a time. As
soon as --batch-size transitions have come in from all workers together, they make one update, which is published.

So transitions come from parameters that are a few updates old (D7). Their lag is measured, logged under lag/, and
bounded by --max-lag. There is no Adam, --normalize-obs or --compile. The equations are those of a2c_sync.py:

    (1)  δ_t = r_t + γ (1 − terminated_t) V(s_{t+1}) − V(s_t)
    (2)  Â_t = δ_t + γλ (1 − done_t) Â_{t+1}                    done = terminated | truncated
    (3)  R_t = Â_t + V(s_t)
    (4)  L_critic = ½ mean (V_φ(s_t) − R_t)²
    (5)  L_actor  = −mean log π_θ(a_t|s_t) Â_t − β mean H(π_θ(·|s_t))
    (6)  L = L_actor + c L_critic

γ --gamma, λ --gae-lambda (1: n-step returns), β --ent-coef, c --value-coef. (1)-(3): arXiv 1506.02438 eq. 11-16.

    python a3c_async.py                                         CartPole-v1: greedy return 500 in half a minute
    python a3c_async.py --env-id Acrobot-v1 --total-timesteps 200000      greedy return -82

The step after an episode's end only resets the environment (gymnasium's NEXT_STEP mode). It is not a transition, and
the mask `valid` keeps it out of what is learned and counted. All other steps show the true successor of a state.
"""

import importlib.util
import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn

from common.checkpoint import env_seed, seed_generators
from common.envs import make_envs
from common.flags import Count, Fraction, Natural, NonNegative, Positive, RunArgs, UserError
from common.optim import RMSpropA3C
from common.run import Run, run_cli
from common.workers import Worker, Workers, copy_parameters, shared

# --- Config -----------------------------------------------------------------------------------------------------------


@dataclass
class Args(RunArgs):
    device: Literal["auto", "cpu", "cuda"] = "cpu"  # where pooled's networks learn; all else is on the CPU
    num_workers: Count = 4  # W, processes that act
    num_envs: Count = 32  # W x N, environments of all workers together
    num_steps: Count = 8  # T, steps of a worker's environments between two pulls of the parameters
    update: Literal["hogwild", "pooled"] = "hogwild"  # every worker by itself (A3C); of what all handed over (D6)
    engine: Literal["processes", "ray"] = "processes"  # pooled's workers: of this machine, or of a Ray cluster
    batch_size: Count = 128  # transitions of a pooled update, at least; hogwild's has those of one rollout, T x N
    max_lag: Natural | None = None  # transitions from parameters more updates old than this are dropped (D7)
    slow_worker: NonNegative = 0.0  # seconds that worker 0 is slower at every step, to see what a laggard does
    worker_timeout: Positive = 300.0  # seconds without a rollout after which a worker is replaced
    network: Literal["separate", "shared"] = "separate"  # two networks (D1), or one trunk with two heads (D2)
    gamma: Fraction = 0.99  # discount γ
    gae_lambda: Fraction = 0.95  # λ of the advantage; 1 gives n-step returns, 0 the one-step δ
    ent_coef: NonNegative = 0.01  # β, weight of the entropy bonus
    value_coef: NonNegative = 0.5  # c, weight of the critic's loss; matters for a shared trunk
    actor_lr: Positive = 5e-3  # learning rate of the actor; with --network shared of everything
    critic_lr: Positive | None = None  # learning rate of the critic; by default that of the actor
    lr_decay: bool = True  # let the learning rates fall linearly to 0 at --total-timesteps
    rmsprop_eps: Positive = 1e-5  # ε inside RMSProp's root; 1e-8 for images, whose gradients are smaller (docs)
    max_grad_norm: Positive | None = None  # gradients of a network are scaled down to this norm; 0.5 is usual (docs)
    reward_scale: Positive = 1.0  # factor of the rewards that are learned from; less than 1 for returns in the hundreds


def check_flags(args: Args):
    """Raises UserError for flags that contradict each other."""
    if args.network == "shared" and args.critic_lr is not None:
        raise UserError("--critic-lr needs separate networks; with --network shared use --actor-lr and --value-coef.")
    if args.vectorization == "async":
        raise UserError("--vectorization async: the workers are processes already; give more --num-workers.")
    if args.update == "hogwild" and (args.device != "cpu" or args.engine == "ray"):
        raise UserError("--update hogwild: its workers share the memory of this machine's CPU; use --update pooled.")
    if args.engine == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError('--engine ray needs an extra: pip install -e ".[ray]"')
    if args.num_envs % args.num_workers:
        raise UserError("--num-envs must be a multiple of --num-workers: all of them have the same number.")


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


def hogwild_update(agent, optimizer, batch, args, shared_agent, is_fresh):
    """One step of the shared parameters along the gradient of a worker's own copy, unless it has become too old."""
    loss, metrics = loss_fn(agent, batch, args)
    agent.zero_grad()  # gradients of the worker's copy, which are the shared ones, too: they would accumulate
    loss.backward()
    if not is_fresh():
        return metrics
    for shared_param, param in zip(shared_agent.parameters(), agent.parameters()):
        shared_param.grad = param.grad
    if args.max_grad_norm is not None:
        for group in optimizer.param_groups:  # each network on its own
            nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
    optimizer.step()
    shared_agent.actor.bound_std()
    return metrics


def decay_learning_rates(optimizer, progress):
    """Linearly to 0, as progress goes from 0 to 1."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * max(0.0, 1 - progress)


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


def start_work(worker: Worker, args: Args, env_steps: int):
    """A worker's own noise, environments, networks and rollout."""
    seed = env_seed(args.seed, env_steps, worker.index, worker.generation)
    seed_generators(seed)
    envs = make_envs(args, args.num_envs // args.num_workers)
    worker.at_exit.callback(envs.close)
    agent, rollout = make_agent(envs, args), make_rollout(envs, args.num_steps, envs.num_envs)
    rollout.obs[-1], _ = envs.reset(seed=seed)
    return envs, agent, rollout


def hogwild_worker(worker: Worker, args: Args, env_steps: int, shared_agent, optimizer, worker_steps, worker_updates):
    """Learns from each of its rollouts. Entry i of the counts has one writer, worker i."""
    envs, agent, rollout = start_work(worker, args, env_steps)
    batch = Rollout(*map(torch.from_numpy, rollout))
    max_lag = math.inf if args.max_lag is None else args.max_lag
    while worker_steps.sum() < args.total_timesteps:
        version = int(worker_updates.sum())  # before the copy: what comes in between counts as lag
        copy_parameters(agent.parameters(), shared_agent.parameters())
        steps, episodes = zip(*act(agent, envs, rollout))
        record = {"steps": sum(steps), "episodes": sum(episodes, [])}
        time.sleep(args.slow_worker * args.num_steps if worker.index == 0 else 0)
        if record["steps"] == 0:
            continue

        def is_fresh():
            record["lag"] = int(worker_updates.sum()) - version  # updates of others since this worker pulled
            return record["lag"] <= max_lag

        if args.lr_decay:
            decay_learning_rates(optimizer, int(worker_steps.sum()) / args.total_timesteps)
        metrics = hogwild_update(agent, optimizer, batch, args, shared_agent, is_fresh)
        worker_updates[worker.index] += record["lag"] <= max_lag
        worker.next()  # when the last record has been taken
        worker.send(**record, metrics={name: value.item() for name, value in metrics.items()})
        worker_steps[worker.index] += record["steps"]  # when they have been handed over


def pooled_worker(worker: Worker, args: Args, env_steps: int):
    """Hands over each of its rollouts, for the main process to learn from."""
    envs, agent, rollout = start_work(worker, args, env_steps)
    while True:
        version = worker.next(agent)  # when the last rollout has been taken, or this one would be even older
        steps, episodes = zip(*act(agent, envs, rollout))
        time.sleep(args.slow_worker * args.num_steps if worker.index == 0 else 0)
        worker.send(rollout, steps=sum(steps), episodes=sum(episodes, []), version=version)


class Lags(Counter):
    """How many updates old the parameters were that acted (D7): lag -> number of transitions."""

    def mean(self) -> float:
        return sum(lag * steps for lag, steps in self.items()) / max(1, self.total())

    def state_dict(self) -> dict:
        return {"all": dict(self)}

    def load_state_dict(self, state: dict):
        self.update(state["all"])


def train(args: Args) -> dict:
    """Trains, evaluates greedily, and returns what results.json holds."""
    run = Run(args, __file__)
    check_flags(args)
    hogwild = args.update == "hogwild"
    envs = make_envs(args, args.num_envs // args.num_workers)  # for their spaces; each worker has its own
    agent = make_agent(envs, args)
    agent = agent.share_memory() if hogwild else agent.to(run.device)
    optimizer, lags, recent = make_optimizer(agent, args), Lags(), Lags()  # all, and those since the last log
    worker_steps, worker_updates = (shared(np.zeros(args.num_workers, np.int64)) for _ in range(2))
    Engine = Workers if args.engine == "processes" else importlib.import_module("common.ray_workers").Workers
    handed_over = () if hogwild else (agent, make_rollout(envs, args.num_steps, envs.num_envs))
    workers = Engine(hogwild_worker if hogwild else pooled_worker, args.num_workers, args, *handed_over)
    envs.close()

    with run.open(agent=agent, envs=workers, optimizer=optimizer, lags=lags):
        for state in optimizer.state.values() if hogwild else ():
            state["square_avg"].share_memory_()  # before the workers start: later, each would have its own
        worker_steps[0], worker_updates[0] = run.env_steps, run.updates  # of earlier sessions
        workers.publish(run.updates)
        workers.start(args, run.env_steps, *((agent, optimizer, worker_steps, worker_updates) if hogwild else ()))
        pool = []  # rollouts that no update has been made of yet
        while run.env_steps < args.total_timesteps:
            if run.checkpoint_due():
                run.save()
            record = workers.receive()
            if record is None:
                continue
            run.count(record["steps"], record["episodes"])
            lag = record["lag"] if hogwild else run.updates - record["version"]
            is_fresh = args.max_lag is None or lag <= args.max_lag
            if is_fresh:
                lags[lag] += record["steps"]
                recent[lag] += record["steps"]

            if hogwild:  # the worker has learned from it
                run.updates = int(worker_updates.sum())
                metrics = record["metrics"]
            else:
                pool += [record] if is_fresh else []
                pool_size = sum(each["steps"] for each in pool)
                if pool_size < args.batch_size:
                    continue
                # Learn: the workers' rollouts side by side, as if one worker had had all the environments
                arrays = (np.concatenate(parts, 1) for parts in zip(*(each["arrays"] for each in pool)))
                batch = Rollout(*(torch.as_tensor(array, device=run.device) for array in arrays))
                if args.lr_decay:
                    decay_learning_rates(optimizer, (run.env_steps - pool_size) / args.total_timesteps)
                metrics = update(agent, optimizer, batch, args)
                run.updates += 1
                workers.publish(run.updates)
                pool = []

            if run.log_due():
                found = {"lag/mean": recent.mean(), "lag/max": max(recent, default=0)}
                run.log(metrics | found | {"lag/dropped": run.env_steps - lags.total()})
                recent.clear()
        workers.close()
        found = {"lag_mean": lags.mean(), "lag_max": max(lags, default=None), "dropped": run.env_steps - lags.total()}
        return run.finish(**found, lag_histogram=dict(sorted(lags.items())), workers_replaced=workers.replaced)


if __name__ == "__main__":
    run_cli(train, Args)
