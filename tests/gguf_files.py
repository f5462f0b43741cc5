"""GGUF files made on the fly from the tiny Llamas of `tests/checkpoints.py`, with the `gguf` package's writer.

Rows of queries and keys are reordered as llama.cpp's converter does it. `reference_folder` writes the same weights,
dequantized by the `gguf` package, as a Hugging Face checkpoint: what the file must be equal to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from max_ray.weights.quantize import quantize
from max_ray.weights.quantized import QuantizedRows
from tests.checkpoints import CHAT_TEMPLATE, SPECIAL_TOKENS, make_llama, make_tokenizer

K_SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
"""Overrides of make_llama for encodings whose blocks are 256 wide."""
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
Array = npt.NDArray[Any]


def write(path: Path, tensors: dict[str, tuple[str, torch.Tensor]], **keys: int | str) -> Path:
    """Some tensors by name, each in the type given with it. keys: metadata, `__` for a dot."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key.replace("__", "."), value)
    for name, (kind, data) in tensors.items():
        blocks = data.numpy() if data.dtype == torch.uint8 else encoded(data, kind)
        writer.add_tensor(name, blocks, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_gguf(
    path: Path, types: dict[str, str], *, default: str = "F32", tokenizer: bool = True, **overrides: Any
) -> Path:
    """Writes `path` and gives it. types: part of a GGUF tensor name -> type of the matrices whose name contains it."""
    folder = make_llama(path.parent / f"{path.stem}-hf", **overrides)
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    _write_keys(writer, config)
    if tokenizer:
        _write_tokenizer(writer)
    for name, tensor in load_file(folder / "model.safetensors").items():
        own = gguf_name(name)
        kind = next((t for part, t in types.items() if part in own), default) if tensor.dim() > 1 else "F32"
        data = reordered(tensor, own, config).float().contiguous()
        writer.add_tensor(own, encoded(data, kind), raw_dtype=Type[kind])
    if (config.get("rope_parameters") or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reference_folder(path: Path) -> Path:
    """The Hugging Face folder that `make_gguf` left beside `path`, with the file's weights, dequantized to float32."""
    folder = path.parent / f"{path.stem}-hf"
    config = json.loads((folder / "config.json").read_text())
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    names = {name: gguf_name(name) for name in load_file(folder / "model.safetensors")}
    tensors = {
        name: reordered(torch.from_numpy(np.array(stored[own], dtype=np.float32)), own, config, back=True).contiguous()
        for name, own in names.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.{kind}"


def reordered(tensor: torch.Tensor, name: str, config: dict[str, Any], *, back: bool = False) -> torch.Tensor:
    """llama.cpp's `permute` of the rows of queries and keys, or its inverse."""
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    half = tensor.shape[0] // config[heads] // 2
    shape = (config[heads], half, 2) if back else (config[heads], 2, half)
    return tensor.unflatten(0, shape).transpose(1, 2).flatten(0, 2)


def encoded(data: torch.Tensor, kind: str) -> Array:
    """float32 -> the array that the writer wants for this type."""
    if kind in ("F32", "F16"):
        return data.numpy().astype(np.float32 if kind == "F32" else np.float16)
    if kind in ("Q4_K", "Q5_K", "Q6_K"):
        return blocks_of(quantize(kind.lower(), data)).numpy()
    return np.asarray(gguf.quants.quantize(data.numpy(), Type[kind]))


def blocks_of(rows: QuantizedRows) -> torch.Tensor:
    """Codes and scales -> Q4_K, Q5_K or Q6_K blocks, uint8 [R, bytes a row]; the inverse of `gguf_blocks.unpack`."""
    assert rows.super_scales is not None
    codes = rows.codes.unflatten(-1, (-1, 256))
    scales = rows.scales.unflatten(-1, (-1, 256 // rows.group_size))
    d = _bytes(rows.super_scales)
    if rows.kind == "q6_k":
        halves = codes.unflatten(-1, (2, 4, 32))
        low = torch.cat([halves[..., i, :] & 15 | (halves[..., i + 2, :] & 15) << 4 for i in (0, 1)], dim=-1)
        high = sum((halves[..., i, :] >> 4) << 2 * i for i in range(4))
        assert isinstance(high, torch.Tensor)
        return torch.cat([low.flatten(-2), high.flatten(-2), scales.view(torch.uint8), d], dim=-1).flatten(1)
    assert rows.mins is not None
    assert rows.super_mins is not None
    mins = rows.mins.unflatten(-1, (-1, 8))
    first = torch.cat([scales[..., :4] | scales[..., 4:] >> 4 << 6, mins[..., :4] | mins[..., 4:] >> 4 << 6], dim=-1)
    packed = torch.cat([first, scales[..., 4:] & 15 | (mins[..., 4:] & 15) << 4], dim=-1)
    pairs = codes.unflatten(-1, (4, 2, 32))
    nibbles = (pairs[..., 0, :] & 15 | pairs[..., 1, :] << 4).flatten(-2)
    bits = (codes.unflatten(-1, (8, 32)) >> 4 << torch.arange(8, dtype=torch.uint8).view(8, 1)).sum(-2).byte()
    high = [bits] if rows.kind == "q5_k" else []
    return torch.cat([d, _bytes(rows.super_mins), packed, *high, nibbles], dim=-1).flatten(1)


def _bytes(half: torch.Tensor) -> torch.Tensor:
    return half.contiguous().unsqueeze(-1).view(torch.uint8)


def _write_keys(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base((config.get("rope_parameters") or {}).get("rope_theta", 10000.0))


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    vocabulary = make_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def _rope_factors(config: dict[str, Any]) -> Array:
    """As llama.cpp's converter computes them: by what each inverse frequency is divided."""
    rope = config["rope_parameters"]
    dim = config["hidden_size"] // config["num_attention_heads"]
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    original, low, high = (
        rope["original_max_position_embeddings"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
    )
    smooth = (original / wavelengths - low) / (high - low)
    factors = np.where(
        wavelengths < original / high,
        1.0,
        np.where(wavelengths > original / low, rope["factor"], 1 / ((1 - smooth) / rope["factor"] + smooth)),
    )
    return factors.astype(np.float32)
