"""Loaded once by the server that tasks are forked from: what every task would load by itself.

Asking PyTorch for determinism imports eight hundred modules, and the first key of a stored result
reads what is installed, which both take longer than most tasks.
"""

import threadpoolctl  # noqa: F401

from lablog import keys
from lablog.determinism import seed_everything

seed_everything(0)
keys.distributions()
