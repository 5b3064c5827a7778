"""Tokens per second of training on a CPU: jaxtune beside Tunix and TRL, in turns, on one 58M-parameter Llama.

    python tools/bench/cpu_tokens_per_second.py --tunix-python PY --trl-python PY [--rounds 3] [--trained 0.5]

PY are interpreters of environments that have google-tunix (0.1.7) or trl (1.16) and peft; ours is the one that runs
this. Each contestant is a process of its own per round: a random Llama (width 512, mlp 1376, 8 layers, 8 heads, 32,000
tokens), float32, batches of 4 rows x 512 random tokens of which the last share (--trained) has a loss. Two updates warm
up, the rest are timed one by one and their median counts. The machine's speed drifts, so ratios are taken within a
round; the table gives their median.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

ROWS, LENGTH, VOCAB = 4, 512, 32000
WARM, TIMED = 2, 6
RANK, ALPHA = 16, 32.0


def batches(trained: float):
    """Yields (tokens int32 [ROWS LENGTH], trained positions bool [ROWS LENGTH]), the same for every contestant."""
    import numpy as np

    rng = np.random.default_rng(0)
    mask = np.arange(LENGTH) >= LENGTH * (1 - trained)
    for _ in range(WARM + TIMED):
        yield rng.integers(3, VOCAB, (ROWS, LENGTH)).astype(np.int32), np.broadcast_to(mask, (ROWS, LENGTH))


def run_jaxtune(method: str, trained: float) -> list[float]:
    """Returns the seconds of each update of ours, through the functions that `jaxtune.train` runs."""
    import jax
    import numpy as np

    from jaxtune import assembly
    from jaxtune.batch import Batch
    from jaxtune.decode import decode
    from jaxtune.optimizer import make_optimizer
    from jaxtune.step import compile_train_step, initial_state, make_train_step

    shape = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 512, "intermediate_size": 1376,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    config = decode(["model.path=x", "output=x", "data.train.0.path=x", f"tuning.method={method}",
                     f"train.batch_rows={ROWS}", "optimizer.schedule=constant"])  # fmt: skip
    dtype, param_dtype = assembly.resolve_dtypes(config, "cpu")
    plan = assembly.plan_model(shape, config.tuning, param_dtype=param_dtype or dtype, seed=0, where="bench")
    optimizer = make_optimizer(config, 100, plan.trainable)
    trainable, frozen = plan.make()
    state = jax.jit(lambda tree: initial_state(optimizer, tree))(trainable)
    compute, _ = assembly.resolve_compute(config, plan, "cpu")
    seconds, compiled = [], None
    for tokens, mask in batches(trained):
        targets = np.roll(tokens, -1, axis=1)
        weights = np.roll(mask, -1, axis=1).astype(np.float32)
        weights[:, -1] = 0
        ones = np.ones_like(tokens)
        batch = Batch(tokens, targets, np.arange(LENGTH, dtype=np.int32) * ones, ones, weights, 0 * ones)
        batch = jax.device_put(batch)
        if compiled is None:
            step = make_train_step(plan.graph, optimizer, compute)
            compiled = compile_train_step(step, state, frozen, batch, device_kind="cpu")
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    return seconds


def run_tunix(method: str, trained: float) -> list[float]:
    """Returns the seconds of each update of Tunix's PeftTrainer."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import qwix
    from flax import nnx
    from tunix.models.llama3 import model as llama
    from tunix.sft import peft_trainer, utils

    config = llama.ModelConfig(
        num_layers=8, vocab_size=VOCAB, embed_dim=512, hidden_dim=1376, num_heads=8, head_dim=64, num_kv_heads=8,
        rope_theta=10000, norm_eps=1e-5,
    )  # fmt: skip
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), devices=jax.devices()[:1], axis_types=automatic)
    with mesh:
        model = llama.Llama3(config, rngs=nnx.Rngs(0))
        if method == "lora":
            pattern = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*"
            provider = qwix.LoraProvider(module_path=pattern, rank=RANK, alpha=ALPHA)
            model = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
        settings = peft_trainer.TrainingConfig(eval_every_n_steps=10**6, max_steps=WARM + TIMED)
        trainer = peft_trainer.PeftTrainer(model, optax.adamw(2e-4), settings)

        def as_input(batch: peft_trainer.TrainingInput) -> dict:
            real = jnp.ones_like(batch.input_tokens, bool)
            return {
                "input_tokens": batch.input_tokens,
                "input_mask": batch.input_mask,
                "positions": utils.build_positions_from_mask(real),
                "attention_mask": utils.make_causal_attn_mask(real),
            }

        trainer = trainer.with_gen_model_input_fn(as_input)
        train_step, _ = trainer.jit_train_and_eval_step(False, True)
        seconds = []
        for tokens, mask in batches(trained):
            data = peft_trainer.TrainingInput(jnp.asarray(tokens), jnp.asarray(np.array(mask)))
            start = time.perf_counter()
            jax.block_until_ready((train_step(data), nnx.state(trainer.model)))
            seconds.append(time.perf_counter() - start)
    return seconds


