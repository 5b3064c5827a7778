"""Published models as facts: what their config.json says of their shape, and how many parameters they have.

Numbers are those of the releases' own config.json; parameter counts are what their safetensors headers add up to, with
a tied head counted once, or the exact number that follows from the shape where only a rounded one is published.
"""

from typing import Any

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN_DEEPSEEK = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}


def shape(
    model_type: str, vocab: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict:
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


def qwen3(width: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict:
    return shape(
        "qwen3", 151936, width, mlp, layers, heads, kv_heads, **{"head_dim": 128, "rope_theta": 1000000, **more}
    )


def qwen3_moe(width: int, mlp: int, layers: int, heads: int, expert: int, **more: Any) -> dict:
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert, "norm_topk_prob": True}
    return shape("qwen3_moe", 151936, width, mlp, layers, heads, 4, head_dim=128, **experts, **more)


def gemma3(width: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict:
    return shape("gemma3_text", 262208, width, mlp, layers, heads, kv_heads, **{"head_dim": 256, **more})


def pythia(width: int, layers: int, heads: int, vocab: int = 50304) -> dict:
    return shape("gpt_neox", vocab, width, 4 * width, layers, heads, heads, rotary_pct=0.25, rotary_emb_base=10000)


def gpt2(width: int, layers: int, heads: int) -> dict:
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 1024}
    return {"model_type": "gpt2", "vocab_size": 50257, **sizes}


def deepseek(model_type: str, vocab: int, width: int, mlp: int, layers: int, heads: int, **more: Any) -> dict:
    latent = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    return shape(model_type, vocab, width, mlp, layers, heads, heads, rope_scaling=YARN_DEEPSEEK, **latent, **more)


def gpt_oss(layers: int, experts: int) -> dict:
    return shape(
        "gpt_oss", 201088, 2880, 2880, layers, 64, 8, head_dim=64, num_local_experts=experts, num_experts_per_tok=4
    )


LLAMA31 = {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}
LLAMA32 = {"head_dim": 64, "tie_word_embeddings": True, "rope_theta": 500000.0}
TIED = {"tie_word_embeddings": True}
PUBLISHED: dict[str, tuple[dict, int]] = {
    "Llama-2-7B": (shape("llama", 32000, 4096, 11008, 32, 32, 32), 6_738_415_616),
    "Llama-2-13B": (shape("llama", 32000, 5120, 13824, 40, 40, 40), 13_015_864_320),
    "Llama-2-70B": (shape("llama", 32000, 8192, 28672, 80, 64, 8), 68_976_648_192),
    "Llama-3.1-8B": (shape("llama", 128256, 4096, 14336, 32, 32, 8, **LLAMA31), 8_030_261_248),
    "Llama-3.1-70B": (shape("llama", 128256, 8192, 28672, 80, 64, 8, **LLAMA31), 70_553_706_496),
    "Llama-3.1-405B": (shape("llama", 128256, 16384, 53248, 126, 128, 8, **LLAMA31), 405_853_388_800),
    "Llama-3.2-1B": (shape("llama", 128256, 2048, 8192, 16, 32, 8, **LLAMA32), 1_235_814_400),
    "Llama-3.2-3B": (shape("llama", 128256, 3072, 8192, 28, 24, 8, **{**LLAMA32, "head_dim": 128}), 3_212_749_824),
    "SmolLM2-1.7B": (shape("llama", 49152, 2048, 8192, 24, 32, 32, **TIED), 1_711_376_384),
    "SmolLM2-135M": (shape("llama", 49152, 576, 1536, 30, 9, 3, **TIED), 134_515_008),
    "Falcon3-7B": (shape("llama", 131072, 3072, 23040, 28, 12, 4, head_dim=256), 7_455_550_464),
    "Mistral-7B": (shape("mistral", 32000, 4096, 14336, 32, 32, 8), 7_241_732_096),
    "Mistral-7B-v0.3": (shape("mistral", 32768, 4096, 14336, 32, 32, 8, sliding_window=None), 7_248_023_552),
    "Mixtral-8x7B": (
        shape("mixtral", 32000, 4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2),
        46_702_792_704,
    ),
    "Mixtral-8x22B": (
        shape("mixtral", 32768, 6144, 16384, 56, 48, 8, num_local_experts=8, num_experts_per_tok=2),
        140_630_071_296,
    ),
    "Qwen2-0.5B": (shape("qwen2", 151936, 896, 4864, 24, 14, 2, **TIED), 494_032_768),
    "Qwen2.5-7B": (shape("qwen2", 152064, 3584, 18944, 28, 28, 4, use_sliding_window=False), 7_615_616_512),
    "Qwen2.5-72B": (shape("qwen2", 152064, 8192, 29568, 80, 64, 8, use_sliding_window=False), 72_706_203_648),
    "Qwen3-0.6B": (qwen3(1024, 3072, 28, 16, 8, **TIED), 596_049_920),
    "Qwen3-1.7B": (qwen3(2048, 6144, 28, 16, 8, **TIED), 1_720_574_976),
    "Qwen3-4B": (qwen3(2560, 9728, 36, 32, 8, **TIED), 4_022_468_096),
    "Qwen3-8B": (qwen3(4096, 12288, 36, 32, 8), 8_190_735_360),
    "Qwen3-14B": (qwen3(5120, 17408, 40, 40, 8), 14_768_307_200),
    "Qwen3-32B": (qwen3(5120, 25600, 64, 64, 8), 32_762_123_264),
    "Qwen3-30B-A3B": (qwen3_moe(2048, 6144, 48, 32, 768), 30_532_122_624),
    "Qwen3-235B-A22B": (qwen3_moe(4096, 12288, 94, 64, 1536), 235_093_634_560),
    "Gemma-2B": (shape("gemma", 256000, 2048, 16384, 18, 8, 1, head_dim=256), 2_506_172_416),
    "Gemma-7B": (shape("gemma", 256000, 3072, 24576, 28, 16, 16, head_dim=256), 8_537_680_896),
    "Gemma-2-2B": (shape("gemma2", 256000, 2304, 9216, 26, 8, 4, head_dim=256), 2_614_341_888),
    "Gemma-2-9B": (shape("gemma2", 256000, 3584, 14336, 42, 16, 8, head_dim=256), 9_241_705_984),
    "Gemma-2-27B": (shape("gemma2", 256000, 4608, 36864, 46, 32, 16, head_dim=128), 27_227_128_320),
    "Gemma-3-1B": (gemma3(1152, 6912, 26, 4, 1, vocab_size=262144), 999_885_952),
    "Gemma-3-4B (text)": (gemma3(2560, 10240, 34, 8, 4), 3_880_263_168),
    "Gemma-3-12B (text)": (gemma3(3840, 15360, 48, 16, 8), 11_766_034_176),
    "Gemma-3-27B (text)": (gemma3(5376, 21504, 62, 32, 16, head_dim=128), 27_009_346_304),
    "Phi-3-mini-4k": (shape("phi3", 32064, 3072, 8192, 32, 32, 32), 3_821_079_552),
    "Phi-3-medium": (shape("phi3", 32064, 5120, 17920, 40, 40, 10), 13_960_238_080),
    "Phi-4": (shape("phi3", 100352, 5120, 17920, 40, 40, 10), 14_659_507_200),
    "Phi-4-mini": (shape("phi3", 200064, 3072, 8192, 32, 24, 8, **TIED), 3_836_021_760),
    "OLMo-2-7B": (shape("olmo2", 100352, 4096, 11008, 32, 32, 32), 7_298_617_344),
    "OLMo-2-13B": (shape("olmo2", 100352, 5120, 13824, 40, 40, 40), 13_716_198_400),
    "OLMo-2-32B": (shape("olmo2", 100352, 5120, 27648, 64, 40, 8), 32_234_279_936),
    "OLMo-3-7B": (shape("olmo3", 100278, 4096, 11008, 32, 32, 32), 7_298_011_136),
    "SmolLM3-3B": (shape("smollm3", 128256, 2048, 11008, 36, 16, 4), 3_075_098_624),
    "Granite-3.3-2B": (shape("granite", 49159, 2048, 8192, 40, 32, 8, **TIED), 2_533_539_840),
    "Granite-3.3-8B": (shape("granite", 49159, 4096, 12800, 40, 32, 8, **TIED), 8_170_864_640),
    "GPT-2": (gpt2(768, 12, 12), 124_439_808),
    "GPT-2 XL": (gpt2(1600, 48, 25), 1_557_611_200),
    "Pythia-160M": (pythia(768, 12, 12), 162_322_944),
    "Pythia-1B": (pythia(2048, 16, 8), 1_011_781_632),
    "Pythia-6.9B": (pythia(4096, 32, 32, vocab=50432), 6_857_302_016),
    "Pythia-12B": (pythia(5120, 36, 40, vocab=50688), 11_846_072_320),
    "GPT-NeoX-20B": (pythia(6144, 44, 64, vocab=50432), 20_554_567_680),
    "DeepSeek-V2-Lite": (
        deepseek(
            "deepseek_v2", 102400, 2048, 10944, 27, 16,
            q_lora_rank=None, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2,
            moe_intermediate_size=1408, first_k_dense_replace=1,
        ),
        15_706_484_224,
    ),
    "DeepSeek-V2": (
        deepseek(
            "deepseek_v2", 102400, 5120, 12288, 60, 128,
            q_lora_rank=1536, n_routed_experts=160, num_experts_per_tok=6, n_shared_experts=2,
            moe_intermediate_size=1536, first_k_dense_replace=1, topk_method="group_limited_greedy", n_group=8,
            topk_group=3, routed_scaling_factor=16.0,
        ),
        235_741_434_880,
    ),
    "DeepSeek-V3": (
        deepseek(
            "deepseek_v3", 129280, 7168, 18432, 61, 128,
            q_lora_rank=1536, n_routed_experts=256, num_experts_per_tok=8, n_shared_experts=1,
            moe_intermediate_size=2048, first_k_dense_replace=3, n_group=8, topk_group=4, routed_scaling_factor=2.5,
        ),
        671_026_419_200,
    ),
    "GPT-OSS-20B": (gpt_oss(24, 32), 20_914_757_184),
    "GPT-OSS-120B": (gpt_oss(36, 128), 116_829_156_672),
}  # fmt: skip
