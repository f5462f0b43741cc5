"""Tiny random models that score pairs, in the Hugging Face layout, and the scores that transformers gives for them: one
pair at a time, without padding, in float32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from max_ray.config import PipelineConfig
from max_ray.interfaces import EmbeddingsGenerationInputs, RequestID, ScoreRequest
from max_ray.pipelines import PIPELINE_REGISTRY

Pair = tuple[str, str]
Values = npt.NDArray[np.float64]
SPECIAL = ("<pad>", "[CLS]", "[SEP]", "<|im_start|>", "<|im_end|>")
BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
BEHIND = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True)
class Kind:
    """A tiny model.

    Args:
        config: Of transformers.
        model: The class that is saved, and the reference.
        template: How the tokenizer joins two texts.
        changes: Of the shape.
    """

    config: type[Any]
    model: type[Any]
    template: str = "[CLS] $A [SEP] $B:1 [SEP]:1"
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def is_qwen(self) -> bool:
        return self.config is transformers.Qwen3Config


_QWEN = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 700}
KINDS = {
    "bert": Kind(
        transformers.BertConfig,
        transformers.BertForSequenceClassification,
        changes={"max_position_embeddings": 96, "type_vocab_size": 2},
    ),
    "xlm_roberta": Kind(
        transformers.XLMRobertaConfig,
        transformers.XLMRobertaForSequenceClassification,
        "[CLS] $A [SEP] [SEP] $B [SEP]",
        {"max_position_embeddings": 98, "type_vocab_size": 1, "pad_token_id": 0},
    ),
    "roberta": Kind(
        transformers.RobertaConfig,
        transformers.RobertaForSequenceClassification,
        "[CLS] $A [SEP] [SEP] $B [SEP]",
        {"max_position_embeddings": 98, "type_vocab_size": 1, "pad_token_id": 0},
    ),
    "qwen3 with a head": Kind(transformers.Qwen3Config, transformers.Qwen3ForSequenceClassification, changes=_QWEN),
    "qwen3 yes or no": Kind(transformers.Qwen3Config, transformers.Qwen3ForCausalLM, changes=_QWEN),
    "qwen3 yes or no, tied": Kind(
        transformers.Qwen3Config, transformers.Qwen3ForCausalLM, changes={**_QWEN, "tie_word_embeddings": True}
    ),
}


def register_families() -> None:
    for package in ("bert", "qwen", "xlm_roberta"):
        for record in import_module(f"architectures.{package}").ARCHITECTURES:
            PIPELINE_REGISTRY.register(record, allow_override=True)


def make_model(folder: Path, name: str, **changes: Any) -> Path:
    """Writes a checkpoint with weights large enough that scores differ."""
    kind = KINDS[name]
    vocab_size = _write_tokenizer(folder, kind)
    shape = {
        **{"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_labels": 1, "pad_token_id": 0, "tie_word_embeddings": False},
        **{"initializer_range": 0.3},
        **kind.changes,
        **changes,
    }
    torch.manual_seed(3)
    model = kind.model(kind.config(**shape)).eval().float()
    for place, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
        if place.startswith("classifier"):
            parameter.data *= 3 if parameter.dim() == 2 else 0
    model.save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path, kind: Kind) -> int:
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ye", "yes", "no"]
    vocab = {piece: i for i, piece in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("y", "e"), ("ye", "s"), ("n", "o")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if not kind.is_qwen:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair=kind.template, special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "model_max_length": 10**6}
    if not kind.is_qwen:
        settings |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocab)


def reference_rows(folder: Path, pairs: Sequence[Pair], name: str, most: int | None) -> list[dict[str, torch.Tensor]]:
    """Inputs of transformers' model: [1, n] each."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    options: dict[str, Any] = {"truncation": "longest_first", "max_length": most} if most else {}
    if not KINDS[name].is_qwen:
        wanted = {"return_tensors": "pt", "return_token_type_ids": name == "bert"}
        return [dict(tokenizer([query], [document], **wanted, **options)) for query, document in pairs]
    before, behind = (tokenizer.encode(text, add_special_tokens=False) for text in (BEFORE, BEHIND))
    rows = []
    for query, document in pairs:
        text = f"<Instruct>: {INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids = ids[: most - len(before) - len(behind)] if most else ids
        rows.append({"input_ids": torch.tensor([[*before, *ids, *behind]])})
    return rows


def reference_scores(folder: Path, pairs: Sequence[Pair], name: str, most: int | None = None) -> Values:
    """As transformers computes them."""
    model = KINDS[name].model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    scores = []
    with torch.inference_mode():
        for row in reference_rows(folder, pairs, name, most):
            logits = model(**row).logits[0]
            if logits.dim() == 2:
                scores.append(torch.softmax(logits[-1, [no, yes]].double(), -1)[1].item())
            else:
                scores.append(torch.sigmoid(logits.double())[0].item())
    return np.array(scores)


def scores_in_process(folder: Path, pairs: Sequence[Pair], most: int | None = None, **settings: Any) -> Values:
    """Through tokenizer and pipeline of this process."""
    import asyncio

    settings = {"quantization_encoding": "float32", "num_threads": 1, "task": "score", **settings}
    tokenizer, pipeline = PIPELINE_REGISTRY.retrieve(PipelineConfig(model_path=str(folder), **settings))
    requests = [ScoreRequest(RequestID(), "", query, document, most) for query, document in pairs]
    contexts = [asyncio.run(tokenizer.new_context(request)) for request in requests]
    outputs = pipeline.execute(EmbeddingsGenerationInputs([{c.request_id: c for c in contexts}]))
    return np.array([float(outputs[c.request_id].embeddings[0]) for c in contexts])
