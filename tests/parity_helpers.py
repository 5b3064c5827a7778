"""What tests of parity with transformers share."""

import numpy as np
import torch
from hf_kinds import WITH_EXPERTS

TOLERANCE = 1e-4
SPARSE_TOLERANCE = 2e-4  # of models with experts
T = 24
FAR = 8500  # beyond the 8,192 positions of Llama 3's first training


def torch_logits(model, tokens, positions=None, mask=None) -> np.ndarray:
    inputs = {"input_ids": torch.tensor(np.asarray(tokens))}
    if positions is not None:
        inputs["position_ids"] = torch.tensor(np.asarray(positions))
    if mask is not None:
        inputs["attention_mask"] = torch.tensor(np.asarray(mask))
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def tokens_of(rows: int, vocab: int = 97, length: int = T) -> np.ndarray:
    return np.random.default_rng(0).integers(3, vocab, (rows, length))


def tolerance_of(kind: str) -> float:
    return SPARSE_TOLERANCE if kind in WITH_EXPERTS else TOLERANCE
