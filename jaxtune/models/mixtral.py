"""Mixtral: Mistral's shape with eight experts in every layer, of which a token takes two."""

from jaxtune.models.decoder_config import DecoderConfig, ExpertsConfig, LayerGroup, LayerKind
from jaxtune.models.family import ExpertNames, Family, Weight, llama_line_weights
from jaxtune.models.reading import HFConfig, first_of, llama_line, required, rope_of, window_of


def read_config(config: HFConfig) -> DecoderConfig:
    """Translates a Mixtral config.json; a softmax over the chosen scores is that over all, divided by its sum."""
    kind = LayerKind(window_of(config, default=None), rope_of(config, default_theta=1000000.0), sparse=True)
    experts = ExpertsConfig(
        count=int(first_of(config, "num_local_experts", "num_experts")),
        per_token=int(required(config, "num_experts_per_tok")),
        width=int(required(config, "intermediate_size")),
        normalize=True,
        load_balance=float(config.get("router_aux_loss_coef", 0.001)) if config.get("output_router_logits") else 0.0,
    )
    return llama_line(
        config,
        groups=(LayerGroup((kind,), int(required(config, "num_hidden_layers"))),),
        positions=4096 * 32,
        norm_eps=float(config.get("rms_norm_eps", 1e-5)),
        experts=experts,
        linear_names=(("experts.gate_proj", "w1"), ("experts.up_proj", "w3"), ("experts.down_proj", "w2")),
    )


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Returns Mixtral's names."""
    return llama_line_weights(config, experts=ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"))


MIXTRAL = Family("mixtral", "MixtralForCausalLM", read_config, weights)
