"""The Gemma 3 network (Gemma Team 2025), text only: norms before and after each half of a layer, normalised query and
key heads, and layers of two kinds: most see a sliding window, every sixth sees everything and has a rope of its own.

Axes: T new tokens of a ragged batch, N tokens whose logits are wanted, D hidden size, R rotated width, V vocabulary.
"""

from __future__ import annotations

import torch

from architectures.gemma3.model_config import Gemma3Config
from max_ray.distributed import TPGroup
from max_ray.nn import (
    Attention,
    ForwardBatch,
    GatedMLP,
    Module,
    ParallelLMHead,
    RotaryEmbedding,
    VocabParallelEmbedding,
)
from max_ray.nn.activation import gated


class Gemma3RMSNorm(Module):
    """x / rms(x) * (1 + weight) over the last axis, in float32 up to the end; whole on every rank."""

    weight: torch.Tensor

    def __init__(self, dim: int, eps: float, dtype: torch.dtype, tp: TPGroup) -> None:
        self._eps = eps
        self.add_parameter("weight", torch.zeros(dim, dtype=dtype, device=tp.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_f32 = x.float()
        normed = x_f32 * torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + self._eps)
        return (normed * (1.0 + self.weight.float())).to(x.dtype)


class Gemma3Block(Module):
    """One transformer layer with norms before and after its attention and its feed-forward half."""

    def __init__(self, config: Gemma3Config, layer_index: int, tp: TPGroup, dtype: torch.dtype) -> None:
        def norm(dim: int) -> Gemma3RMSNorm:
            return Gemma3RMSNorm(dim, config.rms_norm_eps, dtype, tp)

        dim = config.hidden_size
        self.is_global = config.windows[layer_index] is None
        self.attention_norm = norm(dim)
        self.attention = Attention(
            dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            layer_index,
            tp,
            bias=config.attention_bias,
            scale=config.attention_scale,
            q_norm=norm(config.head_dim),
            k_norm=norm(config.head_dim),
            sliding_window=config.windows[layer_index],
            dtype=dtype,
        )
        self.attention_out_norm = norm(dim)
        self.mlp_norm = norm(dim)
        self.mlp = GatedMLP(dim, config.intermediate_size, tp, gate=gated(config.activation), dtype=dtype)
        self.mlp_out_norm = norm(dim)

    def forward(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """x [T, D] -> [T, D]. The batch's rotation is that of this kind of layer."""
        x = x + self.attention_out_norm(self.attention(self.attention_norm(x), batch))
        x = x + self.mlp_out_norm(self.mlp(self.mlp_norm(x)))
        return x


class Gemma3(Module):
    """Token ids in, logits out. Weights are uninitialised until loaded."""

    def __init__(self, config: Gemma3Config, max_length: int, tp: TPGroup, dtype: torch.dtype) -> None:
        dim = config.hidden_size
        self._embedding_scale = float(torch.tensor(dim**0.5).to(dtype))  # rounded as Hugging Face rounds it
        self._logit_softcap = config.logit_softcap
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, dim, tp, dtype=dtype)
        self.layers = [Gemma3Block(config, i, tp, dtype) for i in range(config.num_layers)]
        self.norm = Gemma3RMSNorm(dim, config.rms_norm_eps, dtype, tp)
        tied_to = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, dim, tp, tied_to=tied_to, dtype=dtype)
        self.local_rotary = RotaryEmbedding(config.rope, max_length, dtype=dtype, device=tp.device)
        self.global_rotary = RotaryEmbedding(config.global_rope, max_length, dtype=dtype, device=tp.device)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits [N, V]; the new keys and values go into `batch.kv`."""
        local_batch = batch.rotated(self.local_rotary(batch.positions))
        global_batch = batch.rotated(self.global_rotary(batch.positions))
        x = self.embed_tokens(batch.tokens) * self._embedding_scale  # [T, D]
        for layer in self.layers:
            x = layer(x, global_batch if layer.is_global else local_batch)
        logits: torch.Tensor = self.lm_head(self.norm(x[batch.logit_indices]))
        if self._logit_softcap is not None:
            logits = torch.tanh(logits / self._logit_softcap) * self._logit_softcap
        return logits
