"""a3c_async.py whose workers never clear their gradients, so that each update repeats all earlier ones.

What they have gathered is in no checkpoint.
"""

import a3c_async

a3c_async.ActorCritic.zero_grad = lambda agent: None  # workers import this module, too
a3c_async.__file__ = __file__  # a run's folder tells this from a3c_async.py

if __name__ == "__main__":
    a3c_async.run_cli(a3c_async.train, a3c_async.Args)
