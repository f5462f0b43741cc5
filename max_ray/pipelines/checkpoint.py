"""A model's checkpoint as an encoding wants it: opened, and seen through what dequantizes or quantizes it."""

from __future__ import annotations

from pathlib import Path

from max_ray.huggingface import HuggingFaceConfig
from max_ray.interfaces import SupportedEncoding, WeightsFormat
from max_ray.pipelines.encoding import DEQUANTIZED_METHOD, stored_encoding
from max_ray.weights import WeightSource, open_weights


def open_checkpoint(
    path: Path, weights_format: WeightsFormat, hf_config: HuggingFaceConfig, encoding: SupportedEncoding
) -> WeightSource:
    """Reads headers only. A quantized encoding keeps quantized tensors so, or quantizes plain ones as they are read; a
    plain one dequantizes. Raises ModelPathError, WeightsError, ConfigError (a scheme that is not read)."""
    source = open_weights(path, weights_format, keep_quantized=encoding.is_quantized)
    quantization = hf_config.get("quantization_config")
    if quantization is not None and quantization.get("quant_method") == DEQUANTIZED_METHOD:
        from max_ray.weights.mxfp4_checkpoint import Mxfp4Checkpoint

        source = Mxfp4Checkpoint(source)
    elif quantization is not None:
        from max_ray.weights.quantization_scheme import Schemes
        from max_ray.weights.quantized_checkpoint import QuantizedCheckpoint

        schemes = Schemes.read(quantization, quantization.place)
        return QuantizedCheckpoint(source, schemes, keep_quantized=encoding.is_quantized)
    stored = stored_encoding(hf_config)
    if encoding.is_quantized and not (stored is not None and stored.is_quantized):
        from max_ray.weights.quantize import QuantizingSource

        return QuantizingSource(source, encoding.value)
    return source
