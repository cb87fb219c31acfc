"""What a chapter's library asks of whoever makes many independent calls for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol


def told_nobody(index: int, result: Any) -> None:
    """Tell nobody."""


class Tasks(Protocol):
    """Makes calls side by side, wherever: :class:`lablog.cluster.client.Cluster` does, in whose
    words this is explained."""

    def map(self, kind: str, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], *,
            common: tuple[Any, ...] = (), reads: Sequence[Path] = (), threads: int = 1,
            gpus: float = 0, memory: int = 0, unit: str = "run", names: Sequence[str] = (),
            done: Callable[[int, Any], None] = told_nobody) -> list[Any]:
        """Results of ``function(*common, *call)`` for all `calls`, in their order."""
        ...
