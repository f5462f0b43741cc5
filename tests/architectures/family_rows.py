"""The 80 families of language models and embedders that are used most, by the class that their config.json names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """name: of the family. class_name, model_type: in config.json. kind: how a tiny checkpoint is made (see
    family_table.py). native: the class of `transformers` where it is called otherwise there. changes: fields of its
    configuration. published: values that config.json gets afterwards, None to take one out. pooling: of an embedder."""

    name: str
    class_name: str
    model_type: str
    kind: str = "decoder"
    native: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)
    pooling: str = "mean"


_INTERNLM = {"attention_bias": None, "mlp_bias": None, "qkv_bias": False, "bias": False}
_GRANITE = {  # of 3 layers, with 32 numbers in 4 heads, as MiniCPM says it
    **{"embedding_multiplier": 3.0, "residual_multiplier": 1.4 / 3**0.5, "logits_scaling": 2.0},
    "attention_multiplier": 8**-0.5,
}
_MINICPM = {**dict.fromkeys(_GRANITE), "scale_emb": 3, "scale_depth": 1.4, "dim_model_base": 16}

DECODERS = [
    Row("Llama 3.x", "LlamaForCausalLM", "llama"),
    Row("Qwen2.5", "Qwen2ForCausalLM", "qwen2"),
    Row("Qwen3", "Qwen3ForCausalLM", "qwen3"),
    Row("Qwen3-MoE", "Qwen3MoeForCausalLM", "qwen3_moe"),
    Row("Mistral 7B / Nemo", "MistralForCausalLM", "mistral"),
    Row("Mixtral", "MixtralForCausalLM", "mixtral"),
    Row("Gemma 3 1B/270M", "Gemma3ForCausalLM", "gemma3_text"),
    Row("gpt-oss", "GptOssForCausalLM", "gpt_oss"),
    Row("DeepSeek V2-Lite/V2", "DeepseekV2ForCausalLM", "deepseek_v2"),
    Row("DeepSeek V3/R1", "DeepseekV3ForCausalLM", "deepseek_v3"),
    Row("Qwen2-MoE", "Qwen2MoeForCausalLM", "qwen2_moe"),
    Row("Gemma 2", "Gemma2ForCausalLM", "gemma2"),
    Row("Gemma 4 (text class)", "Gemma4ForCausalLM", "gemma4_text", changes={
        "vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 8,
    }),
    Row("GLM-4", "Glm4ForCausalLM", "glm4"),
    Row("GLM-4.5/4.6/4.7 (Air)", "Glm4MoeForCausalLM", "glm4_moe"),
    Row("GLM-4.7-Flash", "Glm4MoeLiteForCausalLM", "glm4_moe_lite"),
    Row("MiniMax M2", "MiniMaxM2ForCausalLM", "minimax_m2"),
    Row("Phi-3 / Phi-4(-mini)", "Phi3ForCausalLM", "phi3"),
    Row("Phi-3.5-MoE", "PhimoeForCausalLM", "phimoe"),
    Row("Granite 3.x", "GraniteForCausalLM", "granite"),
    Row("OLMo 2", "Olmo2ForCausalLM", "olmo2"),
    Row("OLMo 3", "Olmo3ForCausalLM", "olmo3"),
    Row("SmolLM3", "SmolLM3ForCausalLM", "smollm3"),
    Row("Nemotron-4/Minitron", "NemotronForCausalLM", "nemotron"),
    Row("EXAONE 4", "Exaone4ForCausalLM", "exaone4"),
    Row("Cohere Command R", "CohereForCausalLM", "cohere"),
    Row("Command A / R7B", "Cohere2ForCausalLM", "cohere2"),
    Row("StableLM", "StableLmForCausalLM", "stablelm"),
    Row("Hunyuan dense", "HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense"),
    Row("Hunyuan A13B", "HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe"),
    Row("ERNIE 4.5", "Ernie4_5ForCausalLM", "ernie4_5"),
    Row("ERNIE 4.5 MoE", "Ernie4_5_MoeForCausalLM", "ernie4_5_moe"),
    Row("Seed-OSS", "SeedOssForCausalLM", "seed_oss"),
    Row("LongCat", "LongcatFlashForCausalLM", "longcat_flash"),
    Row("Xiaomi MiMo V2 Flash", "MiMoV2FlashForCausalLM", "mimo_v2_flash"),
    Row("Arcee AFM", "ArceeForCausalLM", "arcee"),
    Row("StarCoder2", "Starcoder2ForCausalLM", "starcoder2"),
    Row("GPT-2", "GPT2LMHeadModel", "gpt2"),
    Row("Llama 4 (text class)", "Llama4ForCausalLM", "llama4_text"),
    Row("Qwen3-Next", "Qwen3NextForCausalLM", "qwen3_next"),
    Row("Qwen3.5 (text class)", "Qwen3_5ForCausalLM", "qwen3_5_text"),
    Row("DeepSeek V3.2", "DeepseekV32ForCausalLM", "deepseek_v32"),
    Row("DeepSeek V4", "DeepseekV4ForCausalLM", "deepseek_v4"),
    Row("Kimi Linear", "KimiLinearForCausalLM", "kimi_linear"),
    Row("GLM-5", "GlmMoeDsaForCausalLM", "glm_moe_dsa"),
    Row("MiniMax M1/Text-01", "MiniMaxForCausalLM", "minimax"),
    Row("Granite 4 (hybrid)", "GraniteMoeHybridForCausalLM", "granitemoehybrid"),
    Row("Falcon-H1", "FalconH1ForCausalLM", "falcon_h1"),
    Row("Falcon 7B/40B", "FalconForCausalLM", "falcon"),
    Row("Nemotron 3 Nano (hybrid)", "NemotronHForCausalLM", "nemotron_h"),
    Row("InternLM 2/3", "InternLM3ForCausalLM", "internlm3", native="LlamaForCausalLM", published=_INTERNLM),
    Row("MiniCPM4", "MiniCPMForCausalLM", "minicpm", native="GraniteForCausalLM", changes=_GRANITE, published=_MINICPM),
    Row("LFM2", "Lfm2ForCausalLM", "lfm2"),
    Row("Mamba2 / Codestral Mamba", "Mamba2ForCausalLM", "mamba2"),
    Row("Jamba", "JambaForCausalLM", "jamba"),
]  # fmt: skip

MULTIMODAL_ROWS = [
    Row("Qwen3-VL", "Qwen3VLForConditionalGeneration", "qwen3_vl", "vision"),
    Row("Llama 4", "Llama4ForConditionalGeneration", "llama4", "multimodal"),
    Row("Qwen3.5 / 3.6 / 3.8", "Qwen3_5ForConditionalGeneration", "qwen3_5", "multimodal"),
    Row("Qwen3.5 MoE", "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", "multimodal"),
    Row("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", "multimodal"),
    Row("Mistral Small 3.1+ / Ministral 3 / Devstral", "Mistral3ForConditionalGeneration", "mistral3", "multimodal"),
    Row("Gemma 3 4B-27B", "Gemma3ForConditionalGeneration", "gemma3", "multimodal"),
    Row("Gemma 3n", "Gemma3nForConditionalGeneration", "gemma3n", "multimodal"),
    Row("Gemma 4", "Gemma4ForConditionalGeneration", "gemma4", "multimodal"),
    Row("Kimi K2.5", "KimiK25ForConditionalGeneration", "kimi_k25", "multimodal"),
]

ELSEWHERE = [
    Row("Llama-Nemotron Super (DeciLM)", "DeciLMForCausalLM", "nemotron-nas", "names only"),
    Row("Ling/Ring (BailingMoeV2)", "BailingMoeV2ForCausalLM", "bailing_moe", "names only"),
    Row("Step-3.5", "Step3p5ForCausalLM", "step3p5", "names only"),
    Row("Baichuan", "BaichuanForCausalLM", "baichuan", "names only"),
]
"""With code of their own, or with a class of `transformers` that no family here runs: only the names are tried."""

EMBEDDERS = [
    Row("BGE/E5 (BERT)", "BertModel", "bert", "embedder"),
    Row("bge-m3", "XLMRobertaModel", "xlm-roberta", "embedder", changes={"pad_token_id": 1}),
    Row("DistilBERT embed", "DistilBertModel", "distilbert", "embedder", changes={"hidden_dim": 64}),
    Row("RoBERTa embed", "RobertaModel", "roberta", "embedder", changes={"pad_token_id": 1}),
    Row("Nomic embed", "NomicBertModel", "nomic_bert", "embedder", changes={"head_dim": 8}),
    Row("gte v1.5 (NewModel)", "NewModel", "new", "embedder", "GteModel"),
    Row("Jina v3 / XLM-R flash", "XLMRobertaLoRA", "xlm-roberta", "embedder", "JinaEmbeddingsV3Model",
        published={"position_embedding_type": "rotary"}),
    Row("EmbeddingGemma", "Gemma3TextModel", "gemma3_text", "embedder", changes={"use_bidirectional_attention": True}),
    Row("E5-Mistral", "MistralModel", "mistral", "embedder", pooling="lasttoken"),
    Row("gte-Qwen2", "Qwen2Model", "qwen2", "embedder", pooling="lasttoken"),
    Row("Qwen3-Embedding fine-tunes", "Qwen3Model", "qwen3", "embedder", pooling="lasttoken"),
]  # fmt: skip

ROWS = [*DECODERS, *MULTIMODAL_ROWS, *ELSEWHERE, *EMBEDDERS]