def run_trl(method: str, trained: float) -> list[float]:
    """Returns the seconds of each update of TRL's SFTTrainer."""
    import tempfile

    import datasets
    import peft
    import tokenizers
    import torch
    import transformers
    import trl

    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=2048,
    ))  # fmt: skip
    rows = [
        {"input_ids": row.tolist(), "completion_mask": [int(x) for x in flags]}
        for tokens, mask in batches(trained)
        for row, flags in zip(tokens, mask, strict=True)
    ]
    vocabulary = {f"t{i}": i for i in range(VOCAB)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="t0", eos_token="t1")
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **options) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args, **options) -> None:
            ends.append(time.perf_counter() - self.start)

    with tempfile.TemporaryDirectory() as folder:
        settings = trl.SFTConfig(
            output_dir=folder, per_device_train_batch_size=ROWS, max_steps=WARM + TIMED, bf16=False, fp16=False,
            use_cpu=True, gradient_checkpointing=False, report_to=[], save_strategy="no", max_length=LENGTH,
            completion_only_loss=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        adapter = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = trl.SFTTrainer(
            model, settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
            callbacks=[Clock()], peft_config=adapter if method == "lora" else None,
        )  # fmt: skip
        trainer.train()
    return ends


RUNNERS = {"jaxtune": run_jaxtune, "tunix": run_tunix, "trl": run_trl}


def measure(python: str, name: str, method: str, trained: float) -> float:
    """Runs one contestant in a process of its own; returns tokens per second."""
    command = [python, __file__, "--one", name, "--method", method, "--trained", str(trained)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name} {method} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["tokens_per_second"]


def main() -> None:
    """Parses the command line; runs one contestant, or all of them in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunix-python")
    parser.add_argument("--trl-python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trained", type=float, default=0.5, help="share of each row's tokens with a loss")
    parser.add_argument("--one", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--method", choices=("full", "lora"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        seconds = RUNNERS[options.one](options.method, options.trained)[WARM:]
        print(json.dumps({"tokens_per_second": ROWS * LENGTH / statistics.median(seconds)}))
        return
    pythons = {"jaxtune": sys.executable, "tunix": options.tunix_python, "trl": options.trl_python}
    print("| method | contestant | tokens/s by round | ours over theirs, median |\n|---|---|---|---|")
    for method in ("full", "lora"):
        found: dict[str, list[float]] = {name: [] for name, python in pythons.items() if python}
        for _ in range(options.rounds):
            for name in found:
                found[name].append(measure(str(pythons[name]), name, method, options.trained))
        for name, speeds in found.items():
            ratio = statistics.median(a / b for a, b in zip(found["jaxtune"], speeds, strict=True))
            print(f"| {method} | {name} | {', '.join(f'{speed:.0f}' for speed in speeds)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
