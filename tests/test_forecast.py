"""Forecasts of small models against closed forms and against the placed shapes that training uses.

L layers, D width, F mlp width, N query and K kv heads of size H, V vocabulary, E experts of which A are met, R rank.
"""

import functools
import math
from typing import Any

import jax
import plan_shapes
import pytest

from jaxtune import blueprint, choosing
from jaxtune.config import Config
from jaxtune.cost_model.chips import CHIPS, Chip
from jaxtune.decode import decode
from jaxtune.forecast import Forecaster, Traced, trace
from jaxtune.sharding import MESH_AXES, make_mesh

SHAPES = {"llama": plan_shapes.LLAMA, "mixtral": plan_shapes.MIXTRAL, "t5": plan_shapes.T5}
H100 = CHIPS["NVIDIA H100 80GB HBM3"]
T, S = 1024, 512  # tokens of a row; those that an encoder reads
D, F, H, V, R = 512, 1024, 128, 4096, 16
N, K = 4, 2
L = {"llama": 4, "mixtral": 2, "t5": 2}
E, A = 8, 2

ATTENTION = 2 * D * N * H + 2 * D * K * H  # its matrices in a decoder's layer
MLP = 3 * D * F
ADAPTERS = R * (D + N * H + 2 * (D + K * H) + N * H + D + 2 * (D + F) + F + D)  # of a Llama's layer
CAUSAL = T * T * N * H  # FLOPs of one product of a layer's attention: half of the T x T


@functools.cache
def settled(name: str, *words: str) -> tuple[Any, Config]:
    """Returns (the model's plan, a configuration of 16 rows with its lengths filled in)."""
    read = [f"data.encoder_length={S}"] if name == "t5" else []
    own = ["output=o", "data.train.0.path=d", f"data.max_length={T}", "train.batch_rows=16", *read]
    config = decode(["model.path=m", *own, *words])
    return choosing.plan_model(config, SHAPES[name], "gpu", "m")


@functools.cache
def traced(name: str, method: str, remat: str) -> Traced:
    model, config = settled(name, f"tuning.method={method}")
    return trace(config, model, "gpu", remat)


def sizes(**axes: int) -> dict[str, int]:
    return {axis: axes.get(axis, 1) for axis in MESH_AXES}


@functools.cache
def forecaster(name: str, *words: str, chip: Chip = H100, platform: str = "gpu") -> Forecaster:
    model, config = settled(name, *words)
    return Forecaster(config, model, chip, platform)


def test_full_tuning_costs_six_flops_a_parameter_and_token_and_seven_products_of_attention() -> None:
    """Two products forward, one of them computed again, four gradients: as flash attention does it."""
    matrices = L["llama"] * (ATTENTION + MLP) + V * D
    assert traced("llama", "full", "none").flops == 6 * T * matrices + 7 * L["llama"] * CAUSAL


def test_lora_costs_four_flops_a_frozen_parameter_and_six_an_adapters() -> None:
    matrices = L["llama"] * (ATTENTION + MLP) + V * D
    found = traced("llama", "lora", "none").flops
    assert found == T * (4 * matrices + 6 * L["llama"] * ADAPTERS) + 7 * L["llama"] * CAUSAL


def test_of_experts_those_count_that_a_token_meets() -> None:
    matrices = L["mixtral"] * (ATTENTION + A * MLP + D * E) + V * D
    assert traced("mixtral", "full", "none").flops == 6 * T * matrices + 7 * L["mixtral"] * CAUSAL


