"""Decode steps replayed: from CUDA graphs, one launch a step instead of hundreds; on a CPU from tapes of kernel calls.

A graph is captured for a *bucket* of rows and reads its inputs from buffers that never move; a batch between two
buckets is filled up with idle rows. An idle row runs token 0 at position 0 and writes its keys to the scratch block.

| on the device, for good | written by                                                                   |
|-------------------------|------------------------------------------------------------------------------|
| tokens [R]              | each step: the tokens just sampled, from where they were sampled             |
| block_tables [R, W]     | the host, when rows have come, gone or got blocks                            |
| cache_lengths [R]       | the host at the same times; counted up on the device between                 |
| position_offsets [R]    | the host at the same times; of models that take images only                  |

All else is computed inside the graph: positions, where the new keys go, the network. Nothing in a step depends on what
the host knows but the number of rows; the attention's splits are made for the longest sequence that the plan allows.
A graph is made of what `model.execute` launches, so the eager step and the replayed one run the same kernels.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from max_ray import kernels
from max_ray.driver import upload
from max_ray.engine.kv_storage import KVStorage, RunTables
from max_ray.errors import DeviceError
from max_ray.interfaces import KVCacheInputs, ModelInputs, SupportedEncoding
from max_ray.log import get_logger
from max_ray.modeling import PipelineModel

_LOG = get_logger(__name__)
_TAPE_BYTES = 256 * 1024**2  # of activations that a CPU's tapes keep, each those of one batch size
_LARGE_STEP = 32  # rows between buckets once powers of two would waste more


@dataclass(frozen=True)
class Replay:
    """Calling it runs the captured function over what its inputs hold now; the output is reused by the next call.

    The first call comes right after the capture, over the same inputs. nbytes: memory that no other replay shares.
    """

    run: Callable[[], torch.Tensor]
    nbytes: int = 0

    def __call__(self) -> torch.Tensor:
        return self.run()


Capture = Callable[[Callable[[], torch.Tensor]], Replay]


class CudaCapture:
    """Captures functions as CUDA graphs of one device that share one pool of memory: only one runs at a time."""

    _one_in_a_process = threading.Lock()  # torch's rule; ranks may be threads

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], torch.Tensor]) -> Replay:
        """Runs `function` once, so that kernels are compiled and libraries set up, then captures it. Raises DeviceError
        where it does something that no graph can hold."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                function()
            torch.cuda.current_stream().wait_stream(self._stream)
            output = self._capture(graph, function)

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return Replay(replay)

    def _capture(self, graph: torch.cuda.CUDAGraph, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        try:
            with (
                self._one_in_a_process,
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                return function()
        except RuntimeError as error:  # what torch raises for every failure of a capture
            raise DeviceError(
                f"A decode step could not be captured in a CUDA graph: {error}. Without graphs it may run: set "
                f"cuda_graphs=never."
            ) from error


def capture_tape(function: Callable[[], torch.Tensor]) -> Replay:
    """The CPU's capture: a tape of the function's operations; the function itself where that cannot be."""
    from max_ray.kernels.native.tape import NotRecordableError, record

    try:
        tape = record(function)
    except NotRecordableError as error:
        _LOG.debug("decode steps run operation by operation: %s", error)
        return Replay(function)
    recorded = [tape.output]  # of the recording itself, which has computed the first call's answer
    return Replay(lambda: recorded.pop() if recorded else tape(), tape.nbytes)


class DecodeGraphs:
    """The decode steps of one rank's model, by bucket. One run at a time, as for the model itself.

    max_batch_size, max_length: rows and tokens of a row that steps may have; larger batches are left to the caller
    (see `fits`). buckets: ascending sizes up to max_batch_size; by default `buckets_up_to` it. max_bytes: of memory
    that replays do not share; those used last are kept. shares_output: whether logits of all buckets lie in
    one place; by default on GPUs. All ranks of a group capture and replay in the same order.
    """

    def __init__(
        self,
        model: PipelineModel,
        storage: KVStorage,
        max_batch_size: int,
        max_length: int,
        capture: Capture,
        buckets: Sequence[int] | None = None,
        max_bytes: int | None = None,
        shares_output: bool | None = None,
    ) -> None:
        self.buckets = list(buckets or buckets_up_to(max_batch_size))
        self._model = model
        self._storage = storage
        self._max_length = max_length
        self._capture = capture
        self._replays: dict[int, Replay] = {}
        self._max_bytes = max_bytes
        width = -(-max_length // storage.page_size)
        self._tokens = torch.zeros(max_batch_size, dtype=torch.int64, device=model.device)
        self._block_tables = torch.full(
            (max_batch_size, width), storage.num_blocks, dtype=torch.int32, device=model.device
        )
        self._cache_lengths = torch.zeros(max_batch_size, dtype=torch.int32, device=model.device)
        self._position_offsets: torch.Tensor | None = None
        if model.takes_images:
            self._position_offsets = torch.zeros(max_batch_size, dtype=torch.int64, device=model.device)
        self._loaded: tuple[RunTables | None, int, int] = (None, 0, 0)
        self._shares_output = model.device.type == "cuda" if shares_output is None else shares_output
        self._output: torch.Tensor | None = None

    def fits(self, tables: RunTables) -> bool:
        """Whether the rows of `tables` can take a step here."""
        num_rows, width = tables.block_tables.shape
        return 0 < num_rows <= len(self._tokens) and width <= self._block_tables.shape[1]

    def capture_all(self) -> None:
        """Captures every bucket now rather than at its first use; largest first, so that the others share its memory.
        No run may be under way."""
        with torch.inference_mode():
            self._forget_rows()
            for bucket in reversed(self.buckets):
                self._replay(bucket)

    def capture(self, bucket: int) -> None:
        """Captures one bucket. No run may be under way."""
        with torch.inference_mode():
            self._forget_rows()
            self._replay(bucket)

    def decode(self, tokens: torch.Tensor, tables: RunTables) -> torch.Tensor:
        """One token a row: tokens int64 [n] on the device -> logits [n, V], valid until the next call.

        `tables` are those of the run; they are advanced by one token. Its rows may have become fewer since the last
        call.
        """
        num_rows = len(tokens)
        bucket = self.buckets[bisect_left(self.buckets, num_rows)]
        self._follow(tables)
        self._tokens[:num_rows].copy_(tokens)
        return self._replay(bucket)[:num_rows]

    def _follow(self, tables: RunTables) -> None:
        """Brings tables and lengths on the device to those of `tables`. A run only ever loses rows: the same number of
        them are the same rows, one token further, unless their tables have grown."""
        num_rows, width = tables.block_tables.shape
        if self._loaded[0] is tables and self._loaded[1:] == (num_rows, tables.num_grown):
            self._cache_lengths[:num_rows].add_(1)
        else:
            self._forget_rows()
            device = self._model.device
            self._block_tables[:num_rows, :width].copy_(upload(tables.block_tables, device))
            self._cache_lengths[:num_rows].copy_(upload(tables.lengths, device))
            if self._position_offsets is not None:
                self._position_offsets[:num_rows].copy_(upload(tables.position_offsets, device))
            self._loaded = (tables, num_rows, tables.num_grown)
        tables.advance()

    def _forget_rows(self) -> None:
        self._block_tables.fill_(self._storage.num_blocks)
        self._cache_lengths.zero_()
        self._tokens.zero_()
        if self._position_offsets is not None:
            self._position_offsets.zero_()
        self._loaded = (None, 0, 0)

    def _replay(self, bucket: int) -> torch.Tensor:
        replay = self._replays.pop(bucket, None)
        if replay is None:
            _LOG.debug("capturing decode steps of %d rows", bucket)
            replay = self._capture(lambda: self._shared(self._step(bucket)))
            self._make_room(replay.nbytes)
        self._replays[bucket] = replay  # now the one used last
        return replay()

    def _shared(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits`, in the memory of a larger bucket's where there is one: only one bucket's are read at a time."""
        if not self._shares_output:
            return logits
        if self._output is None or len(self._output) < len(logits):
            self._output = logits
            return logits
        return self._output[: len(logits)].copy_(logits)

    def _make_room(self, nbytes: int) -> None:
        """Drops the replays that were not used for the longest time."""
        if self._max_bytes is None:
            return
        kept = sum(replay.nbytes for replay in self._replays.values())
        for bucket in list(self._replays):
            if kept + nbytes <= self._max_bytes:
                return
            kept -= self._replays.pop(bucket).nbytes

    def _step(self, num_rows: int) -> torch.Tensor:
        """What is captured: [num_rows, V] logits of the buffers' first rows."""
        lengths, tables = self._cache_lengths[:num_rows], self._block_tables[:num_rows]
        page_size, storage = self._storage.page_size, self._storage
        kv = KVCacheInputs(
            keys=storage.keys,
            values=storage.values,
            block_tables=tables,
            cache_lengths=lengths,
            slot_mapping=kernels.decode_slots(tables, lengths, page_size),
            max_kv_length=self._max_length,
            page_size=page_size,
            position_offsets=None if self._position_offsets is None else self._position_offsets[:num_rows],
        )
        tokens = self._tokens[:num_rows]
        previous = ModelInputs(tokens, lengths, lengths, lengths, kv)  # of which the model reads the cache inputs only
        return self._model.execute(self._model.prepare_next_token_inputs(tokens, previous)).logits


def decode_graphs(
    model: PipelineModel,
    storage: KVStorage,
    max_batch_size: int,
    max_length: int,
    tensor_parallel_size: int = 1,
    cuda_graphs: str = "lazy",
) -> DecodeGraphs | None:
    """What this model's device has. None where decode steps are launched kernel by kernel: for a model that cannot be
    captured, on a CPU without the C++ kernels, and between ranks on CPUs (whose messages are no operations of torch).

    cuda_graphs: of PipelineConfig.
    """
    if not model.decode_is_capturable:
        return None
    shape = (model, storage, max_batch_size, max_length)
    if kernels.is_interpreted():  # a rehearsal: all of a graph's steps but the graph
        return DecodeGraphs(*shape, Replay)
    if model.device.type == "cpu":
        # FP8 is dequantized by its reference implementation: a tape would keep all of it
        dequantizes = model.encoding is SupportedEncoding.float8_e4m3fn
        if tensor_parallel_size > 1 or dequantizes or not kernels.has_native():
            return None
        return DecodeGraphs(*shape, capture_tape, range(1, max_batch_size + 1), _TAPE_BYTES)
    if cuda_graphs == "never" or find_spec("triton") is None:  # torch's own attention asks the device
        return None
    graphs = DecodeGraphs(*shape, CudaCapture(model.device))
    if cuda_graphs == "start":
        graphs.capture_all()
    return graphs


def buckets_up_to(max_batch_size: int) -> list[int]:
    """1, 2, 4, ... up to 32, then every 32nd; `max_batch_size` itself at last."""
    sizes = [1]
    while sizes[-1] < max_batch_size:
        sizes.append(sizes[-1] + min(sizes[-1], _LARGE_STEP))
    return [*(size for size in sizes if size < max_batch_size), max_batch_size]
