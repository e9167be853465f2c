"""Which window of which source each sample of a run is: pure integer arithmetic, with no state but the sample's number.

Low-discrepancy interleaving by weight chooses the source; a keyed permutation of the source's windows, a new one in
each of its epochs, chooses the window.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FEISTEL_ROUNDS = 4
"""Luby and Rackoff 1988: four rounds of a pseudorandom function make a pseudorandom permutation."""
WEIGHT_BITS = 30
"""Weights become fractions of 2**WEIGHT_BITS, so that the interleaving is exact integer arithmetic."""

Uint64s = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]


def sample_places(
    sample_N: Int64s, weights: Sequence[float], num_windows: Sequence[int], seed: int
) -> tuple[Int64s, Int64s]:
    """Source and window of any samples."""
    source_N, ordinal_N = interleave(sample_N, weights)
    window_N = np.zeros(len(sample_N), dtype=np.int64)
    for source, size in enumerate(num_windows):
        mine = source_N == source
        if mine.any():
            epoch_N, index_N = np.divmod(ordinal_N[mine], size)
            window_N[mine] = permute(index_N, size, _epoch_keys(seed, source, epoch_N))
    return source_N, window_N


def interleave(sample_N: Int64s, weights: Sequence[float]) -> tuple[Int64s, Int64s]:
    """Which source each sample comes from, and how many samples of that source came before it.

    Any first n samples hold each source's share of n to within one per source, with no memory but n: sample r of
    those still unclaimed goes to a source of share s where floor(r s) steps up; the rest are numbered anew and
    offered to the next source.
    """
    left_N = sample_N.copy()
    source_N = np.full(len(sample_N), len(weights) - 1, dtype=np.int64)
    unclaimed_N = np.ones(len(sample_N), dtype=bool)
    for source, weight in enumerate(weights[:-1]):
        fraction = _fraction(weight, weights[source:])
        before_N = (left_N * fraction) >> WEIGHT_BITS
        claimed_N = unclaimed_N & ((((left_N + 1) * fraction) >> WEIGHT_BITS) > before_N)
        source_N[claimed_N] = source
        unclaimed_N &= ~claimed_N
        left_N = np.where(claimed_N, before_N, np.where(unclaimed_N, left_N - before_N, left_N))
    return source_N, left_N


def samples_before(sample: int, weights: Sequence[float]) -> list[int]:
    """How many of the first `sample` samples come from each source: what `interleave` would count."""
    counts = []
    for source, weight in enumerate(weights[:-1]):
        counts.append(sample * _fraction(weight, weights[source:]) >> WEIGHT_BITS)
        sample -= counts[-1]
    return [*counts, sample]


def permute(index_N: Int64s, size: int, key_N: Uint64s) -> Int64s:
    """Where a pseudorandom permutation of range(size), chosen by the key, sends each index.

    A Feistel network permutes the next power of four; indices that land outside are sent on until they land inside.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    round_keys = [_mix(key_N + np.uint64(number + 1)) for number in range(FEISTEL_ROUNDS)]
    value_N = _u64(index_N)
    outside_N = np.ones(len(value_N), dtype=bool)
    while outside_N.any():
        left, right = value_N[outside_N] >> half_bits, value_N[outside_N] & mask
        for keys in round_keys:
            left, right = right, left ^ (_mix(right + keys[outside_N]) & mask)
        value_N[outside_N] = (left << half_bits) | right
        outside_N = value_N >= np.uint64(size)
    return value_N.astype(np.int64)


def _fraction(weight: float, of: Sequence[float]) -> int:
    return round(weight / (sum(of) or 1.0) * (1 << WEIGHT_BITS))


def _epoch_keys(seed: int, source: int, epoch_N: Int64s) -> Uint64s:
    """One key per epoch of each source."""
    key = _mix(_mix(np.array([seed], dtype=np.uint64)) + np.uint64(source))
    return _mix(key + _u64(epoch_N))


def _mix(value_N: Uint64s) -> Uint64s:
    """The finalizer of splitmix64: every input bit moves every output bit. Source: Steele et al., OOPSLA 2014."""
    with np.errstate(over="ignore"):
        value_N = (value_N ^ (value_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value_N = (value_N ^ (value_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value_N ^ (value_N >> np.uint64(31))


def _u64(value_N: Int64s) -> Uint64s:
    return value_N.astype(np.uint64)