def test_an_encoder_decoder_costs_by_the_tokens_of_each_side() -> None:
    """T5's attention is the plain one, which keeps its weights: two products forward, four gradients, all T x T."""
    attention = 4 * D * D  # heads of 64: as wide as the model
    read, own = S * (attention + MLP), T * (attention + MLP)
    crossed = T * attention // 2 + S * attention // 2  # queries and output of one side, keys and values of the other
    scores = 2 * D * (S * S + T * T + T * S)
    products = L["t5"] * (read + own + crossed) + T * V * D
    assert traced("t5", "full", "none").flops == 6 * products + 6 * L["t5"] * scores

    adapters = R * (4 * 2 * D + 3 * (D + F)), R * 4 * D  # of a stack's layer; of one side of the crossed attention
    own_adapters = 6 * L["t5"] * ((S + T) * adapters[0] + (S + T) * adapters[1])
    assert traced("t5", "lora", "none").flops == 4 * products + own_adapters + 6 * L["t5"] * scores


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_not_kept_is_computed_again(method: str) -> None:
    full, mid, minimal, none = (traced("llama", method, remat) for remat in ("full", "mid", "minimal", "none"))
    assert full.flops > mid.flops > minimal.flops >= none.flops
    assert full.kept < mid.kept < minimal.kept < none.kept
    tokens = L["llama"] * T
    assert minimal.kept - mid.kept == tokens * 2 * 2 * F, "gate and up in bfloat16"
    assert mid.kept - full.kept == tokens * 2 * (N * H + 2 * K * H + N * H + D), "q, k, v, attention and mid"


def test_full_remat_computes_every_layer_once_more() -> None:
    """But for the last product of each, whose result is the next layer's input; of adapters the outer one likewise."""
    again = traced("llama", "full", "full").flops - traced("llama", "full", "none").flops
    forward = L["llama"] * (2 * T * (ATTENTION + MLP - F * D) + 2 * CAUSAL)
    assert again == forward


def test_offload_keeps_what_minimal_keeps_but_elsewhere() -> None:
    offload, minimal, full = (traced("llama", "full", remat) for remat in ("offload", "minimal", "full"))
    assert (offload.kept, offload.away) == (full.kept, minimal.kept - full.kept)
    assert offload.flops == minimal.flops
    found = forecaster("llama", "tuning.method=full")
    there, here = (found.forecast(sizes(fsdp=2), rows=16, remat=remat) for remat in ("offload", "minimal"))
    assert there.memory < here.memory and there.seconds > here.seconds


@pytest.mark.parametrize("name", ["mixtral", "t5"])
def test_every_kind_of_model_keeps_less_with_more_remat(name: str) -> None:
    full, minimal, none = (traced(name, "full", remat) for remat in ("full", "minimal", "none"))
    assert full.flops > minimal.flops >= none.flops
    assert full.kept < minimal.kept < none.kept


MESHES = [
    ("llama", sizes(fsdp=8)),
    ("llama", sizes(fsdp=4, tensor=2)),
    ("llama", sizes(data=4, tensor=2)),
    ("llama", sizes(slice=2, fsdp=2, context=2)),
    ("mixtral", sizes(expert=8)),
    ("mixtral", sizes(expert=4, fsdp=2)),
    ("mixtral", sizes(expert=2, tensor=2, data=2)),
    ("t5", sizes(fsdp=2, tensor=4)),
]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("name", "split"), MESHES)
def test_what_is_held_is_what_the_placed_shapes_take(name: str, split: dict[str, int], method: str) -> None:
    words = (f"tuning.method={method}", "model.dtype=float32")
    forecast = forecaster(name, *words).forecast(split, rows=16, remat="none")
    mesh, config = make_mesh(split, jax.devices()), settled(name, *words)[1]
    drawn = blueprint.draw(config, SHAPES[name], mesh, where="m", steps=1, sources=1)
    trained = blueprint.shard_bytes(drawn.state.trainable)
    assert forecast.weights == trained + blueprint.shard_bytes(drawn.frozen)
    assert forecast.optimizer == pytest.approx(blueprint.shard_bytes(drawn.state.opt_state), rel=1e-3)
    assert forecast.gradients == trained


def test_more_devices_on_an_axis_take_less_of_each() -> None:
    found = forecaster("llama", "tuning.method=full")
    for axis in ("fsdp", "tensor"):
        totals = [found.forecast(sizes(**{axis: n}), rows=16, remat="mid") for n in (1, 2, 4)]
        for more, fewer in zip(totals[1:], totals, strict=False):
            assert more.memory < fewer.memory
            assert more.weights < fewer.weights and more.optimizer < fewer.optimizer
            assert more.activations == fewer.activations / 2
    alone, copied = (found.forecast(sizes(data=n), rows=16, remat="mid") for n in (1, 4))
    assert copied.weights == alone.weights and copied.activations == alone.activations / 4


