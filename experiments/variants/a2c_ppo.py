"""a2c_sync.py with docs/exercises/ppo.diff, the solution of an exercise, applied to it."""

import tempfile

import a2c_sync  # noqa: F401  (what is patched: a run's code is known by its imports)
from experiments.patch import patched

with tempfile.TemporaryDirectory() as folder:
    source = patched("ppo", "a2c_sync", folder).read_text()
exec(compile(source, __file__, "exec"))  # as this module: it trains if this is what was called
