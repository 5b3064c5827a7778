"""Compiles the training step of a published model's shape for TPUs that are not here, and says whether it fits.

    python tools/compile_for_tpu.py --shape llama-3.1-8b --method lora --topology v5p:2x2x2 --rows 2 --hlo step.txt

Needs the `plan` extra (libtpu). Weights are shapes only; the step is the one that `jaxtune.train` runs. Prints one JSON
object: seconds to compile, GiB per chip (arguments, temporaries), the compiler's estimate of a step in cycles, the time
with what the links expose, and the shares of its parts; the text of the optimized module goes to --hlo.
"""

import argparse
import json
import os
import pathlib
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import numpy as np
from jax.experimental import topologies

from jaxtune import adapters, assembly
from jaxtune.batch import AnyBatch, Batch, PairBatch
from jaxtune.config import Config
from jaxtune.cost_model.chips import CHIPS
from jaxtune.cost_model.estimate import estimate
from jaxtune.cost_model.hlo import parse
from jaxtune.cost_model.links import directions
from jaxtune.decode import decode
from jaxtune.optimizer import make_optimizer
from jaxtune.sharding import batch_sharding, make_mesh, parameter_shardings
from jaxtune.step import compile_train_step, initial_state, make_train_step, state_shardings

LLAMA_3_1 = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
SHAPES = {
    "llama-3.1-8b": {**LLAMA_3_1, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32},
    "llama-3.1-70b": {**LLAMA_3_1, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                      "num_attention_heads": 64},
    "llama-small": {**LLAMA_3_1, "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024,
                    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128},
    "mixtral-small": {"model_type": "mixtral", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024,
                      "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
                      "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu",
                      "rope_theta": 1e6, "max_position_embeddings": 32768},
    "gpt-oss-20b": {"model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
                    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
                    "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "rms_norm_eps": 1e-5,
                    "hidden_act": "silu", "attention_bias": True, "rope_theta": 150000.0,
                    "max_position_embeddings": 131072, "tie_word_embeddings": False,
                    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                                     "truncate": False, "original_max_position_embeddings": 4096}},
    "flan-t5-base": {"model_type": "t5", "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048,
                     "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12, "relative_attention_num_buckets": 32,
                     "relative_attention_max_distance": 128, "feed_forward_proj": "gated-gelu",
                     "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False, "decoder_start_token_id": 0},
}  # fmt: skip

LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers")


def compile_step(config: Config, shape: dict, *, devices: list, length: int) -> jax.stages.Compiled:
    """Compiles the update of `config` on a model of `shape` for (abstract) TPU devices."""
    mesh = make_mesh(config.mesh.model_dump(), devices)
    dtype, param_dtype = assembly.resolve_dtypes(config, "tpu")
    plan = assembly.plan_model(shape, config.tuning, param_dtype=param_dtype or dtype, seed=0, where="shape")
    compute, _ = assembly.resolve_compute(config, plan, "tpu")
    optimizer = make_optimizer(config, 1000, plan.trainable)
    abstract = jax.eval_shape(lambda tree: initial_state(optimizer, tree), plan.trainable)
    state = _placed(abstract, state_shardings(optimizer, plan.trainable, mesh))
    frozen = _placed(plan.frozen, parameter_shardings(plan.frozen, mesh))
    where = batch_sharding(mesh)
    ints = jax.ShapeDtypeStruct((config.train.batch_rows, length), np.int32, sharding=where)
    batch: AnyBatch = Batch(ints, ints, ints, ints, jax.ShapeDtypeStruct(ints.shape, np.float32, sharding=where), ints)
    if plan.config.is_encoder_decoder:
        read_shape = (config.train.batch_rows, config.data.encoder_length or length)
        read = jax.ShapeDtypeStruct(read_shape, np.int32, sharding=where)
        batch = PairBatch(read, read, read, *batch)
    print(f"{adapters.count(plan.trainable):,} trained parameters", flush=True)
    with jax.set_mesh(mesh):  # tracing only: nothing can run on devices that are not here
        return compile_train_step(make_train_step(plan.graph, optimizer, compute), state, frozen, batch, platform="tpu")


def _placed(tree: object, shardings: object) -> object:
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)


def main() -> None:
    """Parses the command line, compiles, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--topology", default="v5p:2x2x2")
    parser.add_argument("--rows", type=int, default=2, help="rows per chip (or chips that share rows)")
    parser.add_argument("--length", type=int, default=2048, help="tokens; data.encoder_length: those that are read")
    parser.add_argument("--layers", type=int, help="another depth than the shape's")
    parser.add_argument("--hlo", type=pathlib.Path)
    parser.add_argument("settings", nargs="*", help="further key=value settings")
    options = parser.parse_args()
    topology = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
    devices = list(topology.devices)
    shape = dict(SHAPES[options.shape])
    if options.layers:
        shape |= {name: options.layers for name in LAYERS if name in shape}
    words = ["model.path=shape", "output=none", "data.train.0.path=none", f"tuning.method={options.method}"]
    mesh = make_mesh(decode([*words, *options.settings]).mesh.model_dump(), devices)
    rows = options.rows * len(devices) // mesh.shape["context"]
    config = decode([*words, f"train.batch_rows={rows}", *options.settings])
    start = time.perf_counter()
    compiled = compile_step(config, shape, devices=devices, length=options.length)
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    text = compiled.as_text()
    if options.hlo:
        options.hlo.write_text(text)
    row = options.length + (shape["model_type"] == "t5") * (config.data.encoder_length or options.length)
    tokens = config.train.batch_rows * row // len(devices)
    chip, places = CHIPS[devices[0].device_kind], [device.coords for device in mesh.devices.flat]
    ways = directions(places, [max(side) + 1 for side in zip(*places, strict=True)], mesh.shape, chip)
    costs = estimate(parse(text), chip, mesh=mesh.shape, directions=ways)
    whole = sum(costs.parts.values())
    result = {
        "shape": options.shape,
        "method": options.method,
        "topology": options.topology,
        "jax": jax.__version__,
        "tokens_per_chip": tokens,
        "compile_seconds": round(seconds, 1),
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 2),
        "temporaries_gib": round(memory.temp_size_in_bytes / 2**30, 2),
        "megacycles_per_token": round(costs.cycles / tokens / 1e6, 4),
        "milliseconds": round(costs.seconds * 1e3, 3),
        "exposed_milliseconds": round(costs.exposed * 1e3, 3),
        "parts": {part: round(cycles / whole, 3) for part, cycles in sorted(costs.parts.items())},
        "kernels": {label: calls.number for label, calls in costs.kernels.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
