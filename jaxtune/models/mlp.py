"""The mlp half of a layer where every token takes the same one."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxtune import sharding
from jaxtune.models.decoder_config import DecoderConfig
from jaxtune.models.layers import Dropout, Linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Mlp(nnx.Module):
    """`down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` where the config has no gate."""

    def __init__(
        self, config: DecoderConfig, key: jax.Array, *, param_dtype: jax.typing.DTypeLike, width: int | None = None
    ):
        keys = jax.random.split(key, 3)
        width = width or config.mlp_width
        make = partial(Linear, bias=config.mlp_bias, std=config.init_std, param_dtype=param_dtype)
        wide = partial(make, in_size=config.width, axes=("embed", "mlp"))
        if config.fused_gate_up:
            self.gate_up_proj = wide("gate_up_proj", keys[0], out_size=2 * width)
        else:
            if config.gated:
                self.gate_proj = wide("gate_proj", keys[0], out_size=width)
            self.up_proj = wide(config.linear_name("up_proj"), keys[1], out_size=width)
        self.down_proj = make(
            config.linear_name("down_proj"), keys[2], in_size=width, out_size=config.width, axes=("mlp", "embed")
        )
        self.config = config

    def __call__(self, x: jax.Array, *, dropout: Dropout | None) -> jax.Array:
        """Maps `[B T D]` to `[B T D]`."""
        activation = ACTIVATIONS[self.config.activation]
        if self.config.fused_gate_up:
            gate, up = jnp.split(self.gate_up_proj(x, dropout), 2, axis=-1)
        else:
            up = self.up_proj(x, dropout)
        up = checkpoint_name(sharding.constrain(up, ("batch", "seq", "mlp")), "up")
        if not self.config.gated:
            return self.down_proj(activation(up), dropout)
        if not self.config.fused_gate_up:
            gate = self.gate_proj(x, dropout)
        gate = checkpoint_name(sharding.constrain(gate, ("batch", "seq", "mlp")), "gate")
        return self.down_proj(activation(gate) * up, dropout)
