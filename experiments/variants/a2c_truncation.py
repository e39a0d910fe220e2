"""a2c_sync.py that takes a time limit for an end: no bootstrap from the state after it."""

import a2c_sync

update = a2c_sync.update
a2c_sync.update = lambda agent, optimizer, batch, args: update(
    agent, optimizer, batch._replace(terminated=batch.done[1:]), args
)

if __name__ == "__main__":
    a2c_sync.run_cli(a2c_sync.train, a2c_sync.Args)
