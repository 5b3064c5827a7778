"""A checkpoint of several GiB is loaded without ever being in memory twice, and written the same way."""

import json
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from jaxtune.convert.writing import pack_header

# 2.4 GiB in bfloat16 in 6 files: 16 layers of width 2048, one tensor at most 250 MiB.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

# Anonymous memory is sampled in a thread; files that are mapped do not count.
CHILD = """
import json, sys, threading, time
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)
import jax
from flax import nnx
from jaxtune.convert import hf, writing
from jaxtune.convert.folder import open_folder
from jaxtune.models.decoder import Decoder
from jaxtune.models.registry import family_of
from jaxtune.sharding import make_mesh, parameter_shardings
folder = open_folder(sys.argv[1])
config = family_of(folder.config, where="").read_config(folder.config)
abstract = nnx.state(nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0))))
mesh = make_mesh({"fsdp": len(jax.devices())})
threading.Thread(target=watch, daemon=True).start()
before = anonymous()
state = hf.load_params(folder, abstract, shardings=parameter_shardings(abstract, mesh), dtype_of=hf.file_dtypes(folder))
loaded = peak[0]
size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
peak[0] = 0
writing.export_folder(folder, state, sys.argv[2])
print(json.dumps({"before": before, "loading": loaded, "writing": peak[0], "size": size}))
"""


def write_checkpoint(path: pathlib.Path) -> None:
    """Writes random bytes in the shape of CONFIG, a layer at a time."""
    width, mlp, kv, vocab = 2048, 8192, 1024, 64000
    shards: list[dict[str, list[int]]] = [{"model.embed_tokens.weight": [vocab, width]}]
    for layer in range(16):
        if layer % 4 == 0:
            shards.append({})
        names = {
            "input_layernorm": [width],
            "mlp.down_proj": [width, mlp],
            "mlp.gate_proj": [mlp, width],
            "mlp.up_proj": [mlp, width],
            "post_attention_layernorm": [width],
            "self_attn.k_proj": [kv, width],
            "self_attn.o_proj": [width, width],
            "self_attn.q_proj": [width, width],
            "self_attn.v_proj": [kv, width],
        }
        shards[-1].update({f"model.layers.{layer}.{name}.weight": shape for name, shape in names.items()})
    shards.append({"model.norm.weight": [width], "lm_head.weight": [vocab, width]})
    noise = np.random.default_rng(0).standard_normal(1 << 20).astype(ml_dtypes.bfloat16).tobytes()
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in tensors.items():
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            weight_map[name] = file
            at += size
        total += at
        with open(path / file, "wb") as stream:
            stream.write(pack_header(header))
            for _ in range(at // len(noise)):
                stream.write(noise)
            stream.write(noise[: at % len(noise)])
    (path / "config.json").write_text(json.dumps(CONFIG))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 4])
def test_loading_and_writing_hold_the_shards_and_under_1_gib(devices, tmp_path):
    write_checkpoint(tmp_path)
    env_flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(tmp_path / "out")],
        env={"JAX_PLATFORMS": "cpu", "XLA_FLAGS": env_flags, "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["size"] >= 2 * 2**30
    largest = 2 * 64000 * 2048
    allowed = max(2**30, 2 * largest)
    print({name: f"{value / 2**30:.2f} GiB" for name, value in seen.items()})
    assert seen["loading"] - seen["size"] < allowed
    assert seen["writing"] - seen["size"] < allowed
    for file in sorted(tmp_path.glob("*.safetensors")):
        assert np.array_equal(np.memmap(file), np.memmap(tmp_path / "out" / file.name)), file.name
        (tmp_path / "out" / file.name).unlink()
        file.unlink()
