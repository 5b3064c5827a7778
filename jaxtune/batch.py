"""The arrays that travel between data, model and loss.

Letters, the same in every file: B batch rows, T query length, S key length, D model width, F mlp width,
N query heads, K kv heads, H head size, V vocabulary, L layers, r adapter rank.
"""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """One global batch (or one microbatch) of packed rows; every field is `[B T]`.

    A row with two examples, lengths 3 and 2, in T = 6::

        tokens       [a0 a1 a2 b0 b1  0]     the input at each position
        targets      [a1 a2 a3 b1 b2  0]     the token to predict there: already shifted
        positions    [ 0  1  2  0  1  0]     from 0 in each segment
        segment_ids  [ 1  1  1  2  2  0]     1.. per example, 0 is padding
        loss_weights [ 0  1  1  0  1  0]     how much each target counts; any value >= 0
        source_ids   [ 4  4  4  0  0  0]     which source the example came from

    Whether a position is trained is said by `loss_weights` alone, never by a token's value.
    Fields are arrays (numpy on the host, jax on devices) or, where trees are described, specs of them.
    """

    tokens: Any  # int32
    targets: Any  # int32
    positions: Any  # int32
    segment_ids: Any  # int32
    loss_weights: Any  # float32
    source_ids: Any  # int32

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What the model reads, in the order of its arguments."""
        return self.tokens, self.positions, self.segment_ids

    @property
    def token_count(self) -> Any:
        """How many positions hold a token."""
        return (self.segment_ids > 0).sum()

    @property
    def room(self) -> int:
        """How many positions there are, padding included."""
        return int(self.segment_ids.size)


class PairBatch(NamedTuple):
    """One global batch of packed pairs for an encoder-decoder; encoder fields `[B S]`, the others `[B T]`.

    Pairs (8 7 1 -> 4 1) and (2 3 4 1 -> 5 6 1) in S = T = 10::

        encoder_tokens       [8 7 1 2 3 4 1 0 0 0]
        encoder_positions    [0 1 2 0 1 2 3 0 0 0]
        encoder_segment_ids  [1 1 1 2 2 2 2 0 0 0]
        tokens               [0 4 0 5 6 0 0 0 0 0]     targets one to the right, the start token in front
        targets              [4 1 5 6 1 0 0 0 0 0]
        positions            [0 1 0 1 2 0 0 0 0 0]
        segment_ids          [1 1 2 2 2 0 0 0 0 0]
        loss_weights         [1 1 1 1 1 0 0 0 0 0]

    Segment s of the decoder attends to segment s of the encoder of its row.
    """

    encoder_tokens: Any  # int32
    encoder_positions: Any  # int32
    encoder_segment_ids: Any  # int32
    tokens: Any  # int32
    targets: Any  # int32
    positions: Any  # int32
    segment_ids: Any  # int32
    loss_weights: Any  # float32
    source_ids: Any  # int32

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What the model reads, in the order of its arguments."""
        encoder = (self.encoder_tokens, self.encoder_positions, self.encoder_segment_ids)
        return (*encoder, self.tokens, self.positions, self.segment_ids)

    @property
    def token_count(self) -> Any:
        """How many positions hold a token, on both sides."""
        return (self.encoder_segment_ids > 0).sum() + (self.segment_ids > 0).sum()

    @property
    def room(self) -> int:
        """How many positions there are on both sides, padding included."""
        return int(self.encoder_segment_ids.size + self.segment_ids.size)


AnyBatch = Batch | PairBatch


class ExampleId(NamedTuple):
    """Names one example of the stream: row `row` of source `source`, seen for the `epoch`-th time (from 0)."""

    source: int
    row: int
    epoch: int


class HostBatch(NamedTuple):
    """Rows of one step as the data path gives them on a host, before they become device arrays.

    `arrays` holds numpy `[rows T]` (and `[rows S]` for an encoder); `examples[i][s - 1]` names the example that is
    segment s of row i.
    """

    arrays: AnyBatch
    examples: tuple[tuple[ExampleId, ...], ...]