def test_fewer_rows_at_once_keep_less_and_hold_the_sum_of_gradients() -> None:
    found = forecaster("llama", "tuning.method=full")
    whole, part = (found.forecast(sizes(fsdp=2), rows=rows, remat="none") for rows in (16, 4))
    assert part.activations == whole.activations / 4
    assert part.gradients == 2 * whole.gradients
    assert part.flops == whole.flops, "the same rows in all"
    assert part.links["fsdp"] == 4 * whole.links["fsdp"], "weights are gathered for each"


def parameters(name: str) -> int:
    model, _ = settled(name, "tuning.method=full")
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((model.trainable, model.frozen)))


def test_a_cards_links_carry_weights_twice_and_gradients_once() -> None:
    """fsdp over 4 cards: 3/4 of all weights in bfloat16 in both passes, and of the gradients in float32."""
    forecast = forecaster("llama", "tuning.method=full").forecast(sizes(fsdp=4), rows=16, remat="none")
    sent = 3 / 4 * (2 * 2 + 4) * parameters("llama")
    assert forecast.links == {"fsdp": pytest.approx(sent / 450e9)}


@pytest.mark.parametrize(
    ("split", "links"),
    [
        (sizes(fsdp=2), 1),
        (sizes(fsdp=4), 2),  # 2 x 2
        (sizes(fsdp=16), 3),  # no cube of 4: no rings
        (sizes(fsdp=64), 6),  # rings in all three dimensions
        (sizes(fsdp=4, data=16), 2),  # one of the three
    ],
)
def test_chips_send_by_all_links_of_their_axis(split: dict[str, int], links: int) -> None:
    found = forecaster("llama", "tuning.method=full", "train.batch_rows=64", chip=CHIPS["TPU v5"], platform="tpu")
    forecast = found.forecast(split, rows=64, remat="none")
    sent = (split["fsdp"] - 1) / split["fsdp"] * 8 * parameters("llama")  # bfloat16 twice, float32 once
    assert forecast.links["fsdp"] == pytest.approx(sent / (links * 90e9))


def test_slices_add_gradients_over_the_data_centre_network() -> None:
    found = forecaster("llama", "tuning.method=full", chip=CHIPS["TPU v5"], platform="tpu")
    forecast = found.forecast(sizes(slice=2, fsdp=4), rows=16, remat="none")
    norms = (2 * L["llama"] + 1) * D  # these are whole on every device
    gradients = 4 * ((parameters("llama") - norms) / 4 + norms)
    assert forecast.links["slice"] == pytest.approx(2 * 1 / 2 * gradients / 6.25e9)


def test_adapters_alone_are_added_up_where_they_alone_are_trained() -> None:
    full, lora = (
        forecaster("llama", f"tuning.method={method}").forecast(sizes(data=2), rows=16, remat="none")
        for method in ("full", "lora")
    )
    trained = 4 * L["llama"] * ADAPTERS
    assert lora.links["data"] == pytest.approx(trained / 450e9)
    assert full.links["data"] == pytest.approx(4 * parameters("llama") / 450e9)


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200"])
def test_a_card_computes_at_a_stated_share_of_its_peak(kind: str) -> None:
    """One card, half of the peak, and what is kept written and read again."""
    chip = CHIPS[kind]
    forecast = forecaster("llama", "tuning.method=full", chip=chip).forecast(sizes(), rows=16, remat="mid")
    own = traced("llama", "full", "mid")
    assert forecast.flops == 16 * own.flops and forecast.links == {}
    products, weights = 16 * own.flops / (0.5 * chip.peak), 3 * 2 * parameters("llama") / chip.bandwidth
    assert forecast.seconds == pytest.approx(max(products, weights) + 2 * 16 * own.kept / chip.bandwidth)
