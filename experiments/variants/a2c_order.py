"""a2c_sync.py with D4 to the letter: a step of the critic, then by its new advantage one of the actor."""

import a2c_sync


def update(agent, optimizer, batch, args):
    for waits in (agent.actor, agent.critic):
        loss, metrics = a2c_sync.loss_fn(agent, batch, args)
        optimizer.zero_grad()
        loss.backward()
        waits.zero_grad()  # the optimizer passes over what has no gradient
        optimizer.step()
    agent.actor.bound_std()
    return metrics


a2c_sync.update = update
a2c_sync.__file__ = __file__  # a run's folder tells this from a2c_sync.py

if __name__ == "__main__":
    a2c_sync.run_cli(a2c_sync.train, a2c_sync.Args)
