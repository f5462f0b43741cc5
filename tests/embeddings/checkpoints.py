"""Tiny random encoders in the Hugging Face layout with sentence-transformers files, and the vectors that transformers
gives for them: one text at a time, without padding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors.torch import save_file

from tests.byte_tokenizer import VOCAB_SIZE, write_byte_level

Vectors = npt.NDArray[np.float32]

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE + 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 1,
    "tie_word_embeddings": True,
}
_GEMMA: dict[str, Any] = {
    **{"max_position_embeddings": 64, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 24},
    **{"sliding_window": 9, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
}
_DISTILBERT = {"max_position_embeddings": 64, "hidden_dim": 48}
_SPREAD = 0.7


@dataclass(frozen=True)
class Family:
    """A tiny model. config: of `transformers`; model: the class whose hidden states are the reference; saved: the class
    that the checkpoint is saved from; max_length: tokens that it has positions for. ranks: sizes that must work."""

    config: type[Any]
    model: type[Any]
    saved: type[Any]
    max_length: int = 64
    changes: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = (2,)


FAMILIES = {
    "bert": Family(
        transformers.BertConfig,
        transformers.BertModel,
        transformers.BertModel,
        changes={"max_position_embeddings": 64, "type_vocab_size": 2},
    ),
    "bert one type, tanh": Family(
        transformers.BertConfig,
        transformers.BertModel,
        transformers.BertModel,
        changes={"max_position_embeddings": 64, "type_vocab_size": 1, "hidden_act": "gelu_new"},
    ),
    "xlm_roberta": Family(
        transformers.XLMRobertaConfig,
        transformers.XLMRobertaModel,
        transformers.XLMRobertaModel,
        changes={"max_position_embeddings": 66, "type_vocab_size": 1},
    ),
    "mpnet": Family(
        transformers.MPNetConfig,
        transformers.MPNetModel,
        transformers.MPNetModel,
        max_length=300,
        changes={"max_position_embeddings": 302},
    ),
    "mpnet with a head": Family(
        transformers.MPNetConfig,
        transformers.MPNetModel,
        transformers.MPNetForMaskedLM,
        changes={"max_position_embeddings": 66},
    ),
    "modern_bert": Family(
        transformers.ModernBertConfig,
        transformers.ModernBertModel,
        transformers.ModernBertModel,
        max_length=600,
        changes={"max_position_embeddings": 600, "local_attention": 9, "num_hidden_layers": 5, "mlp_bias": True},
        ranks=(),
    ),
    "qwen3": Family(
        transformers.Qwen3Config,
        transformers.Qwen3Model,
        transformers.Qwen3ForCausalLM,
        changes={"max_position_embeddings": 64, "num_key_value_heads": 2, "head_dim": 16},
    ),
    "qwen3 without a head": Family(
        transformers.Qwen3Config,
        transformers.Qwen3Model,
        transformers.Qwen3Model,
        changes={"max_position_embeddings": 64, "num_key_value_heads": 1, "head_dim": 8},
    ),
    "roberta": Family(
        transformers.RobertaConfig,
        transformers.RobertaModel,
        transformers.RobertaModel,
        changes={"max_position_embeddings": 66, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "roberta with a head": Family(
        transformers.RobertaConfig,
        transformers.RobertaModel,
        transformers.RobertaForMaskedLM,
        changes={"max_position_embeddings": 66, "type_vocab_size": 1},
    ),
    "camembert": Family(
        transformers.CamembertConfig,
        transformers.CamembertModel,
        transformers.CamembertModel,
        changes={"max_position_embeddings": 66, "type_vocab_size": 1},
    ),
    "e5-mistral": Family(
        transformers.MistralConfig,
        transformers.MistralModel,
        transformers.MistralModel,
        changes={"max_position_embeddings": 64, "num_key_value_heads": 2, "sliding_window": 12},
    ),
    "gte-qwen2": Family(
        transformers.Qwen2Config,
        transformers.Qwen2Model,
        transformers.Qwen2ForCausalLM,
        changes={"max_position_embeddings": 64, "num_key_value_heads": 2, "is_causal": False},
    ),
    "qwen2 without a head": Family(
        transformers.Qwen2Config,
        transformers.Qwen2Model,
        transformers.Qwen2Model,
        changes={"max_position_embeddings": 64, "num_key_value_heads": 2},
    ),
    "qwen3 both ways": Family(
        transformers.Qwen3Config,
        transformers.Qwen3Model,
        transformers.Qwen3Model,
        changes={"max_position_embeddings": 64, "num_key_value_heads": 2, "head_dim": 16, "is_causal": False},
    ),
    "embedding gemma": Family(
        transformers.Gemma3TextConfig,
        transformers.Gemma3TextModel,
        transformers.Gemma3TextModel,
        changes={**_GEMMA, "use_bidirectional_attention": True},
    ),
    "gemma3 without a head": Family(
        transformers.Gemma3TextConfig,
        transformers.Gemma3TextModel,
        transformers.Gemma3TextModel,
        changes=_GEMMA,
    ),
    "distilbert": Family(
        transformers.DistilBertConfig,
        transformers.DistilBertModel,
        transformers.DistilBertModel,
        changes=_DISTILBERT,
    ),
    "distilbert with a head": Family(
        transformers.DistilBertConfig,
        transformers.DistilBertModel,
        transformers.DistilBertForMaskedLM,
        changes={**_DISTILBERT, "sinusoidal_pos_embds": True, "activation": "relu"},
    ),
    "nomic_bert": Family(
        transformers.NomicBertConfig,
        transformers.NomicBertModel,
        transformers.NomicBertModel,
        changes={"max_position_embeddings": 64},
        ranks=(),
    ),
    "nomic_bert with a head": Family(
        transformers.NomicBertConfig,
        transformers.NomicBertModel,
        transformers.NomicBertForMaskedLM,
        changes={"max_position_embeddings": 64},
        ranks=(),
    ),
    "gte": Family(
        transformers.GteConfig,
        transformers.GteModel,
        transformers.GteModel,
        changes={"max_position_embeddings": 64},
        ranks=(),
    ),
    "gte with a head": Family(
        transformers.GteConfig,
        transformers.GteModel,
        transformers.GteForMaskedLM,
        changes={"max_position_embeddings": 64, "type_vocab_size": 0, "hidden_act": "relu"},
        ranks=(),
    ),
    "jina_v3": Family(
        transformers.JinaEmbeddingsV3Config,
        transformers.JinaEmbeddingsV3Model,
        transformers.JinaEmbeddingsV3Model,
        changes={"max_position_embeddings": 64},
        ranks=(),
    ),
    "jina_v3 with a head": Family(
        transformers.JinaEmbeddingsV3Config,
        transformers.JinaEmbeddingsV3Model,
        transformers.JinaEmbeddingsV3ForMaskedLM,
        changes={"max_position_embeddings": 64},
        ranks=(),
    ),
}


def make_encoder(folder: Path, name: str, *, pooling: str = "mean", normalize: bool = True, **changes: Any) -> Path:
    """A checkpoint of FAMILIES[name]; `changes` are fields of its configuration."""
    family = FAMILIES[name]
    write_byte_level(folder)
    (folder / "config.json").unlink()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        model = family.saved(family.config(**{**_SHAPE, **family.changes, **changes})).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter.normal_(float("norm" in parameter_name.lower() and "weight" in parameter_name), 0.1)
                if parameter.dim() > 1:
                    parameter.normal_(0.0, _SPREAD / parameter.shape[-1] ** 0.5 if "embed" not in parameter_name else 1)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if name in ("qwen3", "qwen3 without a head"):  # as the published embedders say, whatever they were saved from
        config["architectures"] = ["Qwen3ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    write_sentence_files(folder, pooling=pooling, normalize=normalize)
    return folder


def write_sentence_files(
    folder: Path,
    *,
    pooling: str = "mean",
    normalize: bool = True,
    dense: tuple[int, int] | None = None,
    max_seq_length: int | None = None,
    **more: Any,
) -> None:
    """modules.json and what it names. dense: (in, out) of a layer with tanh and random weights. more: files by name."""
    flags = {"cls": "cls_token", "lasttoken": "lasttoken"}
    modes = {f"pooling_mode_{flags.get(mode, f'{mode}_tokens')}": True for mode in pooling.split("+")}
    stages = [("", "Transformer"), ("1_Pooling", "Pooling")]
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **modes})
    if dense is not None:
        stages.append(("2_Dense", "Dense"))
        activation = "torch.nn.modules.activation.Tanh"
        numbers = {"in_features": dense[0], "out_features": dense[1], "bias": True, "activation_function": activation}
        write_json(folder / "2_Dense" / "config.json", numbers)
        generator = torch.Generator().manual_seed(3)
        weights = {"linear.weight": (dense[1], dense[0]), "linear.bias": (dense[1],)}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in weights.items()}
        save_file(tensors, folder / "2_Dense" / "model.safetensors")
    if normalize:
        stages.append(("3_Normalize", "Normalize"))
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(stages)
    ]
    write_json(folder / "modules.json", entries)
    if max_seq_length is not None:
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    for name, content in more.items():
        write_json(folder / f"{name}.json", content)


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def reference_hidden(folder: Path, rows: Sequence[Sequence[int]], name: str) -> list[torch.Tensor]:
    """transformers' hidden states [n, D] of each row, one at a time."""
    model = FAMILIES[name].model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return [model(torch.tensor([list(row)])).last_hidden_state[0] for row in rows]


def reference_vectors(
    folder: Path, rows: Sequence[Sequence[int]], name: str, pooling: str = "mean", normalize: bool = True
) -> Vectors:
    """Pooled by one line each, so that a reader sees that it is right."""
    pools = {
        "mean": lambda h: h.mean(0),
        "cls": lambda h: h[0],
        "lasttoken": lambda h: h[-1],
    }
    vectors = torch.stack([pools[pooling](hidden) for hidden in reference_hidden(folder, rows, name)])
    vectors = vectors / vectors.norm(dim=-1, keepdim=True) if normalize else vectors
    return np.asarray(vectors.numpy())


def random_rows(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Token ids of texts of these lengths; 1 is the padding token of some families, and may be in a text."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCAB_SIZE, size=length).tolist() for length in lengths]
