"""Loaded once by the server that tasks are forked from: what every task would load by itself.

Asking PyTorch for determinism imports eight hundred modules, which takes longer than most tasks.
"""

import threadpoolctl  # noqa: F401

from lablog.determinism import seed_everything

seed_everything(0)
