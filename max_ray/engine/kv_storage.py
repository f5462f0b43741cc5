"""The tensors that hold keys and values of one rank: per layer [num_blocks, page_size, num_kv_heads, head_dim].

Block 0 is an ordinary block. One block more than the pool knows, the last, is the scratch block: rows that only fill a
batch up write their keys there. Memory is zeroed: attention masks unwritten slots by weight 0, and 0 times a stray
NaN would still be NaN. It is all there from the start, so that a machine that lacks it says so before it serves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from max_ray import host_memory
from max_ray.driver import upload
from max_ray.interfaces import KVCacheInputs, KVCacheParams, RunRow

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class KVStorage:
    """Keys and values of all layers, and how many tokens a block holds. num_blocks: without the scratch block, whose
    number it is."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    page_size: int
    num_blocks: int

    @classmethod
    def allocate(cls, params: KVCacheParams, num_blocks: int, device: torch.device) -> KVStorage:
        shape = (num_blocks + 1, params.page_size, params.num_kv_heads)
        dtype = getattr(torch, params.dtype)

        def zeros(*shape: int) -> torch.Tensor:
            if device.type == "cpu":
                return host_memory.resident_zeros(*shape, dtype=dtype)
            return torch.zeros(*shape, dtype=dtype, device=device)

        def layers(head_dim: int) -> list[torch.Tensor]:
            return [zeros(*shape, head_dim) for _ in range(params.num_layers)]

        return cls(layers(params.head_dim), layers(params.value_head_dim), params.page_size, num_blocks)


class RunTables:
    """Block tables and lengths of the rows of one run, kept on the host and moved to the device a step at a time.

    Rows leave when they end; `rows` maps the present position in the batch to the row's index in the run.
    block_tables: int32 [rows, blocks]. lengths: int64 [rows], tokens in the cache. num_grown: calls of `grow`.
    position_offsets: int64 [rows], of the steps after the first (see PromptImage).
    """

    def __init__(self, rows: list[RunRow], storage: KVStorage, device: torch.device) -> None:
        self._storage = storage
        self._device = device
        self.num_grown = 0
        self.rows = np.arange(len(rows))
        self.lengths = np.array([r.processed_length for r in rows], dtype=np.int64)
        self.position_offsets = np.array([r.next_position_offset for r in rows], dtype=np.int64)
        width = max(len(r.block_table) for r in rows)
        self.block_tables = np.zeros((len(rows), width), dtype=np.int32)
        for i, row in enumerate(rows):
            self.block_tables[i, : len(row.block_table)] = row.block_table

    def first_step(self, rows: list[RunRow]) -> KVCacheInputs:
        """Inputs for the ragged first step; afterwards lengths count its tokens."""
        counts = np.array([len(r.active_tokens) for r in rows], dtype=np.int64)
        row_of_token = np.repeat(self.rows, counts)
        offsets = np.arange(len(row_of_token)) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = self.lengths[row_of_token] + offsets
        return self._inputs(row_of_token, positions, counts)

    def keep(self, positions_in_batch: list[int]) -> None:
        """Only these rows (positions in the present batch) go on."""
        if len(positions_in_batch) == len(self.rows):
            return
        self.rows = self.rows[positions_in_batch]
        self.lengths = self.lengths[positions_in_batch]
        self.position_offsets = self.position_offsets[positions_in_batch]
        self.block_tables = self.block_tables[positions_in_batch]

    def grow(self, block_tables: dict[int, npt.NDArray[np.int32]]) -> None:
        """Rows (by their index in the run; some may have left) have got more blocks."""
        self.num_grown += 1
        width = max((len(table) for table in block_tables.values()), default=0)
        missing = max(0, width - self.block_tables.shape[1])
        self.block_tables = np.pad(self.block_tables, ((0, 0), (0, missing)))
        for position, row in enumerate(self.rows.tolist()):
            if row in block_tables:
                self.block_tables[position, : len(block_tables[row])] = block_tables[row]

    def next_step(self) -> KVCacheInputs:
        """Inputs for a step of one token a row."""
        batch = np.arange(len(self.rows))
        inputs = self._inputs(batch, self.lengths, np.ones(len(batch), dtype=np.int64))
        if self.position_offsets.any():
            inputs.position_offsets = upload(self.position_offsets, self._device)
        return inputs

    def advance(self) -> None:
        """Counts one token a row that was run with tables on the device (see graphs.py)."""
        self.lengths = self.lengths + 1

    def _inputs(self, row_of_token: IntArray, positions: IntArray, counts: IntArray) -> KVCacheInputs:
        page = self._storage.page_size
        slots = self.block_tables[row_of_token, positions // page].astype(np.int64) * page + positions % page
        before = self.lengths
        self.lengths = before + counts
        return KVCacheInputs(
            keys=self._storage.keys,
            values=self._storage.values,
            block_tables=upload(self.block_tables, self._device),
            cache_lengths=upload(before.astype(np.int32), self._device),
            slot_mapping=upload(slots, self._device),
            max_kv_length=int(self.lengths.max()),
            page_size=page,
        )
