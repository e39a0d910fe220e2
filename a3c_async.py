"""Asynchronous advantage actor-critic (A3C): decisions D6 and D7 of the lecture in one file.

Against a2c_sync.py: every worker process acts at its own speed, and nobody waits for a slow one. Two ways:

--update hogwild (arXiv 1602.01783): each worker computes the gradient of its own T steps and applies it to the shared
parameters itself, without a lock.
--update pooled (D6): workers act with the latest parameters they have pulled and hand over T steps at a time; as soon as
--batch-size transitions of whichever workers are there, one update is made of them and published.

So transitions come from parameters that are a few updates old (D7): their lag is measured, logged under lag/, and bounded
by --max-lag. Equations as in a2c_sync.py:

    (1)  δ_t = r_t + γ (1 − terminated_t) V(s_{t+1}) − V(s_t)
    (2)  Â_t = δ_t + γλ (1 − done_t) Â_{t+1}                    done = terminated | truncated
    (3)  R_t = Â_t + V(s_t)
    (4)  L_critic = ½ mean (V_φ(s_t) − R_t)²
    (5)  L_actor  = −mean log π_θ(a_t|s_t) Â_t − β mean H(π_θ(·|s_t))
    (6)  L = L_actor + c L_critic

γ --gamma, λ --gae-lambda (1: n-step returns), β --ent-coef, c --value-coef. (1)-(3): arXiv 1506.02438 eq. 11-16.

    python a3c_async.py                                         CartPole-v1: greedy return 500 in a minute
    python a3c_async.py --env-id Acrobot-v1 --total-timesteps 200000      greedy return -82

The step after an episode's end only resets the environment (gymnasium's NEXT_STEP): it is not a transition, and
`valid` keeps it out of losses and counts. In return every obs[t + 1] is the true successor of obs[t].
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn

from common.envs import env_seed, make_envs
from common.errors import UserError
from common.optim import RMSpropA3C, clip_grad_norm_
from common.run import Run, RunArgs, run_cli
from common.workers import PAUSE, Lags, Snapshot, Worker, Workers, copy_parameters, shared

# --- Config -----------------------------------------------------------------------------------------------------------


@dataclass
class Args(RunArgs):
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """where the networks live: in memory that all workers share, so the CPU"""
    num_workers: int = 4
    """W, processes that act"""
    envs_per_worker: int | None = None
    """N, environments of each worker; by default 4"""
    num_envs: int | None = None
    """environments of all workers together, instead of --envs-per-worker"""
    num_steps: int = 8
    """T, steps of a worker's environments between two pulls of the parameters"""
    update: Literal["hogwild", "pooled"] = "hogwild"
    """hogwild: every worker updates by itself (A3C); pooled: one update of what whichever workers handed over (D6)"""
    batch_size: int = 128
    """transitions of a pooled update, at least: rollouts stay whole; hogwild's has those of one rollout, T x N"""
    max_lag: int | None = None
    """transitions from parameters more updates old than this are dropped, and counted; by default none are (D7)"""
    slow_worker: float = 0.0
    """seconds that worker 0 sleeps at every step, to see what a laggard does"""
    worker_timeout: float = 60.0
    """seconds without a sign of life after which a worker is replaced"""
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
    actor_lr: float = 2.5e-3
    """learning rate of the actor; with --network shared of everything"""
    critic_lr: float | None = None
    """learning rate of the critic; by default that of the actor"""
    rmsprop_eps: float = 1e-5
    """ε inside RMSProp's root; above the squares of all gradients it makes RMSProp SGD, so 1e-8 for images (docs)"""
    lr_decay: bool = True
    """let the learning rates fall linearly to 0 at --total-timesteps"""
    max_grad_norm: float = math.inf
    """gradients of a network are scaled down to this norm; 0.5 is usual, but makes V forget what is rare (docs)"""


def check(args: Args):
    """Raises UserError for flags that contradict each other."""
    if args.device == "cuda":
        raise UserError("a3c_async.py keeps its networks in memory that all workers share; use --device cpu.")
    if args.vectorization == "async":
        raise UserError("--vectorization async: the workers are processes already; give more --num-workers.")
    if args.slow_worker >= args.worker_timeout:
        raise UserError("--slow-worker must be below --worker-timeout, or worker 0 is replaced for ever.")
    if args.update == "pooled" and args.batch_size > args.total_timesteps:
        raise UserError("--batch-size must not exceed --total-timesteps: nothing would be learned.")
    if args.network == "shared" and args.critic_lr is not None:
        raise UserError(
            "--critic-lr needs a critic of its own; with --network shared, use --actor-lr and --value-coef."
        )
    if args.num_envs is not None and args.num_envs != args.num_workers * envs_of_a_worker(args):
        each = args.envs_per_worker or "the same number of"
        raise UserError(
            f"--num-envs {args.num_envs} is not {args.num_workers} workers times {each} environments; "
            "give --envs-per-worker and --num-envs None."
        )


