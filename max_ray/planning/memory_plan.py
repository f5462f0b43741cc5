"""MemoryPlan: where a rank's memory will go, decided from config.json and the headers of the weights alone.

    | part        | how it is known                                                                             |
    |-------------|---------------------------------------------------------------------------------------------|
    | weights     | headers of the checkpoint (`weight_sizes`)                                                    |
    | KV cache    | what is left, at most what the batch can use; on a CPU also at most a share of the machine,    |
    |             | and `CPU_CACHED_LENGTH` tokens a request of the batch (or one request of `max_length`)          |
    | activations | an estimate: the widest moment of a step of `max_batch_input_tokens`                           |
    | runtime     | an estimate: torch, its libraries, a device context                                           |

A rank's *capacity* is its share of the machine's memory (or of the container's limit), or what is free on its GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from max_ray.config import PipelineConfig
from max_ray.huggingface import HuggingFaceConfig
from max_ray.interfaces import KVCacheParams
from max_ray.planning.hardware import GIB, Hardware
from max_ray.planning.weight_sizes import WeightSizes

CPU_CAPACITY_SHARE = 0.9
CPU_CACHE_SHARE = 0.25
CPU_CACHED_LENGTH = 1024
"""Tokens of each request of a batch for which a CPU's cache has room by default: more is for those who ask for it."""
RUNTIME_BYTES = {"cpu": 400 * 1024**2, "cuda": 700 * 1024**2}
SHORT_LENGTH = 2048
_FLOAT32 = 4


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes are of one rank; all ranks are alike. `capacity` is None where a GPU's memory cannot be seen from here.

    num_blocks: of the KV cache; on a GPU an estimate, as the workers measure what is left after loading.
    cache_origin: what bounds the KV cache.
    """

    device: str
    num_ranks: int
    capacity: int | None
    capacity_origin: str
    weights: int
    weight_groups: dict[str, int]
    activations: int
    runtime: int
    kv_bytes_per_token: int
    page_size: int
    num_blocks: int
    max_length: int
    max_batch_size: int
    cache_origin: str = ""

    @property
    def fixed(self) -> int:
        """All but the KV cache."""
        return self.weights + self.activations + self.runtime

    @property
    def has_cache(self) -> bool:
        """Whether keys and values are kept (not for embeddings)."""
        return self.kv_bytes_per_token > 0

    @property
    def kv_cache(self) -> int:
        return self.num_blocks * self.page_size * self.kv_bytes_per_token

    @property
    def total(self) -> int:
        return self.fixed + self.kv_cache

    @property
    def shortage(self) -> int:
        """Bytes missing for one request of `max_length`; 0 where it fits."""
        if self.capacity is None:
            return 0
        blocks = max(self.num_blocks, self.blocks_a_request(self.max_length))
        return max(0, self.fixed + blocks * self.page_size * self.kv_bytes_per_token - self.capacity)

    @property
    def longest(self) -> int:
        """Tokens that one request may have at most in this memory; 0 where not even a block fits."""
        left = max(0, (self.capacity or 0) - self.fixed)
        if not self.has_cache:
            return self.max_length
        return left // (self.page_size * self.kv_bytes_per_token) * self.page_size

    def blocks_a_request(self, length: int) -> int:
        return -(-length // self.page_size)

    def requests_at_once(self, length: int) -> int:
        """Requests of `length` tokens that run side by side: by blocks, and by max_batch_size."""
        if not self.has_cache:
            return self.max_batch_size
        return min(self.max_batch_size, self.num_blocks // self.blocks_a_request(length))

    def to_json(self) -> dict[str, Any]:
        """The fields and what follows from them."""
        names = ("fixed", "kv_cache", "total", "shortage")
        lengths = {str(n): self.requests_at_once(n) for n in self._lengths()}
        return asdict(self) | {name: getattr(self, name) for name in names} | {"requests_at_once": lengths}

    def rows(self) -> list[list[str]]:
        """The plan as a table: what, one rank, all ranks, how it is known."""
        groups = ", ".join(f"{name} {size_text(size)}" for name, size in self.weight_groups.items())
        blocks = f"{self.num_blocks} blocks of {self.page_size} tokens, {self.kv_bytes_per_token} bytes a token"
        blocks += f": {self.cache_origin}" if self.cache_origin else ""
        blocks = blocks if self.has_cache else "none: a text is embedded in one step"
        sizes: list[tuple[str, int, str]] = [
            ("weights", self.weights, groups),
            ("KV cache", self.kv_cache, blocks),
            ("activations", self.activations, "estimate"),
            ("runtime", self.runtime, "estimate: torch and its libraries"),
            ("sum", self.total, ""),
        ]
        if self.capacity is not None:
            sizes.append(("capacity", self.capacity, self.capacity_origin))
        return [[name, size_text(size), size_text(size * self.num_ranks), note] for name, size, note in sizes]

    def text(self) -> str:
        """The table, where the ranks are, and how many requests run at once."""
        head = ["", "a rank", f"{self.num_ranks} rank{'s' if self.num_ranks > 1 else ''}", ""]
        table = aligned([head, *self.rows()])
        where = f"all on the {self.device}" if self.device == "cpu" else "one GPU each"
        counts = ", ".join(f"{self.requests_at_once(n)} of {n} tokens" for n in self._lengths())
        return f"{table}\nranks: {self.num_ranks}, {where}; requests at once: {counts}"

    def _lengths(self) -> list[int]:
        return sorted({self.max_length, min(SHORT_LENGTH, self.max_length)}, reverse=True)


def plan_memory(
    config: PipelineConfig,
    hf_config: HuggingFaceConfig,
    params: KVCacheParams,
    weights: WeightSizes,
    device: str,
    hardware: Hardware,
    max_length: int,
    max_batch_size: int,
) -> MemoryPlan:
    """The plan for one request of `max_length` at least. It may not fit: see `shortage`."""
    capacity, origin = _capacity(config, device, hardware)
    plan = MemoryPlan(
        device=device,
        num_ranks=config.tensor_parallel_size,
        capacity=capacity,
        capacity_origin=origin,
        weights=weights.total,
        weight_groups=dict(weights.groups),
        activations=activation_bytes(config, hf_config, params, max_batch_size, max_length, device),
        runtime=RUNTIME_BYTES[device],
        kv_bytes_per_token=params.bytes_per_token,
        page_size=params.page_size,
        num_blocks=0,
        max_length=max_length,
        max_batch_size=max_batch_size,
    )
    return with_blocks(plan, *_cache_budget(config, plan, hardware))


def with_blocks(plan: MemoryPlan, budget: int, origin: str) -> MemoryPlan:
    """The plan with as many blocks as `budget` bytes hold, at most what a whole batch can use.

    Args:
        plan: Without blocks.
        budget: Bytes of one rank.
        origin: Where the budget is from.
    """
    if not plan.has_cache:
        return plan
    fits = budget // (plan.page_size * plan.kv_bytes_per_token)
    wanted = plan.blocks_a_request(plan.max_length) * plan.max_batch_size
    if wanted <= fits:
        origin = f"all that a batch can use: {_requests(plan.max_batch_size, plan.max_length)}"
    return replace(plan, num_blocks=min(fits, wanted), cache_origin=origin)


def _cache_budget(config: PipelineConfig, plan: MemoryPlan, hardware: Hardware) -> tuple[int, str]:
    """(bytes for one rank's KV cache, where that number is from)."""
    if config.kv_cache_memory is not None:
        return int(config.kv_cache_memory * GIB), f"kv_cache_memory={config.kv_cache_memory} GiB a rank"
    left = None if plan.capacity is None else max(0, plan.capacity - plan.fixed)
    one_request = plan.blocks_a_request(plan.max_length) * plan.page_size * plan.kv_bytes_per_token
    if plan.device == "cuda":
        return one_request if left is None else left, "hardware: device memory left after loading"
    assert left is not None, "the memory of this machine is known"
    bounds = [
        (left, "hardware: the memory that the rest leaves"),
        _cpu_cache_share(config, plan, hardware, one_request),
        *_usual_batch(config, plan),
    ]
    return min(bounds)


def _cpu_cache_share(config: PipelineConfig, plan: MemoryPlan, hardware: Hardware, one_request: int) -> tuple[int, str]:
    """The share of the machine; a length that was asked for may take more than that."""
    share = int(hardware.memory_bytes * CPU_CACHE_SHARE) // plan.num_ranks
    if config.max_length is not None and one_request > share:
        return one_request, f"given: {_requests(1, plan.max_length)}"
    return share, f"hardware: {CPU_CACHE_SHARE:.0%} of {hardware.memory_bytes / GIB:.1f} GiB at most"


def _usual_batch(config: PipelineConfig, plan: MemoryPlan) -> list[tuple[int, str]]:
    """What requests of usual length use, or one of `max_length`; no bound where batch and length were both given."""
    if config.max_batch_size is not None and config.max_length is not None:
        return []
    length = min(CPU_CACHED_LENGTH, plan.max_length)
    block_bytes = plan.page_size * plan.kv_bytes_per_token
    usual = plan.max_batch_size * plan.blocks_a_request(length) * block_bytes
    one = plan.blocks_a_request(plan.max_length) * block_bytes
    requests = _requests(1, plan.max_length) if one > usual else _requests(plan.max_batch_size, length)
    return [(max(usual, one), f"default: {requests} (--kv-cache-memory changes it)")]


def _requests(count: int, length: int) -> str:
    return f"{count} request{'s' if count > 1 else ''} of {length} tokens"


def _capacity(config: PipelineConfig, device: str, hardware: Hardware) -> tuple[int | None, str]:
    """(bytes that one rank may use, where that number is from)."""
    if device == "cpu":
        usable = int(hardware.memory_bytes * CPU_CAPACITY_SHARE)
        origin = f"{CPU_CAPACITY_SHARE:.0%} of this machine's {size_text(hardware.memory_bytes)}"
        return usable // config.tensor_parallel_size, origin
    if not hardware.gpu_memory:
        return None, ""
    chosen = config.device_choice.ids or range(len(hardware.gpu_memory))
    devices = [hardware.gpu_memory[i] for i in chosen if i < len(hardware.gpu_memory)]
    usable_of = sorted(
        (gpu.free - int(gpu.total * (1 - config.device_memory_utilization)) for gpu in devices), reverse=True
    )
    last = min(config.tensor_parallel_size, len(usable_of)) - 1  # Ray lends any GPUs: refuse only what fits on none
    taken = max((gpu.total - gpu.free for gpu in devices), default=0)
    origin = (
        f"device_memory_utilization={config.device_memory_utilization:g}; others hold up to {size_text(taken)} of a GPU"
    )
    return max(0, usable_of[last]), origin


def activation_bytes(
    config: PipelineConfig,
    hf_config: HuggingFaceConfig,
    params: KVCacheParams,
    max_batch_size: int,
    max_length: int,
    device: str = "cpu",
) -> int:
    """An estimate of the widest moment of a step: hidden states beside one layer's widest product, or the logits; on a
    GPU, whose memory is all given away at the start, those of every token, as a request with `echo` wants them.
    Without a cache (embeddings) a text of `max_length` runs whole, and there are no logits."""
    ranks, item = config.tensor_parallel_size, {"float32": 4}.get(params.dtype, 2)
    hidden, width, vocabulary = (_number(hf_config, n) for n in ("hidden_size", "intermediate_size", "vocab_size"))
    heads = _number(hf_config, "num_attention_heads")
    tokens = config.max_batch_input_tokens
    if not params.has_cache:
        tokens, vocabulary = max(tokens, max_length), 0
    attention = (2 * heads // ranks + 2 * params.num_kv_heads) * params.head_dim
    layer = tokens * item * (3 * hidden + max(attention, 3 * width // ranks))
    sampled = min(tokens, max_batch_size) * vocabulary * (item + 2 * _FLOAT32)  # and two float32 copies of the sampler
    echoed = tokens * vocabulary * (item + _FLOAT32) if device == "cuda" else 0  # and a float32 copy
    logits = max(sampled, echoed)
    return max(layer, tokens * item * hidden + logits)


def _number(hf_config: HuggingFaceConfig, name: str) -> int:
    value = hf_config.text_part.get(name)
    return value if isinstance(value, int) else 0


def aligned(rows: Iterable[list[str]]) -> str:
    """Cells as columns of equal width."""
    table = list(rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table)


def size_text(count: int) -> str:
    """Bytes in MiB or GiB, rounded down."""
    if count < GIB // 10:
        return f"{count / 1024**2:.1f} MiB"
    return f"{math.floor(count / GIB * 100) / 100:.2f} GiB"
