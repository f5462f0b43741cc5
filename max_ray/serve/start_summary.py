"""What `max-ray serve` says of a model before it loads: a few lines, with the flags that change them."""

from __future__ import annotations

from max_ray.planning.memory_plan import size_text
from max_ray.planning.plan import PipelinePlan


def start_summary(plan: PipelinePlan) -> str:
    """Lines about what is loaded, the memory of a worker group, and how many requests run at once."""
    memory, ranks = plan.memory, plan.tensor_parallel_size
    where = "the CPU" if plan.device == "cpu" else f"{ranks} GPU{'s' if ranks > 1 else ''}"
    return "\n".join(
        [
            f"Loading {plan.config.served_model_name}: {plan.architecture} in {plan.encoding.value} on {where}, "
            f"from {plan.model_dir}",
            f"  memory:   {_memory(plan)}",
            f"  requests: {memory.max_batch_size} at once (--max-batch-size), up to {memory.max_length} tokens each "
            f"(--max-length)",
        ]
    )


def _memory(plan: PipelinePlan) -> str:
    memory, ranks = plan.memory, plan.tensor_parallel_size
    weights, rest = size_text(memory.weights * ranks), size_text((memory.activations + memory.runtime) * ranks)
    if not memory.has_cache:
        return f"{size_text(memory.total * ranks)} (weights {weights}, the rest {rest})"
    if plan.num_blocks is None:
        return f"weights {weights}; KV cache: what a GPU has left (--kv-cache-memory, --device-memory-utilization)"
    tokens = memory.num_blocks * memory.page_size
    cache = f"KV cache {size_text(memory.kv_cache * ranks)} for {tokens} tokens (--kv-cache-memory)"
    return f"{size_text(memory.total * ranks)} (weights {weights}, {cache}, the rest {rest})"