def envs_of_a_worker(args: Args) -> int:
    if args.num_envs is not None and args.envs_per_worker is None:
        return max(1, args.num_envs // args.num_workers)
    return args.envs_per_worker or 4


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


LOGGED = "actor_loss", "critic_loss", "value", "entropy"


def loss_fn(agent, obs, actions, rewards, terminated, done, args):
    """Loss of a rollout, and the numbers LOGGED of it; obs and done (T + 1, N, ...), the rest (T, N, ...)."""
    valid = 1 - done[:-1]

    # Targets
    features = agent.trunk(obs)  # (T + 1, N, ...); with separate networks obs itself
    values = agent.critic(features)  # (T + 1, N): one pass gives every V(s) and every V(s')
    advantages, returns = gae(values.detach(), rewards, terminated, done[1:], args.gamma, args.gae_lambda)

    # Critic
    critic_loss = critic_loss_fn(values[:-1], returns, valid)

    # Actor
    policy = agent.actor(features[:-1])
    entropy = policy.entropy()  # (T, N)
    log_probs = policy.log_prob(actions)
    actor_loss = actor_loss_fn(log_probs, advantages, entropy, args.ent_coef, valid)

    logged = torch.stack([actor_loss, critic_loss, masked_mean(values[:-1], valid), masked_mean(entropy, valid)])
    return actor_loss + args.value_coef * critic_loss, logged.detach()  # (6)


def backward(loss, agent):
    """The gradient of a worker's own copy. Cleared here: clearing only the shared one would sum up all gradients."""
    agent.zero_grad()
    loss.backward()


def gradient_step(agent, shared_agent, optimizer, max_grad_norm):
    """One step of the shared parameters along the gradient of a worker's own copy."""
    for shared_param, param in zip(shared_agent.parameters(), agent.parameters()):
        shared_param.grad = param.grad
    if max_grad_norm < math.inf:
        for group in optimizer.param_groups:
            clip_grad_norm_(group["params"], max_grad_norm)
    optimizer.step()
    shared_agent.actor.bound_std()


def decay_learning_rates(optimizer, env_steps, args):
    remaining = max(0.0, 1 - env_steps / args.total_timesteps) if args.lr_decay else 1.0
    for group, learning_rate in zip(optimizer.param_groups, (args.actor_lr, args.critic_lr or args.actor_lr)):
        group["lr"] = learning_rate * remaining


# --- Work -------------------------------------------------------------------------------------------------------------


ROLLOUT = "obs", "actions", "rewards", "terminated", "done"
# Rows of `counts`, which hogwild needs: a column is what one worker has done, so every number has one writer
STEPS, UPDATES = 0, 1


def handed_over(space: gym.spaces.Box, action_space: gym.Space, args: Args) -> dict:
    """What a worker hands over after T steps: name -> (shape, dtype)."""
    T, N = args.num_steps, envs_of_a_worker(args)
    fields = {"steps": ((), np.int64), "episodes": ((T, N, 2), np.float64)}  # return and length, where one ended
    if args.update == "hogwild":
        return fields | {"lag": ((), np.int64), "logged": ((len(LOGGED),), np.float32)}
    return fields | {
        "version": ((), np.int64),
        "obs": ((T + 1, N, *space.shape), space.dtype),  # float32, or uint8 images
        "actions": ((T, N, *action_space.shape), action_space.dtype),
        "rewards": ((T, N), np.float32),
        "terminated": ((T, N), np.float32),
        "done": ((T + 1, N), np.float32),
    }


def work(worker: Worker, args: Args, start: int, shared_agent: ActorCritic, snapshot: Snapshot, optimizer, counts):
    """A worker process: pulls the latest parameters, takes T steps with them, and so on until it is killed."""
    seed = env_seed(args.seed, start, worker.index, worker.life)
    torch.manual_seed(seed)
    T, N = args.num_steps, envs_of_a_worker(args)
    envs = worker.owns(make_envs(args, N))
    space, action_space = envs.single_observation_space, envs.single_action_space
    agent = ActorCritic(space, action_space, args)

    # One rollout: T steps of N environments. obs and done have a row more, for what the last step led to
    obs = np.zeros((T + 1, N, *space.shape), space.dtype)
    actions = np.zeros((T, N, *action_space.shape), action_space.dtype)
    rewards, terminated = np.zeros((T, N), np.float32), np.zeros((T, N), np.float32)
    done = np.zeros((T + 1, N), np.float32)  # done[t]: s_t ended its episode, step t only resets
    obs[T] = envs.reset(seed=seed)[0]
    worker.beat()

    while True:
        while counts[STEPS].sum() >= args.total_timesteps:  # enough: the main process will end this one
            worker.beat()
            time.sleep(PAUSE)

        # Pull
        if args.update == "pooled":
            worker.wait()  # whoever acts while the last rollout still lies there acts with older parameters
            version = snapshot.pull(agent)
        else:
            version = int(counts[UPDATES].sum())
            copy_parameters(agent.parameters(), shared_agent.parameters())

        # Act
        obs[0], done[0] = obs[T], done[T]
        episodes = np.full((T, N, 2), np.nan)
        for t in range(T):
            with torch.no_grad():
                actions[t] = agent.act(torch.from_numpy(obs[t])).numpy()
            obs[t + 1], rewards[t], terminated[t], truncated, infos = envs.step(actions[t])
            done[t + 1] = np.maximum(terminated[t], truncated)
            if "episode" in infos:
                ended = infos["_episode"]
                episodes[t, ended] = np.stack([infos["episode"]["r"], infos["episode"]["l"]], -1)[ended]
            worker.beat()
            if worker.index == 0:
                time.sleep(args.slow_worker)
        steps = T * N - int(done[:-1].sum())
        if steps == 0:
            continue  # T = 1, and that step only reset
        handed = {"steps": steps, "episodes": episodes}
        rollout = {"obs": obs, "actions": actions, "rewards": rewards, "terminated": terminated, "done": done}

        if args.update == "pooled":
            worker.send(**handed, version=version, **rollout)
            continue

        # Learn (hogwild)
        decay_learning_rates(optimizer, int(counts[STEPS].sum()), args)
        loss, logged = loss_fn(agent, *map(torch.from_numpy, rollout.values()), args)
        backward(loss, agent)
        lag = int(counts[UPDATES].sum()) - version  # updates of others since this worker pulled
        if args.max_lag is None or lag <= args.max_lag:
            gradient_step(agent, shared_agent, optimizer, args.max_grad_norm)
            counts[UPDATES, worker.index] += 1
        worker.send(**handed, lag=lag, logged=logged)
        counts[STEPS, worker.index] += steps


# --- Train ------------------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """Trains, evaluates greedily, and returns what results.json holds."""
    run = Run(args, __file__)
    args = run.args
    check(args)
    run.device = torch.device("cpu")  # whatever else there is
    envs = make_envs(args, 1)  # for its spaces; the workers have their own
    space, action_space = envs.single_observation_space, envs.single_action_space
    envs.close()
    agent = ActorCritic(space, action_space, args).share_memory()

    # Separate networks: a group each, so that neither learning rates nor clipping tie them together
    if args.network == "shared":
        groups = [{"params": list(agent.parameters())}]
    else:
        groups = [{"params": list(agent.actor.parameters())}, {"params": list(agent.critic.parameters())}]
    optimizer = RMSpropA3C(groups, eps=args.rmsprop_eps)
    snapshot = Snapshot(agent)
    counts = shared((2, args.num_workers), np.int64)
    lags = Lags()
    workers = Workers(work, args.num_workers, handed_over(space, action_space, args), args.worker_timeout)

    with run.open(agent=agent, envs=workers, optimizer=optimizer, lags=lags):
        env_steps, updates = run.env_steps, run.updates
        for state in optimizer.state.values():
            state["square_avg"].share_memory_()  # before the workers start: later, each would have its own
        counts[:, 0] = torch.tensor([env_steps, updates])  # of earlier sessions
        snapshot.publish(agent, updates)
        workers.start(args, env_steps, agent, snapshot, optimizer, counts)
        pool, next_log = [], env_steps
        while env_steps < args.total_timesteps:
            run.checkpoint(env_steps, updates)
            workers.watch()
            handed = workers.receive()
            if handed is None:
                time.sleep(PAUSE)
                continue

            env_steps += int(handed["steps"])
            returns, lengths = handed["episodes"][..., 0], handed["episodes"][..., 1]  # (T, N)
            run.logger.episodes(env_steps, {"_episode": ~np.isnan(returns), "episode": {"r": returns, "l": lengths}})

            lag = int(handed["lag"]) if args.update == "hogwild" else updates - int(handed["version"])
            fresh = lags.add(lag, int(handed["steps"]), args.max_lag)

            if args.update == "hogwild":
                updates, logged = int(counts[UPDATES].sum()), handed["logged"]
            else:
                pool += [handed] if fresh else []
                steps = sum(int(each["steps"]) for each in pool)
                if steps < args.batch_size:
                    continue
                # Learn (pooled): rollouts of whichever workers side by side, as if one had had all the environments
                batch = [torch.from_numpy(np.concatenate([each[name] for each in pool], 1)) for name in ROLLOUT]
                pool = []
                decay_learning_rates(optimizer, env_steps - steps, args)
                loss, logged = loss_fn(agent, *batch, args)
                backward(loss, agent)
                gradient_step(agent, agent, optimizer, args.max_grad_norm)
                updates += 1
                snapshot.publish(agent, updates)

            # Log
            run.require_finite(env_steps, actor_loss=logged[0], critic_loss=logged[1])
            if env_steps >= next_log:
                next_log = env_steps + 500
                run.logger.log(env_steps, **dict(zip(LOGGED, logged)), **lags.scalars(run.logger, env_steps))
        workers.close()
        return run.finish(env_steps, updates, **lags.results(), workers_replaced=workers.replaced)


if __name__ == "__main__":
    run_cli(train, Args)
