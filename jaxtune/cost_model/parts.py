"""The part of a step that an op belongs to, by the functions on its stack frame."""

from collections.abc import Mapping

from jaxtune.cost_model.hlo import Instruction, Module

COLLECTIVES = "collectives"
OTHER = "other"
# The innermost of an op's functions that is named here decides. What the loss's function says is of the model but of no
# part of it: residuals, what is saved for the backward pass, layers taken out of their stack.
PARTS: Mapping[str, str] = {
    "low_rank": "adapters",
    "low_rank_rows": "adapters",
    "Attention.__call__": "attention",
    "Attention.keys_and_values": "attention",
    "LatentAttention.__call__": "attention",
    "relative_buckets": "attention",
    "same_segment": "attention",
    "rope_tables": "attention",
    "Mlp.__call__": "mlp",
    "SparseMlp.__call__": "experts",
    "Embedding.__call__": "embedding",
    "token_losses": "head",
    "RMSNorm.__call__": "norms",
    "LayerNorm.__call__": "norms",
    "Norm.__call__": "norms",
    "make_loss.<locals>.loss_sum": OTHER,
    "make_train_step.<locals>.train_step": "optimizer",
}


def part_of(module: Module, instruction: Instruction) -> str:
    """Returns the part of the step that an op belongs to; "other" is what no function tells.

    A fusion that says nothing itself belongs where the first of its ops does that says something.
    """
    frames = (one.frame for one in (instruction, *module.inside(instruction)))
    functions = module.functions.get(next(filter(None, frames), 0), ())
    return next((PARTS[name] for name in functions if name in PARTS), OTHER)
