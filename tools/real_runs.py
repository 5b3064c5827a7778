"""Real runs whose figures stand in docs/performance.md: small ones on real records, and one with a billion parameters.

    python tools/real_runs.py small DATA [--steps 300] [--work runs/real]
    python tools/real_runs.py billion DATA [--work runs/real]

DATA is a folder with models/stories260K, tokenizer/llama2_hf, alpaca, dolly and gsm8k. `small` tunes the 260K-parameter
Llama with LoRA and with all weights on each of the three sources, then opens what was written in transformers and
PEFT (the `test` extra) and compares logits with our own. `billion` writes a random checkpoint of Llama-3.2-1B's shape,
takes two LoRA steps, exports, and says the most memory that took.
"""

import argparse
import json
import pathlib
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from jaxtune import assembly
from jaxtune.config import TuningConfig
from jaxtune.convert.folder import open_folder
from jaxtune.convert.hf import load_params, name_table
from jaxtune.convert.writing import pack_header
from jaxtune.decode import decode
from jaxtune.models.attention import xla
from jaxtune.models.registry import family_of
from jaxtune.train import train

SOURCES = {
    "alpaca": "alpaca/alpaca_random_9k.jsonl.gz",
    "dolly": "dolly/dolly_filtered.jsonl.gz",
    "gsm8k": "gsm8k/train.jsonl",
}
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 500000.0, "tie_word_embeddings": True,
    "max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip


def small(data: pathlib.Path, work: pathlib.Path, steps: int) -> None:
    """Prints a line for each of the six runs."""
    print("| data | method | loss, first 10 | loss, last 10 | held-out | hf: logits | adapter: logits | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name, file in SOURCES.items():
        for method in ("lora", "full"):
            output = work / f"{name}-{method}"
            shutil.rmtree(output, ignore_errors=True)
            start = time.perf_counter()
            rate = {"lora": 2e-3, "full": 1e-3}[method]
            result = train(decode([
                f"model.path={data}/models/stories260K", f"data.train.0.path={data}/{file}", f"output={output}",
                f"tuning.method={method}", f"optimizer.learning_rate={rate}", f"train.steps={steps}",
                "train.batch_rows=4", "data.max_length=256", "data.template=alpaca", "data.overlong=truncate_right",
                "data.eval_fraction=0.01", "data.on_bad_row=skip", "log.every_steps=1",
                f"eval.every_steps={steps}",
            ]))  # fmt: skip
            seconds = time.perf_counter() - start
            records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
            losses = [record["loss"] for record in records if "loss" in record]
            merged, adapter = compare(data / "models/stories260K", output)
            print(
                f"| {name} | {method} | {np.mean(losses[:10]):.3f} | {np.mean(losses[-10:]):.3f} | "
                f"{result.eval_loss:.3f} | {merged:.1e} | {adapter} | {seconds:.0f} |",
                flush=True,
            )


def compare(base: pathlib.Path, output: pathlib.Path) -> tuple[float, str]:
    """Returns the largest differences between our logits and those of transformers and of PEFT."""
    import peft
    import torch
    import transformers

    tokens = np.random.default_rng(0).integers(3, 500, (2, 64))
    ours = our_logits(output / "hf", tokens)
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(output / "hf", dtype=torch.float32)
        merged = float(np.abs(model(torch.tensor(tokens)).logits.numpy() - ours).max())
        if not (output / "adapter").is_dir():
            return merged, "-"
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = peft.PeftModel.from_pretrained(model, output / "adapter").eval()
        return merged, f"{float(np.abs(adapted(torch.tensor(tokens)).logits.numpy() - ours).max()):.1e}"


def our_logits(path: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """Returns `[B T V]` float32 logits of a folder, by our own decoder."""
    folder = open_folder(path)
    plan = assembly.plan_model(
        folder.config, TuningConfig(method="full"), param_dtype=jnp.float32, seed=0, where=str(path)
    )
    model = nnx.merge(plan.graph, load_params(folder, plan.trainable), plan.frozen)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model(jnp.asarray(tokens), positions, jnp.ones_like(positions), compute_dtype=jnp.float32, attention=xla)
    return np.asarray(model.logits(hidden))


def billion(data: pathlib.Path, work: pathlib.Path) -> None:
    """Prints the seconds and the peak memory of import, two steps and export."""
    folder = work / "llama-1b"
    write_random_checkpoint(folder, LLAMA_3_2_1B, tokenizer=data / "tokenizer/llama2_hf")
    output = work / "billion"
    shutil.rmtree(output, ignore_errors=True)
    start = time.perf_counter()
    result = train(decode([
        f"model.path={folder}", f"data.train.0.path={data}/{SOURCES['gsm8k']}", f"output={output}", "train.steps=2",
        "train.batch_rows=1", "data.max_length=256", "data.template=alpaca", "data.overlong=truncate_right",
        "log.every_steps=1",
    ]))  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = sum(file.stat().st_size for file in (output / "hf").iterdir()) / 2**30
    print(json.dumps({
        "steps": result.step, "loss": result.loss, "seconds": round(time.perf_counter() - start),
        "peak_resident_gib": round(peak, 2), "exported_gib": round(size, 2),
    }))  # fmt: skip


def write_random_checkpoint(folder: pathlib.Path, config: dict, *, tokenizer: pathlib.Path) -> None:
    """Writes a checkpoint of random bfloat16 weights, one tensor in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    family = family_of(config, where=folder)
    decoder = family.read_config(config)
    plan = assembly.plan_model(config, TuningConfig(method="full"), param_dtype=jnp.bfloat16, seed=0, where="shape")
    leaves = {path: variable.get_value() for path, variable in nnx.to_flat_state(plan.trainable)}
    shapes = {}
    for name, place in name_table(family, decoder).items():
        if not place.optional:
            shape = leaves[place.path].shape[len(place.index) :]
            shapes[name] = shape[::-1] if place.transpose else shape
    header, at = {}, 0
    for name, shape in shapes.items():
        stop = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(pack_header({"__metadata__": {"format": "pt"}, **header}))
        for name, shape in shapes.items():
            values = rng.standard_normal(shape, np.float32) * 0.02 + ("norm" in name)
            stream.write(values.astype(ml_dtypes.bfloat16).tobytes())


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("small", "billion"))
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/real"))
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    if options.which == "small":
        small(options.data, options.work, options.steps)
    else:
        billion(options.data, options.work)


if __name__ == "__main__":
    main()
