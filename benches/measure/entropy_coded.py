"""Baselines of the paper's Figure 3 whose indices are entropy-coded (G.5): residual vector quantization, pruning and
quantization. Small references of our own, in numpy, over all matrices of a model.

Codes are charged at their order-0 entropy and tables at 16 bits an entry, which a real coder reaches within a thousandth.
"""

import numpy as np

from .weight_only import SCALE_BITS, half, symmetric_codes

TABLE_BITS = 16
TRAINING_VECTORS = 1 << 16
ITERATIONS = 12
CHUNK = 1 << 14
PRUNED_BLOCK = 16
SEED = 1


def entropy_bits(codes, symbols):
    """Bits of codes from 0 to `symbols` - 1 at their entropy, the table included."""
    counts = np.bincount(codes, minlength=symbols)
    counts = counts[counts > 0].astype(np.float64)
    return float((counts * np.log2(codes.size / counts)).sum()) + TABLE_BITS * symbols


def residual_vectors(weights, stages, index_bits, length):
    """Residual vector quantization: vectors of `length` neighbours, rows first brought to one scale, each the sum of a
    codeword from each of `stages` codebooks of two to the `index_bits` entries, trained by k-means on what the stages before
    leave and shared by all matrices. Returns the bits and the values that come back.
    """
    pieces, scales, bits = [], {}, 0.0
    for name, values in weights.items():
        scales[name] = half(np.sqrt(np.square(values).mean(1, keepdims=True)))
        normed = (values / scales[name]).ravel()
        pieces.append(np.pad(normed, (0, -normed.size % length)).reshape(-1, length).astype(np.float32))
        bits += SCALE_BITS * len(values)
    remaining = np.concatenate(pieces)
    decoded = np.zeros_like(remaining)
    random = np.random.default_rng(SEED)
    for _ in range(stages):
        chosen = random.choice(len(remaining), min(TRAINING_VECTORS, len(remaining)), replace=False)
        codebook = half_signed(means(remaining[chosen], 1 << index_bits, random))
        indices = assigned(remaining, codebook)
        decoded += codebook[indices]
        remaining -= codebook[indices]
        bits += entropy_bits(indices, len(codebook)) + SCALE_BITS * codebook.size
    given_back, start = {}, 0
    for (name, values), piece in zip(weights.items(), pieces, strict=True):
        flat = decoded[start : start + len(piece)].ravel()[: values.size]
        given_back[name] = flat.reshape(values.shape) * scales[name]
        start += len(piece)
    return bits, given_back


def half_signed(values):
    """Values as F16 keeps them."""
    return values.astype(np.float16).astype(np.float32)


def means(vectors, count, random):
    """Codewords by k-means; one that nothing is nearest to starts again at a random vector."""
    codebook = vectors[random.choice(len(vectors), count, replace=False)]
    for _ in range(ITERATIONS):
        indices = assigned(vectors, codebook)
        sums = np.stack([np.bincount(indices, axis, count) for axis in vectors.T], axis=1)
        counts = np.bincount(indices, minlength=count)
        codebook = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        empty = counts == 0
        codebook[empty] = vectors[random.choice(len(vectors), empty.sum())]
    return codebook


def assigned(vectors, codebook):
    """Index of the nearest codeword of each vector."""
    offsets = np.square(codebook).sum(1)
    indices = np.empty(len(vectors), np.int64)
    for start in range(0, len(vectors), CHUNK):
        chunk = slice(start, start + CHUNK)
        indices[chunk] = (offsets - 2 * vectors[chunk] @ codebook.T).argmin(1)
    return indices


def pruned(weights, bits_kept, share=0.5):
    """Blocks of 16 neighbours in a row, that `share` of them with the least energy in each matrix set to zero, the others as
    integers of `bits_kept` with a scale per row, entropy-coded; a bit a block says which are kept. No retraining.
    """
    bits, given_back = 0.0, {}
    for name, values in weights.items():
        flat = np.pad(values, ((0, 0), (0, -values.shape[1] % PRUNED_BLOCK)))
        blocks = flat.reshape(len(values), -1, PRUNED_BLOCK)
        energies = np.square(blocks).sum(2)
        kept = np.zeros(energies.size, bool)
        kept[np.argsort(-energies, axis=None, kind="stable")[: round(energies.size * (1 - share))]] = True
        kept = kept.reshape(energies.shape)
        codes, scales = symmetric_codes((blocks * kept[..., None]).reshape(flat.shape), bits_kept)
        decoded = codes * scales
        given_back[name] = np.ascontiguousarray(decoded[:, : values.shape[1]]).astype(np.float32)
        held = codes.reshape(blocks.shape)[kept].astype(np.int64).ravel() + 2 ** (bits_kept - 1)
        bits += entropy_bits(held, 2**bits_kept) + kept.size + SCALE_BITS * len(values)
    return bits, given_back
