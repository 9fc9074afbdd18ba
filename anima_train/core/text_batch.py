"""The conditions that the text side hands to the image side: as they are cached, and as batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from anima_train.core.tensor_fields import TensorFields

CONTEXT_ROWS = 512  # cross-attention sees at least this many rows; those past the caption are zeros, and count
MAX_TOKENS = 512  # of a caption that are read, of Qwen3's and T5's each; the reference trainer's limit
QWEN_POSITIONS = 32_768  # tokens that Qwen3-0.6B reads; T5's ids and the LLM adapter have no limit of their own
T5_TOKENS = 2048  # that T5-XXL may read: its attention of 128 heads is whole in memory, 2.1 GB then
ROW_MULTIPLE = 16  # of a folded context's rows: never one alone, which a compiler takes for another kind
T5_PAD = 0  # the id of <pad>


@dataclass(frozen=True)
class EncodedText:
    """The output of the text encoder and of T5's tokenizer for one caption, without padding; on the CPU."""

    source: Float[Tensor, "S D"]  # last hidden states after the final norm, float32; Qwen3's of "" have no row
    t5_ids: Int[Tensor, " L"]  # int64


@dataclass(frozen=True)
class TextStates(TensorFields):
    """The input of the LLM adapter for a batch, padded on the right; masks are True at real rows."""

    source: Float[Tensor, "B S D"]
    source_mask: Bool[Tensor, "B S"]
    t5_ids: Int[Tensor, "B L"]
    t5_mask: Bool[Tensor, "B L"]
    bias: Float[Tensor, "B 1 1 L"] | None = None  # of the LLM adapter's rows, see `row_bias`


@dataclass(frozen=True)
class TextContext(TensorFields):
    """The rows that cross-attention sees, of which the last are zeros, all in one batch, and only counted."""

    rows: Float[Tensor, "B L C"]
    num_zeros: int  # rows of zeros after these
    bias: Float[Tensor, "B 1 1 L"] | None = None  # on the logits of the rows, see `row_bias`


def row_bias(lengths: Sequence[int]) -> Float[Tensor, "B 1 1 L"] | None:
    """Return what hides from each caption the rows that are there for a longer one alone; None if there are none.

    A caption has as many rows as it has tokens, but at least `CONTEXT_ROWS`, whatever else is in its batch: 0 at those
    rows, minus infinity behind them.
    """
    own = [max(CONTEXT_ROWS, length) for length in lengths]
    if min(own) == max(own):
        return None
    is_own = length_mask(own, torch.empty(len(own), max(own)))
    return torch.zeros(is_own.shape).masked_fill(~is_own, -math.inf)[:, None, None]


def fold_rows(context: Float[Tensor, "B L C"], bias: Float[Tensor, "B 1 1 L"] | None = None) -> TextContext:
    """Return the rows, rounded up to a multiple of `ROW_MULTIPLE`, and how many zeros follow up to `CONTEXT_ROWS`.

    Where captions are longer than that, nothing is rounded, and no zeros follow; `bias` is of their rows.
    """
    length = context.shape[1]
    total = max(CONTEXT_ROWS, length)
    rounded = min(-(-length // ROW_MULTIPLE) * ROW_MULTIPLE, total)
    return TextContext(F.pad(context, (0, 0, 0, rounded - length)), total - rounded, bias)


def pad_rows(context: Float[Tensor, "B L C"]) -> Float[Tensor, "B rows C"]:
    """Append rows of zeros up to `CONTEXT_ROWS`; longer contexts stay as they are."""
    return F.pad(context, (0, 0, 0, max(0, CONTEXT_ROWS - context.shape[1])))


def pad_states(texts: Sequence[EncodedText]) -> TextStates:
    """Return the batch of these texts; padded rows are zero (of states) or `T5_PAD` (of ids) and masked.

    A batch of empty captions only gets one masked row, because attention over no rows at all is not defined.
    """
    source = pad_sequence([text.source for text in texts], batch_first=True)  # (B, S, D)
    if source.shape[1] == 0:
        source = source.new_zeros(len(texts), 1, source.shape[2])
    t5_ids = pad_sequence([text.t5_ids for text in texts], batch_first=True, padding_value=T5_PAD)  # (B, L)
    return TextStates(
        source=source,
        source_mask=length_mask([len(text.source) for text in texts], source),
        t5_ids=t5_ids,
        t5_mask=length_mask([len(text.t5_ids) for text in texts], t5_ids),
        bias=row_bias([len(text.t5_ids) for text in texts]),
    )


def length_mask(lengths: Sequence[int], padded: Tensor) -> Bool[Tensor, "B S"]:
    """Return a mask that is True at the first `lengths[b]` positions of row b of a padded (B, S, ...) tensor."""
    positions = torch.arange(padded.shape[1], device=padded.device)
    return positions < torch.tensor(lengths, device=padded.device)[:, None]
