"""What a step looks up: rows of a table, and where the tokens of a decode step stand; and sums of rows."""

from __future__ import annotations

import torch


def gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, rows)


def decode_slots(block_tables: torch.Tensor, cache_lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    blocks = block_tables.gather(1, (cache_lengths // page_size).long().unsqueeze(1)).squeeze(1)
    return blocks.long() * page_size + cache_lengths % page_size


def positions(cache_lengths: torch.Tensor) -> torch.Tensor:
    return cache_lengths.long()


def sum_rows(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Row after row: torch's own sum takes an order that depends on the width."""
    dtype = torch.float32 if rows.is_floating_point() and rows.element_size() < 4 else rows.dtype
    total = rows[0].to(dtype, copy=True)
    for row in rows[1:]:
        total += row
    out.copy_(total)
