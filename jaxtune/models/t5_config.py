"""What a model of the T5 line does, as data."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtune.models.decoder_config import StackedLayer

NO_LAST_POSITION = 1 << 20  # distances beyond the last bucket are all alike, so no position is too far


@dataclass(frozen=True)
class T5Config:
    """T5 1.0 and 1.1, FLAN-T5, UL2, mT5, umT5 as numbers; hashable, so that it can key a compiled function.

    Attributes:
        head_dim: heads times it may differ from the width.
        buckets: distances between positions fall into so many, each with a bias of its own for every head.
        max_distance: from here on all distances are alike.
        bias_in_every_layer: every layer has its own biases (umT5), else one table serves a whole stack.
        gated: the mlp is `wo(activation(wi_0) * wi_1)`, else `wo(activation(wi))`.
        head_scale: hidden states are multiplied by it before the head.
        start_token: what the decoder reads first.
        init_factor: of randomly drawn weights.
    """

    vocab_size: int
    width: int
    mlp_width: int
    num_heads: int
    head_dim: int
    encoder_layers: int
    decoder_layers: int
    buckets: int
    max_distance: int
    bias_in_every_layer: bool
    norm_eps: float
    activation: str
    gated: bool
    tie_embeddings: bool
    head_scale: float
    start_token: int
    init_factor: float = 1.0

    is_encoder_decoder: ClassVar[bool] = True
    max_positions: ClassVar[int] = NO_LAST_POSITION

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    def stacks(self) -> dict[str, list[StackedLayer]]:
        """Returns where the layers that a placeholder in a tensor's name counts are held, first to last."""
        return {
            "encoder_layer": [StackedLayer(("encoder", "layers"), layer) for layer in range(self.encoder_layers)],
            "decoder_layer": [StackedLayer(("decoder", "layers"), layer) for layer in range(self.decoder_layers)],
        }
