"""GGUF files of the tiny encoders of `checkpoints.py`, laid out as llama.cpp's converter does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from gguf.constants import MODEL_ARCH
from gguf.constants import GGMLQuantizationType as Type
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.gguf_files import encoded

KINDS = {
    "bert": ("bert", MODEL_ARCH.BERT),
    "bert one type, tanh": ("bert", MODEL_ARCH.BERT),
    "modern_bert": ("modern-bert", MODEL_ARCH.MODERN_BERT),
    "qwen3": ("qwen3", MODEL_ARCH.QWEN3),
    "qwen3 without a head": ("qwen3", MODEL_ARCH.QWEN3),
}
POOLING = {"mean": 1, "cls": 2, "lasttoken": 3}
_NORMAL, _CONTROL = 1, 3
_BEGIN = "\u2581"
_PIECES = (
    "the",
    "un",
    "##aff",
    "##able",
    "cafe",
    "wor",
    "##ld",
    ",",
    "!",
    "##s",
    "\u4e16",
    "\u754c",
    "\u00e9",
    "E",
    "Caf",
)
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_wordpiece(folder: Path, *, lowercase: bool) -> None:
    """A tokenizer.json of BERT's kind in place of the folder's, with one piece a letter besides some words."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789" + ("" if lowercase else "ABCDEFGHIJKLMNOPQRSTUVWXYZ\u00c9")
    known = [piece for piece in _PIECES if not lowercase or piece == piece.lower() != "\u00e9"]
    pieces = list(dict.fromkeys([*_SPECIAL, *known, *letters, *(f"##{letter}" for letter in letters)]))
    tokenizer = Tokenizer(models.WordPiece(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(_SPECIAL))
    ends = [(name, pieces.index(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **names}))


def convert(folder: Path, path: Path, name: str, pooling: str | None, kind: str = "F32", **keys: Any) -> Path:
    """Writes the checkpoint in `folder`. keys: more than the converter would write, or others; None leaves one out."""
    arch, tensors_of = KINDS[name]
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**_keys_of(config, arch), "pooling_type": POOLING.get(pooling or ""), **keys}.items():
        _add(writer, f"{arch}.{key}", value)
    _write_tokenizer(writer, folder)
    names = gguf.get_tensor_name_map(tensors_of, config["num_hidden_layers"])
    for theirs, tensor in load_file(folder / "model.safetensors").items():
        if "pooler" in theirs:
            continue  # as the converter does
        bare = theirs.removeprefix("bert.") if arch == "bert" else theirs
        own = names.get_name(bare, (".weight", ".bias")) or names.get_name(f"model.{bare}", (".weight", ".bias"))
        assert own is not None, theirs
        stored = kind if tensor.dim() > 1 and own.startswith("blk.") else "F32"
        writer.add_tensor(own, encoded(tensor.float().contiguous(), stored), raw_dtype=Type[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        writer.add_string(key, value)


def _keys_of(config: dict[str, Any], arch: str) -> dict[str, Any]:
    keys = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
    }
    if arch == "bert":
        act = config["hidden_act"]
        own = {"attention.layer_norm_epsilon": config["layer_norm_eps"], "hidden_activation": act}
        return {**keys, **own, "attention.causal": False}
    if arch == "modern-bert":
        thetas = config["rope_parameters"]
        return {
            **keys,
            "attention.layer_norm_epsilon": config["norm_eps"],
            "attention.causal": False,
            "attention.sliding_window": config["local_attention"],
            "attention.sliding_window_pattern": config.get("global_attn_every_n_layers", 3),
            "rope.freq_base": float(thetas["full_attention"]["rope_theta"]),
            "rope.freq_base_swa": float(thetas["sliding_attention"]["rope_theta"]),
            "rope.scaling.type": "none",
            "hidden_activation": config["hidden_activation"],
        }
    return {
        **keys,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
    }


def _write_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stored, vocabulary = json.loads(tokenizer.to_str()), tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    kinds = [_CONTROL if token in added else _NORMAL for token in tokens]
    is_wordpiece = stored["model"]["type"] == "WordPiece"
    writer.add_tokenizer_model("bert" if is_wordpiece else "gpt2")
    writer.add_tokenizer_pre("default" if is_wordpiece else "gpt-2")
    writer.add_token_list([_phantom(token, token in added) for token in tokens] if is_wordpiece else tokens)
    writer.add_token_types(kinds)
    if is_wordpiece:
        writer.add_unk_token_id(vocabulary["[UNK]"])
        writer.add_sep_token_id(vocabulary["[SEP]"])
        writer.add_bos_token_id(vocabulary["[CLS]"])
    else:
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)


def _phantom(token: str, is_special: bool) -> str:
    return token if is_special else token[2:] if token.startswith("##") else _BEGIN + token
