"""Which document each token of a sequence belongs to, in the three forms that attention and positions need.

Invariant: a sequence has at most `max_documents` of them. What comes after belongs to the last one, whatever the world
size and the micro-batch, so that shapes can be fixed and memory is bounded (nanochat's ran out of it until it was).
Shapes: B sequences of T tokens, N = B x T.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


def number_documents(start_D: Int64s, first_B: Int64s, length: int, max_documents: int) -> Int32s:
    """Number of the document, 0 for the first of its row, of the `length` tokens from each of `first_B` on.

    Args:
        start_D: Where documents begin, ascending, in the same count as `first_B`.
    """
    low_B, high_B = np.searchsorted(start_D, first_B, "right"), np.searchsorted(start_D, first_B + length, "left")
    count_B = high_B - low_B
    row_M = np.repeat(np.arange(len(first_B)), count_B)
    within_M = np.arange(len(row_M)) - np.repeat(np.cumsum(count_B) - count_B, count_B)
    begins_BT = np.zeros((len(first_B), length), dtype=np.int32)
    begins_BT[row_M, start_D[low_B[row_M] + within_M] - first_B[row_M]] = 1
    return np.minimum(np.cumsum(begins_BT, axis=1, dtype=np.int32), np.int32(max_documents - 1))


def document_positions(documents_BT: Tensor) -> Tensor:
    """Distance of each token from the first of its document in the row: B x T, int64."""
    at_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    return at_T - torch.where(_begins(documents_BT), at_T, 0).cummax(dim=1).values


def document_offsets(documents_BT: Tensor, max_documents: int) -> Tensor:
    """Where documents begin among the N tokens of all rows, as variable-length attention wants it: int32.

    Always B x max_documents + 1 long: behind the last document every entry is N, so that the rest are empty.
    """
    B, T = documents_BT.shape
    begins_N = _begins(documents_BT).flatten()
    place_N = begins_N.cumsum(0) - 1
    offsets = torch.full((B * max_documents + 1,), B * T, dtype=torch.int32, device=documents_BT.device)
    at_N = torch.arange(B * T, dtype=torch.int32, device=documents_BT.device)
    return offsets.scatter_reduce(0, place_N, at_N, reduce="amin")


def _begins(documents_BT: Tensor) -> Tensor:
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return begins_BT
