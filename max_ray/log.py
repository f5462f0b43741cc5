"""Logger setup: one format, and a rank prefix where there is more than one rank."""

from __future__ import annotations

import logging

_FORMAT = "%(asctime)s %(levelname)s %(name)s%(rank)s: %(message)s"


class _RankFilter(logging.Filter):
    def __init__(self, rank: str) -> None:
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = self._rank
        return True


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `get_logger(__name__)`."""
    return logging.getLogger(name)


def setup_logging(level: str = "INFO", *, rank: int | None = None, world_size: int = 1) -> None:
    """Sends max_ray's log to stderr at `level`. Called once by an entry point or an actor, never by the library."""
    handler = logging.StreamHandler()
    handler.addFilter(_RankFilter(f" [rank {rank}/{world_size}]" if rank is not None and world_size > 1 else ""))
    handler.setFormatter(logging.Formatter(_FORMAT))
    for root_name in ("max_ray", "architectures", "deployments"):
        logger = logging.getLogger(root_name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
