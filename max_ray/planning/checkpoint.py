"""A model's checkpoint as an encoding wants it: opened, and seen through what dequantizes or quantizes it."""

from __future__ import annotations

from pathlib import Path

from max_ray.huggingface import HuggingFaceConfig
from max_ray.interfaces import SupportedEncoding, WeightsFormat
from max_ray.planning.encoding import DEQUANTIZED_METHOD, stored_encoding
from max_ray.weights import WeightSource, open_weights
from max_ray.weights.text_part import TextPart

TEXT_PART_OF = "text_part_of"
"""Key of a text network's config.json: the class of the multimodal model whose checkpoint it is."""


def open_checkpoint(
    path: Path, weights_format: WeightsFormat, hf_config: HuggingFaceConfig, encoding: SupportedEncoding
) -> WeightSource:
    """Reads headers only. Of a multimodal model whose text network is served, that network's tensors. A quantized
    encoding keeps quantized tensors so, or quantizes plain ones as they are read; a plain one dequantizes.
    Raises ModelPathError, WeightsError, ConfigError (a scheme that is not read)."""
    source = open_weights(path, weights_format, keep_quantized=encoding.is_quantized)
    quantization = hf_config.get("quantization_config")
    if quantization is not None and quantization.get("quant_method") == DEQUANTIZED_METHOD:
        from max_ray.weights.mxfp4_checkpoint import Mxfp4Checkpoint

        source = Mxfp4Checkpoint(source)
    elif quantization is not None:
        from max_ray.weights.quantization_scheme import Schemes
        from max_ray.weights.quantized_checkpoint import QuantizedCheckpoint

        schemes = Schemes.read(quantization, quantization.place)
        quantized = QuantizedCheckpoint(source, schemes, keep_quantized=encoding.is_quantized)
        return _served_part(quantized, hf_config)
    source = _served_part(source, hf_config)
    stored = stored_encoding(hf_config)
    if encoding.is_quantized and not (stored is not None and stored.is_quantized):
        from max_ray.weights.quantize import QuantizingSource

        return QuantizingSource(source, encoding.value)
    return source


def _served_part(source: WeightSource, hf_config: HuggingFaceConfig) -> WeightSource:
    return source if hf_config.get(TEXT_PART_OF) is None else TextPart(source)
