"""Makes what the quickstart ships with: tasks as JSON lines, a sentencepiece tokenizer, and a model's config.json.

    python tools/make_quickstart.py [FOLDER]      default: jaxtune/assets/quickstart

Everything comes from fixed seeds; a test makes the folder again and compares.
"""

import gzip
import io
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import sentencepiece
import tokenizers
from quickstart_tasks import LETTERS, NAMES, TASK_NAMES, WORDS, records
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "jaxtune" / "assets" / "quickstart"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
END = "<|end|>"
TRAIN_RECORDS, EVAL_RECORDS = 38_000, 380
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "initializer_range": 0.05,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def main(folder: pathlib.Path = FOLDER) -> None:
    """Writes the folder."""
    for name in ("train", "eval"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    train = list(records(TRAIN_RECORDS, seed=1))
    seen = {json.dumps(record["messages"]) for record in train}
    write_lines(folder / "train" / "tasks.jsonl.gz", train)
    for name, seed, held_out in (("examples", 2, False), ("phrasings", 3, True)):
        fresh = (r for r in records(10**9, seed=seed, held_out_phrasing=held_out) if is_fresh(r, seen))
        write_lines(folder / "eval" / f"{name}.jsonl.gz", take_evenly(fresh, EVAL_RECORDS))
    make_tokenizer(folder, [m["content"] for record in train for m in record["messages"]])


def is_fresh(record: dict[str, Any], seen: set[str]) -> bool:
    """True for a record that was not trained on word for word."""
    return json.dumps(record["messages"]) not in seen


def take_evenly(stream: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Returns `count` records with equally many of each task."""
    left = dict.fromkeys(TASK_NAMES, count // len(TASK_NAMES))
    taken = []
    for tries, record in enumerate(stream):
        if left[record["task"]]:
            left[record["task"]] -= 1
            taken.append(record)
        if not any(left.values()) or tries > 400_000:
            break
    return taken


def write_lines(file: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes gzip'd JSON lines whose bytes depend on the rows alone."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, compresslevel=9) as stream:
        for row in rows:
            stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    file.write_bytes(buffer.getvalue())


def make_tokenizer(folder: pathlib.Path, texts: list[str]) -> None:
    """Trains the sentencepiece model and writes it in both forms that other tools read."""
    whole = [f"▁{piece}" for piece in (*WORDS, *NAMES, *LETTERS, *LETTERS.upper(), *"0123456789")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f" {line}" for text in texts[:20_000] for line in text.split("\n")]),
        model_writer=model,
        model_type="bpe",
        vocab_size=1024,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=[*ROLES, END, "\n", *whole],
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    proto = sentencepiece_proto.ModelProto.FromString(model.getvalue())
    pieces = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    write_fast_tokenizer(folder / "tokenizer.json", proto, pieces)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>", "eos_token": END, "unk_token": "<unk>",
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    })  # fmt: skip
    end = pieces[END]
    write_json(folder / "config.json", {**CONFIG, "vocab_size": len(pieces), "eos_token_id": end})
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [end, 2]})


def write_fast_tokenizer(file: pathlib.Path, proto: Any, pieces: dict[str, int]) -> None:
    """Writes the sentencepiece model as tokenizer.json: the same ids, merges ordered as sentencepiece scores them."""
    kinds = proto.pieces[0].Type
    symbols = [p.piece for p in proto.pieces if p.type == kinds.Value("USER_DEFINED")]
    normal = {p.piece for p in proto.pieces if p.type in (kinds.Value("NORMAL"), kinds.Value("USER_DEFINED"))}
    merges = []
    for piece in proto.pieces:
        if piece.type == kinds.Value("NORMAL") and len(piece.piece) > 1:
            splits = [(piece.piece[:i], piece.piece[i:]) for i in range(1, len(piece.piece))]
            both = [pair for pair in splits if pair[0] in normal and pair[1] in normal]
            merges += [(pieces[piece.piece], max(pieces[a], pieces[b]), a, b) for a, b in both]
    merges.sort()
    fast = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=pieces, merges=[(a, b) for *_, a, b in merges], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    fast.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    fast.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    fast.add_special_tokens(["<unk>", "<s>", "</s>", *ROLES, END])
    fast.add_tokens(
        [tokenizers.AddedToken(symbol, normalized=True) for symbol in symbols if symbol not in (*ROLES, END)]
    )
    fast.save(str(file))


def write_json(file: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes indented JSON."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:2]))
