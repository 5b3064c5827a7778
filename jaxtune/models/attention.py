"""Attention kernels behind one signature, and the table that says which one a device gets.

B batch, T query length, S key length, N query heads, K kv heads, G = N / K query heads per kv head, H head size.

`xla` is the plain reference; the others are libraries' kernels and run the same tests. A kernel that cannot keep
packed examples apart (segments) is refused, whatever its speed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import sharding

LANES = 128  # splash's blocks are multiples of a TPU vector register's lanes
MOST_PARTIAL_SUMS = 8  # of the gradient by the queries, each as large as the queries


def xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attends `[B T N H]` to `[B S K H]`, in plain jax; the softmax is float32 at least.

    A query sees a key of its own segment (0 is padding and sees nothing) whose position is not after its own and, with
    a window, less than `window` before it. A row that sees nothing gives finite numbers without meaning.

    Args:
        v: `[B S K H']`; H' may differ from H.
        softcap: scores s become `softcap * tanh(s / softcap)` (Gemma 2).
        sinks: `[N]`, a score of each head that takes part in the softmax and gives nothing (GPT-OSS).
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    # Queries are split over the mesh's context axis; each device sees all keys of its rows.
    k, v = (sharding.constrain(x, ("batch", None, "kv_heads", None)) for x in (k, v))
    wide = jnp.promote_types(q.dtype, jnp.float32)
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    visible = (distance >= 0) & (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :])
    visible &= (q_segment_ids != 0)[:, :, None]
    if window is not None:
        visible &= distance < window
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=wide) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(wide).min)
    if sinks is not None:
        column = sinks.astype(wide).reshape(1, K, N // K, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(column, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]].astype(v.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(B, T, N, v.shape[-1])
    return checkpoint_name(out, "attention")


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attends as `xla` does, by jax's splash attention kernel for TPU (T and S equal; no cache).

    The kernel masks by *index*: it relies on the positions of a segment standing in the row in order, one after
    another, as packing lays them. Lengths that are no multiple of 128 are padded with segment 0. Over the mesh's
    context axis every device has a part of the queries, which the kernel's mask knows by their index in the whole row,
    and gathers the keys and values.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    if k.shape[1] != T:
        raise ValueError(f"splash attention: found {T} queries and {k.shape[1]} keys; expected equal lengths, use xla")
    mesh = jax.sharding.get_abstract_mesh()
    context = 1 if mesh.empty else mesh.shape["context"]
    padded = -(-T // (LANES * context)) * LANES * context
    grow = [(0, 0), (0, padded - T)]
    q, k, v = (jnp.pad(x, [*grow, (0, 0), (0, 0)]) if padded > T else x for x in (q * scale, k, v))
    segments = jnp.pad(q_segment_ids, grow) if padded > T else q_segment_ids
    q = q.reshape(B, padded, K, N // K, H).transpose(0, 2, 3, 1, 4)  # B K G T H: one MQA call per kv head
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))  # B K S H

    sinks = sinks.astype(jnp.float32).reshape(K, N // K) if sinks is not None else None
    kernel = _splash_kernel(padded, N // K, window, softcap, interpret, context)

    def attend(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, sinks: Any) -> jax.Array:
        whole = segments
        if context > 1:
            k, v = (jax.lax.all_gather(x, "context", axis=2, tiled=True) for x in (k, v))
            whole = jax.lax.all_gather(segments, "context", axis=1, tiled=True)
        ids = splash_attention.SegmentIds(segments, whole)
        by_head = jax.vmap(kernel, in_axes=(0, 0, 0, None, 0))
        return jax.vmap(by_head, in_axes=(0, 0, 0, 0, None))(q, k, v, ids, sinks)

    if not mesh.empty and mesh.size > 1:
        # The compiler cannot split a Pallas call: every device runs the kernel on its rows, heads and queries.
        rows, heads, _, part, _ = sharding.activation_spec(("batch", "kv_heads", None, "seq", None), q.shape, mesh)
        of_q, of_kv = PartitionSpec(rows, heads, None, part), PartitionSpec(rows, heads, part)
        of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, part)))
        attend = jax.shard_map(
            attend,
            in_specs=(of_kernel, of_q, of_kv, of_kv, PartitionSpec(rows, part), PartitionSpec(heads)),
            out_specs=of_q,
            check_vma=False,
        )
    out = attend(kernel, q, k, v, segments, sinks)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, padded, N, v.shape[-1])[:, :T]


def splash_interpreted(*arrays: jax.Array, **options: Any) -> jax.Array:
    """Attends as `splash` does, with the kernel interpreted: slow, and the same on any machine."""
    return splash(*arrays, **options, interpret=True)


def _splash_kernel(
    length: int, group: int, window: int | None, softcap: float | None, interpret: bool, context: int
) -> Any:
    """Makes the kernel for `group` query heads on one kv head, its queries split over `context` devices.

    One backward kernel for dq, dk and dv (fused), and one key block as long as the row there: with several, their dq
    are partial sums in memory that are added afterwards. Rows so long that these would fill the memory have a kernel
    for dq and one for dk and dv.
    """
    mask = _BandMask((length, length), window_size=(None if window is None else window - 1, 0), offset=0)
    q_block, kv_block = _block(length // context, 512), _block(length, 1024)
    long_block = _block(length, 4096)
    is_fused = length // long_block <= MOST_PARTIAL_SUMS
    sizes = splash_attention.BlockSizes(
        block_q=q_block,
        block_kv=kv_block,
        block_kv_compute=_block(kv_block, 512),
        block_q_dkv=q_block,
        block_kv_dkv=long_block,
        block_kv_dkv_compute=_block(long_block, 512),
        block_q_dq=None if is_fused else q_block,
        block_kv_dq=None if is_fused else kv_block,
        use_fused_bwd_kernel=is_fused,
    )
    return splash_attention.make_splash_mqa(
        splash_attention.splash_attention_mask.MultiHeadMask([mask] * group),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=context,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


class _BandMask(splash_attention.LocalMask):
    """Tells of whole blocks by their corners whether all or nothing of them is seen.

    The library looks at every pair of a row: 131,072 tokens are 17 thousand million of them, which takes minutes.
    """

    def __getitem__(self, index: Any) -> np.ndarray:
        (first, end, _), (kv_first, kv_end, _) = (s.indices(n) for s, n in zip(index, self.shape, strict=True))
        nearest, farthest = first - (kv_end - 1), end - 1 - kv_first  # distances from keys to queries
        most = math.inf if self.window_size[0] is None else self.window_size[0]
        if farthest < 0 or nearest > most:
            return np.zeros((1, 1), bool)
        if nearest >= 0 and farthest <= most:
            return np.ones((1, 1), bool)
        return super().__getitem__(index)


def _block(length: int, limit: int) -> int:
    """Returns the largest multiple of 128 that divides `length` and is at most `limit`."""
    return max(size for size in range(LANES, min(length, limit) + 1, LANES) if length % size == 0)


def tokamax(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attends as `xla` does, by tokamax's kernels for GPU.

    Packing is said as the index of the first key that a query may see: where its segment starts, or its window.
    Like splash it relies on the positions of a segment standing in order.
    """
    if sinks is not None:
        raise ValueError("model.attention: found 'tokamax', which has no attention sinks, as this model has; use xla")
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["context"] > 1:
        raise ValueError("model.attention: found 'tokamax', which does not split a row; use xla, or mesh.context=1")
    import tokamax as library

    index = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
    is_start = jnp.pad(q_segment_ids[:, 1:] != q_segment_ids[:, :-1], [(0, 0), (1, 0)], constant_values=True)
    first = jax.lax.cummax(jnp.where(is_start, index, 0), axis=1)
    if window is not None:
        first = jnp.maximum(first, index - (window - 1))
    mask = library.Mask(is_causal=True, k_start=first[:, None, :])
    return library.dot_product_attention(
        q, k, v, scale=scale, mask=mask, logits_soft_cap=softcap, implementation=("triton", "xla")
    )


ATTENTIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": xla,
    "splash": splash,
    "splash_interpreted": splash_interpreted,
    "tokamax": tokamax,
}
REFUSED: dict[str, str] = {
    "cudnn": "jax.nn's cuDNN attention takes no segments, so packed examples would see one another; use tokamax or xla",
    "flash": "a flash kernel without segments would let packed examples see one another; use splash, tokamax or xla",
}
PLATFORMS: dict[str, str] = {"tpu": "splash", "gpu": "tokamax", "cuda": "tokamax", "rocm": "xla", "cpu": "xla"}


def resolve(name: str, *, platform: str) -> tuple[Callable[..., jax.Array], str]:
    """Returns the kernel called `name` for a platform, and a sentence that says which one and why.

    Args:
        name: auto, or a key of `ATTENTIONS`.
        platform: of the mesh's devices (`device.platform`), never of the default back end: plans are compiled for
            devices that are not here.

    Raises:
        ValueError: an unknown name, a kernel that knows no segments, or one that the platform cannot run.
    """
    if name in REFUSED:
        raise ValueError(f"model.attention: found {name!r}; {REFUSED[name]}")
    if name != "auto" and name not in ATTENTIONS:
        raise ValueError(f"model.attention: found {name!r}; expected auto or one of {', '.join(ATTENTIONS)}")
    if platform not in PLATFORMS:
        return xla, f"attention: xla, the plain reference (no kernel is known for platform {platform!r})"
    choice = PLATFORMS[platform] if name == "auto" else name
    if choice == "tokamax":
        missing = _why_no_tokamax()
        if missing and name == "auto":
            return xla, f"attention: xla, the plain reference ({missing})"
        if missing:
            raise ValueError(f"model.attention: found 'tokamax', but {missing}; install jaxtune[cuda] or use xla")
    if choice == "splash" and platform != "tpu":
        if name == "splash" and platform == "cpu":
            return splash_interpreted, "attention: splash, interpreted on CPU (slow; for tests)"
        raise ValueError(
            f"model.attention: found 'splash', which runs on tpu; this mesh is {platform}: use auto or xla"
        )
    why = f"chosen for {platform}" if name == "auto" else "asked for"
    return ATTENTIONS[choice], f"attention: {choice} ({why})"


@functools.cache
def _why_no_tokamax() -> str:
    try:
        import tokamax as library
    except ImportError as error:
        return f"tokamax cannot be imported: {error}"
    return "" if hasattr(library, "Mask") else "this tokamax has no Mask(k_start=...), so it cannot keep segments apart"
