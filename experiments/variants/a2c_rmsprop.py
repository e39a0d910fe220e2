"""a2c_sync.py with torch's RMSprop: a mean square that begins at 0, and ε outside the root; update clipping stays."""

import a2c_sync
from experiments.variants.a2c_rmsprop_eps import EpsilonOutside


class BeginsAtZero(EpsilonOutside):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for state in self.state.values():
            state["square_avg"].zero_()


a2c_sync.RMSpropA3C = BeginsAtZero
a2c_sync.__file__ = __file__  # a run's folder tells this from a2c_sync.py

if __name__ == "__main__":
    a2c_sync.run_cli(a2c_sync.train, a2c_sync.Args)
