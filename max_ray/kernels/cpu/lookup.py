"""What a step looks up: rows of a table, and where the tokens of a decode step stand."""

from __future__ import annotations

import torch


def gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, rows)


def decode_slots(block_tables: torch.Tensor, cache_lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    blocks = block_tables.gather(1, (cache_lengths // page_size).long().unsqueeze(1)).squeeze(1)
    return blocks.long() * page_size + cache_lengths % page_size


def positions(cache_lengths: torch.Tensor) -> torch.Tensor:
    return cache_lengths.long()
