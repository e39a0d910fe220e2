"""a3c_async.py whose workers never clear their gradients, so that each update repeats all earlier ones."""

import a3c_async

a3c_async.ActorCritic.zero_grad = lambda agent: None  # workers import this module, too

if __name__ == "__main__":
    a3c_async.run_cli(a3c_async.train, a3c_async.Args)
