"""Which encoding a model runs in: what was asked for, what the checkpoint is in, what the family can do."""

from __future__ import annotations

from collections.abc import Iterable

from max_ray.config import PipelineConfig
from max_ray.errors import ConfigError, EncodingNotSupportedError
from max_ray.huggingface import HuggingFaceConfig
from max_ray.interfaces import SupportedEncoding
from max_ray.registry import SupportedArchitecture
from max_ray.weights.quantization_scheme import METHODS, Schemes

_QUANTIZED_WHILE_READ = (
    SupportedEncoding.q8_0,
    SupportedEncoding.q6_k,
    SupportedEncoding.q5_k,
    SupportedEncoding.q4_k,
    SupportedEncoding.q4_1,
    SupportedEncoding.q4_0,
)

_OF_SCHEME = {
    "fp8": SupportedEncoding.float8_e4m3fn,
    "gptq": SupportedEncoding.gptq,
    "awq": SupportedEncoding.awq,
    "int4": SupportedEncoding.gptq,
    "int8": SupportedEncoding.q8_0,
}
"""Packed integers of compressed-tensors, and GPTQ of 8 bits, go by the name of an encoding that is held and executed
alike."""

DEQUANTIZED_METHOD = "mxfp4"
"""The `quant_method` of checkpoints that count as plain ones: they are dequantized while they are read."""


def choose_encoding(
    config: PipelineConfig, architecture: SupportedArchitecture, hf_config: HuggingFaceConfig, origins: dict[str, str]
) -> SupportedEncoding:
    """The encoding, and in `origins` where it came from. Raises EncodingNotSupportedError that says which would work.

    A quantized checkpoint runs as it is, or dequantized in one of the plain encodings.
    """
    stored = stored_encoding(hf_config)
    wanted = config.quantization_encoding
    usable = usable_encodings(architecture, stored)
    if wanted is not None:
        if wanted not in usable:
            raise EncodingNotSupportedError(_refusal(architecture, wanted, stored, usable))
        origins["quantization_encoding"] = "given"
        return wanted
    if stored is not None and stored in usable:
        origins["quantization_encoding"] = (
            "model: dtype in config.json" if not stored.is_quantized else "model: its weights"
        )
        return stored
    if stored is not None and stored.is_quantized:
        raise EncodingNotSupportedError(
            f"The checkpoint is in {stored.value}, which {architecture.name} does not support. Set "
            f"--quantization-encoding to one of {_names(usable)}, which dequantizes it."
        )
    origins["quantization_encoding"] = "default of the architecture"
    return architecture.default_encoding


def usable_encodings(architecture: SupportedArchitecture, stored: SupportedEncoding | None) -> list[SupportedEncoding]:
    """Those of the family's encodings that this checkpoint can be run in: its own, plain ones, and for a plain
    checkpoint those that weights are quantized to while they are read."""
    is_plain = stored is None or not stored.is_quantized
    return [
        e
        for e in architecture.supported_encodings
        if not e.is_quantized or e is stored or (is_plain and e in _QUANTIZED_WHILE_READ)
    ]


def stored_encoding(hf_config: HuggingFaceConfig) -> SupportedEncoding | None:
    """What the weights are in, as config.json (or the header of a GGUF file) says it; None where it does not."""
    quantization = hf_config.get("quantization_config")
    if quantization is not None and quantization.get("quant_method") != DEQUANTIZED_METHOD:
        return _of_method(quantization)
    parts = (hf_config, hf_config.text_part)
    stored = str(next((p[name] for p in parts for name in ("dtype", "torch_dtype") if p.get(name)), ""))
    return SupportedEncoding(stored) if stored in SupportedEncoding.__members__ else None


def _of_method(quantization: HuggingFaceConfig) -> SupportedEncoding:
    """Raises ConfigError for methods and schemes that are not read. Where layers differ, the encoding is that of the
    fewest bits."""
    method = quantization.get("quant_method")
    if method not in METHODS:
        raise ConfigError(
            f"{quantization.place} has quant_method={method!r}; those that can be read: "
            f"{', '.join([*METHODS, DEQUANTIZED_METHOD])}."
        )
    scheme = Schemes.read(quantization, quantization.place).all()[0]
    return SupportedEncoding.q8_0 if scheme.method == "gptq" and scheme.bits == 8 else _OF_SCHEME[scheme.method]


def _refusal(
    architecture: SupportedArchitecture,
    wanted: SupportedEncoding,
    stored: SupportedEncoding | None,
    usable: Iterable[SupportedEncoding],
) -> str:
    if wanted not in architecture.supported_encodings:
        return (
            f"{architecture.name} does not support quantization_encoding={wanted.value}. "
            f"It supports: {_names(architecture.supported_encodings)}."
        )
    found = f"in {stored.value}" if stored is not None else "not in it"
    return (
        f"quantization_encoding={wanted.value} needs a checkpoint in that encoding, and this one is {found}. "
        f"Encodings that work with it: {_names(usable)}."
    )


def _names(encodings: Iterable[SupportedEncoding]) -> str:
    return ", ".join(sorted(encoding.value for encoding in encodings))
