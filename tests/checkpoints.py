"""Tiny random Llama checkpoints in the Hugging Face layout, with a byte-level tokenizer: made on the fly, offline.

`make_llama(directory, **overrides)` writes config.json, generation_config.json, model.safetensors (or shards with an
index), tokenizer.json, tokenizer_config.json and chat_template.jinja. The same arguments give the same bytes.

Token ids: 0 <pad>, 1 <s>, 2 </s>, 3 <|user|>, 4 <|assistant|>, then the 256 bytes (id = 5 + rank of the byte in the
byte-level alphabet). A `vocab_size` above 261 leaves ids without text; one below it gives a checkpoint without a
tokenizer (`make_llama` writes none), for tests of the network alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
TOKENIZER_SIZE = len(SPECIAL_TOKENS) + 256

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

DEFAULTS: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}


def make_llama(
    directory: Path | str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "1GB",
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Writes a checkpoint into `directory` and returns it. `overrides` are fields of LlamaConfig.

    max_shard_size: a small one (say 20_000 bytes) gives several files and model.safetensors.index.json.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    model = _random_model(LlamaConfig(**{**DEFAULTS, **overrides}), seed).to(dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(path, max_shard_size=max_shard_size)
    if tokenizer and model.config.vocab_size >= TOKENIZER_SIZE:
        make_tokenizer(max_length=model.config.max_position_embeddings).save_pretrained(path)
    return path


def make_tokenizer(max_length: int = 256) -> PreTrainedTokenizerFast:
    """One token a byte; encoding puts <s> in front; special tokens are parsed in text; has a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(SPECIAL_TOKENS))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def load_reference(path: Path | str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The Hugging Face model of the folder, in eval mode: the reference that ours must equal."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    assert isinstance(model, LlamaForCausalLM)
    return model.eval()


def _random_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """Weights large enough that logits differ clearly between tokens; norm weights and biases are not trivial."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.1)
                elif "embed_tokens" in name:
                    parameter.normal_(0.0, 1.0)
                else:
                    parameter.normal_(0.0, 1.2 / parameter.shape[-1] ** 0.5)
    return model
