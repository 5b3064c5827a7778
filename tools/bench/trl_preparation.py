"""TRL's preparation of conversations, timed: what ours is measured beside. Runs where trl is installed."""

import tempfile
import time
from typing import Any

LENGTH = 2048
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def run_trl(file: str, tokenizer: str, workers: str = "2") -> dict[str, float]:
    """Rows a second of SFTTrainer's preparation: prompt and completion, the loss on the completion, packed."""
    import datasets
    import transformers
    import trl

    datasets.disable_caching()
    rows = datasets.load_dataset("json", data_files=file, split="train")
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template, loaded.pad_token = CHATML, loaded.eos_token
    shape = transformers.LlamaConfig(
        vocab_size=len(loaded), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    seconds = []
    prepare = trl.SFTTrainer._prepare_dataset

    def timed(*given: Any, **more: Any) -> Any:
        began = time.perf_counter()
        made = prepare(*given, **more)
        seconds.append(time.perf_counter() - began)
        return made

    trl.SFTTrainer._prepare_dataset = timed
    with tempfile.TemporaryDirectory() as output:
        settings = trl.SFTConfig(
            output_dir=output, packing=True, max_length=LENGTH, dataset_num_proc=int(workers), report_to="none",
            use_cpu=True, bf16=False,
        )  # fmt: skip
        trl.SFTTrainer(transformers.LlamaForCausalLM(shape), args=settings, train_dataset=rows, processing_class=loaded)
    return {"rows_per_second": len(rows) / sum(seconds)}
