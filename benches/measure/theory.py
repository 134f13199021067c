"""What no codec reaches, and what simple ones do: the Gaussian bound, ideal scalar quantization, round to nearest."""

import numpy as np

from .checkpoint import energy, relative_squared_error, weight_count
from .curve import Point

SCALE_CLASSES = 64
LEAST_CLASS = 1 << 15
"""Matrix weights in a class: with fewer, the entropy of the counts would flatter."""


def row_mean_squares(weights):
    """Mean square and length of every row of every matrix."""
    squares = [np.square(values, dtype=np.float64).mean(axis=1) for values in weights.values()]
    lengths = [np.full(values.shape[0], values.shape[1]) for values in weights.values()]
    return np.concatenate(squares), np.concatenate(lengths)


def gaussian_bound(weights, bits):
    """Least relative squared error at `bits` per matrix weight, were each row Gaussian and white with its own scale,
    known for nothing: reverse water-filling over rows.

    Weights that are not like that, and scales of columns too, may allow less: a yardstick, not a theorem about them.
    """
    squares, lengths = row_mean_squares(weights)
    total = (squares * lengths).sum()
    low, high = -200.0, float(np.log2(squares.max()))
    for _ in range(100):
        water = (low + high) / 2
        rate = (lengths * np.maximum(0, np.log2(np.maximum(squares, 2.0**-300)) - water) / 2).sum() / lengths.sum()
        low, high = (water, high) if rate > bits else (low, water)
    return float((lengths * np.minimum(squares, 2**water)).sum() / total)


class ScalarQuantization:
    """Ideal entropy-coded scalar quantization: one uniform step, round to nearest, values rebuilt at centroids, and
    codes at their order-0 entropy given the scale of their row (in up to 64 classes of equal size). Scales, tables and
    centroids cost nothing here, which no real codec can do.
    """

    def __init__(self, weights):
        self.weights = weights
        squares, lengths = row_mean_squares(weights)
        self.energy = float((squares * lengths).sum())
        order = np.argsort(squares, kind="stable")
        class_size = max(LEAST_CLASS, -(-lengths.sum() // SCALE_CLASSES))
        self.classes = np.empty(len(order), np.int64)
        self.classes[order] = (np.cumsum(lengths[order]) - 1) // class_size

    def point(self, step):
        """Rate and error with this step."""
        entropy, error, first_row = 0.0, self.energy, 0
        by_class = {}
        for values in self.weights.values():
            codes = np.rint(values / np.float32(step)).astype(np.int32)
            rows = self.classes[first_row : first_row + len(values)]
            first_row += len(values)
            for row_class in np.unique(rows):
                chosen = rows == row_class
                by_class.setdefault(row_class, []).append((codes[chosen].ravel(), values[chosen].ravel()))
        for pieces in by_class.values():
            codes, values = (np.concatenate(piece) for piece in zip(*pieces, strict=True))
            codes -= codes.min()
            counts = np.bincount(codes)
            sums = np.bincount(codes, values)[counts > 0]
            counts = counts[counts > 0]
            entropy += float((counts * np.log2(codes.size / counts)).sum())
            # Rebuilt at centroids, a cell keeps the squared error of its energy less its mean's.
            error -= float((sums**2 / counts).sum())
        return Point(entropy / weight_count(self.weights), error / self.energy, f"step {step:.4g}")

    def near(self, bits):
        """The point at about this many bits per matrix weight."""
        step = np.sqrt(self.energy / weight_count(self.weights)) * 4.13 / 2**bits
        for _ in range(4):
            point = self.point(step)
            if abs(point.bits - bits) < 0.01:
                break
            step *= 2 ** (point.bits - bits)
        return point


def round_to_nearest(weights, bits, group=128):
    """Integers of `bits` in groups along the rows, each with an F16 scale and a zero point of as many bits."""
    decoded, stored_bits = {}, 0
    for name, values in weights.items():
        decoded[name] = np.empty_like(values)
        for start in range(0, values.shape[1], group):
            chunk = values[:, start : start + group]
            low, high = np.minimum(chunk.min(1, keepdims=True), 0), np.maximum(chunk.max(1, keepdims=True), 0)
            scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
            scale = np.maximum(scale, np.float32(2**-24))
            zero = np.clip(np.rint(-low / scale), 0, 2**bits - 1)
            codes = np.clip(np.rint(chunk / scale) + zero, 0, 2**bits - 1)
            decoded[name][:, start : start + group] = (codes - zero) * scale
            stored_bits += bits * chunk.size + (16 + bits) * len(chunk)
    return Point(
        stored_bits / weight_count(weights), relative_squared_error(weights, decoded), f"RTN int{bits} g{group}"
    )


COLUMN_GROUP = 32
"""Columns that would share a scale: neighbours once columns are sorted by it."""
COLUMN_BITS = 5
"""What the place of a column in that order would take, about."""
CLASSES_PER_OCTAVE = 4


def column_context_gain(weights, error):
    """Bits per matrix weight that tables chosen by row and column scale would save over tables chosen by row scale, for
    the codes of a uniform scalar quantizer with this relative squared error; negative where columns cost more than that.
    """
    step = np.sqrt(12 * error * energy(weights) / weight_count(weights))
    by_row, by_both, side = {}, {}, 0
    for values in weights.values():
        rows = np.sqrt(np.square(values, dtype=np.float64).mean(axis=1)) + 1e-30
        columns = np.sqrt(np.square(values / rows[:, None]).mean(axis=0)) + 1e-30
        order = np.argsort(columns)
        for start in range(0, len(order), COLUMN_GROUP):
            group = order[start : start + COLUMN_GROUP]
            columns[group] = np.sqrt(np.square(columns[group]).mean())
        codes = np.rint(values / step).astype(np.int64)
        count_by_class(by_row, codes, np.broadcast_to(rows[:, None], codes.shape))
        count_by_class(by_both, codes, rows[:, None] * columns)
        side += COLUMN_BITS * values.shape[1]
    return (total_entropy(by_row) - total_entropy(by_both) - side) / weight_count(weights)


def count_by_class(counted, codes, scales):
    """Adds the counts of `codes` to those of their scale's class."""
    classes = np.rint(CLASSES_PER_OCTAVE * np.log2(scales)).astype(np.int64)
    for scale_class in np.unique(classes):
        found, counts = np.unique(codes[classes == scale_class], return_counts=True)
        of_class = counted.setdefault(int(scale_class), {})
        for code, count in zip(found.tolist(), counts.tolist()):
            of_class[code] = of_class.get(code, 0) + count


def total_entropy(counted):
    """Bits of all symbols at the entropy of their class."""
    bits = 0.0
    for of_class in counted.values():
        counts = np.array(list(of_class.values()), np.float64)
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    return bits
