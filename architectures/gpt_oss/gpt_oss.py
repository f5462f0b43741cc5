"""The gpt-oss network (OpenAI 2025): attention with sinks, every other layer in a sliding window, and mixtures of
experts with a clamped activation and biases.

Axes: T new tokens of a ragged batch, D hidden size, E experts, K experts a token, F width of one expert, M = T * K
choices.
"""

from __future__ import annotations

import torch

from architectures.gpt_oss.model_config import GptOssConfig
from max_ray import kernels
from max_ray.distributed import TPGroup, all_reduce
from max_ray.nn import (
    Attention,
    Linear,
    Module,
    Transformer,
    TransformerBlock,
    grouped_matmul,
    grouped_matmul_waits,
    run_by_expert,
    softmax_top_k,
)
from max_ray.nn.linear import LayerWeight, Packable, shard_range
from max_ray.weights.parameter import PartSpec

Matrices = torch.Tensor | list[LayerWeight]  # of all experts: [E, in, out], or packed ones of shape [out, in]


class GptOssExperts(Packable):
    """All experts of a layer; weights are [E, in, out] as in a checkpoint, gate and up columns alternating. On a CPU
    with the C++ kernels each matrix of float32 is packed: torch's sums of float32 depend on the number of rows. (Those
    of halves do not, and its products of long prompts are several times faster.)"""

    gate_up: Matrices
    gate_up_bias: torch.Tensor
    down: Matrices
    down_bias: torch.Tensor

    def __init__(self, config: GptOssConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        self._config = config
        self._tp = tp
        experts, dim, width = config.num_experts, config.hidden_size, config.intermediate_size
        cut = shard_range(width, tp)
        start, stop = 2 * cut.start, 2 * cut.stop

        def add(name: str, shape: tuple[int, ...], spec: PartSpec) -> None:
            self.add_parameter(name, torch.empty(shape, dtype=dtype, device=tp.device), {"": spec})

        add("gate_up", (experts, dim, stop - start), PartSpec((experts, dim, 2 * width), 2, start, stop, 0))
        add("gate_up_bias", (experts, stop - start), PartSpec((experts, 2 * width), 1, start, stop, 0))
        add("down", (experts, len(cut), dim), PartSpec((experts, width, dim), 1, cut.start, cut.stop, 0))
        add("down_bias", (experts, dim), PartSpec.whole((experts, dim)))

    @property
    def waits_for_device(self) -> bool:
        """Whether a forward pass asks the device how many tokens each expert got."""
        stacks = (self.gate_up, self.down)
        return any(isinstance(weights, list) or grouped_matmul_waits(weights) for weights in stacks)

    def pack(self) -> bool:
        """See Packable. One stack of matrices is there twice meanwhile."""
        return all([self._pack("gate_up"), self._pack("down")])

    def _pack(self, name: str) -> bool:
        """Whether the matrices of this name are packed now."""
        plain = self.__dict__[name]
        is_packable = isinstance(plain, torch.Tensor) and plain.dtype == torch.float32
        packed = [kernels.pack_weight(weight.T) for weight in plain] if is_packable else []
        known = [weight for weight in packed if weight is not None]
        if not known:
            return False
        self.drop_parameter(name)
        self.__dict__[name] = known
        return True

    def forward(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """x [T, D], weights and experts [T, K] -> [T, D], summed over the ranks."""
        return all_reduce(run_by_expert(x, weights, experts, self._config.num_experts, self._run), self._tp)

    def _run(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """x [M, D] sorted by expert -> [M, D]: this rank's summand; the bias after the sum is rank 0's."""
        ends = counts.cumsum(0).to(torch.int32)
        expert_of_row = torch.searchsorted(ends, torch.arange(len(x), dtype=torch.int32, device=x.device), right=True)
        gate_up = _multiply(x, self.gate_up, ends) + self.gate_up_bias[expert_of_row]
        y = _multiply(self._gated(gate_up), self.down, ends)
        return y + self.down_bias[expert_of_row] if self._tp.rank == 0 else y

    def _gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """(up + 1) * gate * sigmoid(alpha * gate), of numbers clamped to the limit."""
        limit = self._config.gate_limit
        gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(gate * self._config.gate_alpha)


def _multiply(x: torch.Tensor, matrices: Matrices, ends: torch.Tensor) -> torch.Tensor:
    """See grouped_matmul."""
    if isinstance(matrices, torch.Tensor):
        return grouped_matmul(x, matrices, ends)
    out = x.new_empty(len(x), matrices[0].shape[0])
    start = 0
    for matrix, end in zip(matrices, ends.tolist(), strict=True):
        if start < end:
            out[start:end] = matrix.linear(x[start:end], None)
        start = end
    return out


class GptOssMoE(Module):
    """Each token goes to the experts that its router ranks highest: [T, D] -> [T, D]."""

    def __init__(self, config: GptOssConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        self._top_k = config.num_experts_per_token
        self.router = Linear(config.hidden_size, config.num_experts, dtype=dtype, device=tp.device)
        self.experts = GptOssExperts(config, tp, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.experts(x, *softmax_top_k(self.router(x), self._top_k, renormalize=True))
        return y


class GptOssBlock(TransformerBlock):
    """One layer: see TransformerBlock."""

    def __init__(self, config: GptOssConfig, layer_index: int, tp: TPGroup, dtype: torch.dtype) -> None:
        dim = config.hidden_size
        attention = Attention(
            dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            layer_index,
            tp,
            bias=config.attention_bias,
            sinks=True,
            sliding_window=config.windows[layer_index],
            dtype=dtype,
        )
        mlp = GptOssMoE(config, tp, dtype)
        super().__init__(config, attention, mlp, tp, dtype)


class GptOss(Transformer):
    """Token ids in, logits out: see Transformer."""

    def __init__(self, config: GptOssConfig, max_length: int, tp: TPGroup, dtype: torch.dtype) -> None:
        layers = [GptOssBlock(config, i, tp, dtype) for i in range(config.num_layers)]
        super().__init__(config, layers, max_length, tp, dtype)
