"""Qwen3VLModel: the Qwen3-VL network as the pipeline sees it; VisionLanguageModel: what it shares with its mixture of
experts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from architectures.qwen.model_config import QwenConfig
from architectures.qwen.qwen import QwenBlock
from architectures.qwen3_vl.inputs import Qwen3VLInputs, axis_positions, cut_images, image_tokens
from architectures.qwen3_vl.model_config import VisionConfig, mrope_section, text_config
from architectures.qwen3_vl.qwen3_vl import ImageTokens, VisionTransformer
from architectures.qwen3_vl.vision import patches_of
from architectures.qwen3_vl.weight_adapters import safetensors_name_map
from max_ray.interfaces import KVCacheInputs, ModelInputs, PromptImage, RunRow
from max_ray.modeling import CausalLMModel
from max_ray.nn import ForwardBatch

if TYPE_CHECKING:
    from max_ray.config import PipelineConfig

_KEPT_BYTES = 256 * 2**20


class VisionLanguageModel(CausalLMModel):
    """A CausalLMModel whose prompts may have images; `network` is a VisionTransformer.

    The pixels come with every run that has a part of their image. The features of an image that a chunk cuts are kept
    for the next chunk, up to 256 MiB of them; what is not at hand is computed again.
    """

    takes_images = True
    network: VisionTransformer

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._vision = VisionConfig.from_huggingface(self.huggingface_config)
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # [S, tokens, D] by digest, last used last

    @classmethod
    def check_settings(cls, pipeline_config: PipelineConfig, huggingface_config: Any) -> None:
        """See CausalLMModel; and ConfigError for what this family's vision tower and positions do not cover."""
        cls.config_of(huggingface_config)
        VisionConfig.from_huggingface(huggingface_config)
        mrope_section(huggingface_config)
        super().check_settings(pipeline_config, huggingface_config)

    def prepare_initial_token_inputs(
        self,
        context_batch: Sequence[RunRow],
        kv_cache_inputs: KVCacheInputs | None = None,
        return_n_logits: int = 1,
    ) -> ModelInputs:
        """See TextPipelineModel. Qwen3VLInputs only where image tokens are among the active ones."""
        inputs = super().prepare_initial_token_inputs(context_batch, kv_cache_inputs, return_n_logits)
        if any(row.images for row in context_batch):
            return self._with_images(inputs, context_batch)
        if any(row.position_offset for row in context_batch):
            counts = [len(row.active_tokens) for row in context_batch]
            offsets = np.array([row.position_offset for row in context_batch], dtype=np.int64)
            inputs.positions = inputs.positions + self._to_device(np.repeat(offsets, counts))
        return inputs

    def forward_batch(self, model_inputs: ModelInputs) -> ForwardBatch:
        """See TextPipelineModel; with the features of the images in this step."""
        if not isinstance(model_inputs, Qwen3VLInputs):
            return super().forward_batch(model_inputs)
        features = self._features(model_inputs)[:, model_inputs.feature_indices]
        images = ImageTokens(model_inputs.axis_positions, model_inputs.token_indices, features)
        return ForwardBatch.of(model_inputs, images)

    def _with_images(self, inputs: ModelInputs, rows: Sequence[RunRow]) -> Qwen3VLInputs:
        images, token_indices, feature_indices = image_tokens(rows)
        return Qwen3VLInputs(
            tokens=inputs.tokens,
            positions=inputs.positions,
            qo_indptr=inputs.qo_indptr,
            logit_indices=inputs.logit_indices,
            kv_cache_inputs=inputs.kv_cache_inputs,
            images=images,
            patches={image.digest: self._patches(image) for image in images if image.digest not in self._kept},
            cut=cut_images(rows),
            axis_positions=self._to_device(np.concatenate([axis_positions(row) for row in rows])),
            token_indices=self._to_device(token_indices),
            feature_indices=self._to_device(feature_indices),
        )

    def _patches(self, image: PromptImage) -> torch.Tensor:
        pixels = self._to_device(image.pixels).float()
        return patches_of(pixels * self._to_device(image.scale) + self._to_device(image.shift), self._vision)

    def _features(self, inputs: Qwen3VLInputs) -> torch.Tensor:
        """[S, tokens of all images, D]: of kept ones and, by one pass of the tower, of the others."""
        merge = self._vision.merge_size
        missing = [image for image in inputs.images if image.digest in inputs.patches]
        found = dict(self._kept)
        if missing:
            patches = torch.cat([inputs.patches[image.digest] for image in missing])
            grids = [(image.rows * merge, image.columns * merge) for image in missing]
            pieces = self.network.visual(patches, grids).split([image.num_tokens for image in missing], dim=1)
            found |= {image.digest: piece for image, piece in zip(missing, pieces, strict=True)}
        for image in inputs.images:
            self._keep(image.digest, found[image.digest] if image.digest in inputs.cut else None)
        return torch.cat([found[image.digest] for image in inputs.images], dim=1)

    def _keep(self, digest: bytes, features: torch.Tensor | None) -> None:
        """Remembers an image's features, or forgets them; the oldest go where there are too many."""
        self._kept.pop(digest, None)
        if features is not None:
            self._kept[digest] = features.clone()  # not a view of what the whole step has computed
        while sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
            self._kept.popitem(last=False)


class Qwen3VLModel(VisionLanguageModel):
    """One rank of a dense Qwen3-VL."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> QwenConfig:
        return QwenConfig.qwen3(text_config(huggingface_config))

    def build_network(self, max_length: int, dtype: torch.dtype) -> VisionTransformer:
        config = self.config_of(self.huggingface_config)
        layers = [QwenBlock(config, i, self.tp, dtype) for i in range(config.num_layers)]
        vision = VisionConfig.from_huggingface(self.huggingface_config)
        section = mrope_section(self.huggingface_config)
        return VisionTransformer(config, layers, vision, section, max_length, self.tp, dtype)
