"""XLMRobertaConfig: the numbers of one XLM-RoBERTa checkpoint, read once from config.json and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from architectures.bert.model_config import BertConfig


@dataclass(frozen=True)
class XLMRobertaConfig(BertConfig):
    """A BERT's numbers; of its positions the first `padding_id + 1` belong to no place in a text."""

    padding_id: int = 1

    @property
    def max_length(self) -> int:
        """Tokens that there are positions for."""
        return self.num_positions - self.padding_id - 1

    @classmethod
    def from_huggingface(cls, config: Any) -> XLMRobertaConfig:
        """From config.json as an attribute-style mapping. Raises ConfigError for a value that this family lacks."""
        return cls(**vars(BertConfig.from_huggingface(config)), padding_id=config.get("pad_token_id", 1))
