"""sac.py that after training compares Q with the discounted return that follows; results.json has their difference."""

import gymnasium as gym
import torch

import sac


@torch.no_grad()
def overestimation(agent, args, steps=1000, num_envs=10) -> dict:
    """Over the first half of the steps, since the rest of a sum of discounted rewards is cut off at the end."""
    spec = gym.spec(args.env_id)
    limit, spec.max_episode_steps = spec.max_episode_steps, 2 * steps  # a time limit would end the sum
    envs, seen = sac.make_envs(args, num_envs), []
    spec.max_episode_steps = limit
    obs, done = envs.reset(seed=0)[0], torch.zeros(num_envs)
    for _ in range(steps):
        policy = agent.actor(torch.as_tensor(obs))
        u = policy.sample()
        actions, log_probs = u.tanh(), policy.log_prob(u)
        q, valid = agent.critic(torch.as_tensor(obs), actions).amin(0), 1 - done
        obs, rewards, terminated, truncated, _ = envs.step(actions.numpy())
        done = torch.as_tensor(terminated | truncated).float()
        seen.append((q, valid, torch.as_tensor(rewards), log_probs, torch.as_tensor(terminated)))
    envs.close()
    following, pairs = torch.zeros(num_envs), []
    for q, valid, rewards, log_probs, terminated in reversed(seen):
        value = torch.where(terminated, rewards, rewards + args.gamma * following)  # of this action; at a reset unused
        pairs.append(torch.stack([q, value])[:, valid == 1])
        following = value - agent.log_alpha.exp() * log_probs
    q, value = torch.cat(pairs[steps // 2 :], 1).mean(1).tolist()
    return {"Q": q, "discounted return": value, "overestimation": q - value, "error of Q": abs(q - value)}


class Run(sac.Run):
    def finish(self):
        return super().finish(**overestimation(self._parts["agent"], self.args))


sac.Run = Run
sac.__file__ = __file__  # a run's folder tells this from sac.py

if __name__ == "__main__":
    sac.run_cli(sac.train, sac.Args)
