"""Quantizers that the paper's Table 2 and Figure 3 compare with (G.5): small references of our own, in numpy.

Of the packages that users have for these, llmcompressor 0.14 pins older versions of PyTorch and transformers than the
readers here, and NNCodec an older numpy than it; AutoAWQ had its last release in 2025; GPTQModel was not tried. Each
function takes one matrix `[outputs, inputs]`, with `activations.Inputs` where it needs them, and returns a `Quantized`: the
values that come back, and the bits that they take with all that decoding needs, scales being F16.
"""

from dataclasses import dataclass

import numpy as np

SCALE_BITS = 16
GROUP = 128
SHRINKS = np.geomspace(1, 0.08, 40)
"""Shares of the greatest magnitude that are tried as the end of the range."""
DAMPING = 0.01
ALPHAS = np.linspace(0, 1, 21)
"""Exponents of AWQ's scales that are tried."""
CLIPS = np.linspace(1, 0.55, 10)


@dataclass
class Quantized:
    """A matrix as a quantizer gives it back."""

    values: np.ndarray
    bits: float


def symmetric(values, bits, per_channel):
    """Integers of `bits`, one scale per tensor or per output channel, chosen for the least squared error."""
    rows = values if per_channel else values.reshape(1, -1)
    codes, scales = symmetric_codes(rows, bits)
    return Quantized((codes * scales).reshape(values.shape), bits * values.size + SCALE_BITS * len(rows))


def symmetric_codes(rows, bits):
    """Codes and scales of rows with a scale each, chosen for the least squared error."""
    most = 2 ** (bits - 1) - 1
    greatest = np.maximum(np.abs(rows).max(1, keepdims=True), 1e-12)
    least, chosen = np.full((len(rows), 1), np.inf), greatest / most
    for shrink in SHRINKS:
        scales = half(greatest * np.float32(shrink / most))
        error = np.square(np.clip(np.rint(rows / scales), -most, most) * scales - rows).sum(1, keepdims=True)
        better = error < least
        least, chosen = np.where(better, error, least), np.where(better, scales, chosen)
    return np.clip(np.rint(rows / chosen), -most, most), chosen


def half(scales):
    """Scales as F16 keeps them."""
    return np.maximum(scales.astype(np.float16).astype(np.float32), np.float32(2**-24))


class Groups:
    """Integers of `bits` in groups of 128 along the inputs, with a scale and a zero point of as many bits each."""

    def __init__(self, values, bits=4, clip=1.0):
        self.bits, self.columns = bits, values.shape[1]
        self.of_column = np.arange(self.columns) // GROUP
        starts = np.arange(0, self.columns, GROUP)
        low = np.minimum(np.minimum.reduceat(values, starts, axis=1), 0) * clip
        high = np.maximum(np.maximum.reduceat(values, starts, axis=1), 0) * clip
        self.scales = half((high - low) / (2**bits - 1))
        self.zeros = np.clip(np.rint(-low / self.scales), 0, 2**bits - 1)

    def rounded(self, values, columns=slice(None)):
        """The nearest values that can be stored in these columns."""
        groups = self.of_column[columns]
        scales, zeros = self.scales[:, groups], self.zeros[:, groups]
        codes = np.clip(np.rint(values / scales) + zeros, 0, 2**self.bits - 1)
        return (codes - zeros) * scales

    def bits_of(self, values):
        """What a matrix takes."""
        return self.bits * values.size + (SCALE_BITS + self.bits) * self.scales.size


def nearest_in_groups(values, bits=4):
    """Round to nearest in groups of 128."""
    groups = Groups(values, bits)
    return Quantized(groups.rounded(values), groups.bits_of(values))


def gptq(values, inputs, bits=4):
    """GPTQ: columns in the order of falling activation, each one's error made up for by those after it; groups of 128 with
    scales from the original weights, so that their order costs nothing.
    """
    hessian = inputs.second_moment.astype(np.float64)
    diagonal = np.diag(hessian).copy()
    unseen = diagonal == 0
    hessian[unseen, unseen] = 1
    weights = values.astype(np.float64)
    weights[:, unseen] = 0
    groups = Groups(values, bits)
    order = np.argsort(-diagonal, kind="stable")
    hessian = hessian[np.ix_(order, order)]
    hessian[np.diag_indices_from(hessian)] += DAMPING * diagonal.mean()
    # The upper Cholesky factor of the inverse: its rows say how an error spreads over the columns that are left.
    spread = np.linalg.cholesky(np.linalg.inv(hessian)).T
    weights, decoded = weights[:, order], np.empty_like(weights)
    for start in range(0, len(order), GROUP):
        end = min(start + GROUP, len(order))
        errors = np.empty((len(weights), end - start))
        for column in range(start, end):
            current = weights[:, column : column + 1]
            decoded[:, column : column + 1] = groups.rounded(current, order[column : column + 1])
            error = (current - decoded[:, column : column + 1]) / spread[column, column]
            weights[:, column:end] -= error * spread[column, column:end]
            errors[:, column - start] = error[:, 0]
        weights[:, end:] -= errors @ spread[start:end, end:]
    restored = np.empty_like(decoded)
    restored[:, order] = decoded
    return Quantized(restored.astype(np.float32), groups.bits_of(values))


def output_error(difference, second_moment):
    """Mean squared error of the outputs, summed over them."""
    return float(np.einsum("oi,oi->", difference @ second_moment, difference))


def awq(values, inputs, bits=4):
    """AWQ: inputs scaled by a power of their mean magnitude, then each group's range clipped, both chosen for the least
    error of the outputs. The scales are not charged: where the operation before can take them they cost nothing.
    """
    second_moment = inputs.second_moment.astype(np.float32)
    magnitude = np.maximum(inputs.mean_magnitude, 1e-4).astype(np.float32)
    least, scales = np.inf, None
    for alpha in ALPHAS:
        tried = magnitude ** np.float32(alpha)
        tried /= np.sqrt(tried.max() * tried.min())
        decoded = Groups(values * tried, bits).rounded(values * tried) / tried
        error = output_error(decoded - values, second_moment)
        if error < least:
            least, scales = error, tried
    scaled, moment = values * scales, second_moment / np.outer(scales, scales)
    decoded = np.empty_like(values)
    for start in range(0, values.shape[1], GROUP):
        columns = slice(start, start + GROUP)
        chunk, of_chunk = scaled[:, columns], moment[columns, columns]
        least = np.full(len(values), np.inf)
        for clip in CLIPS:
            tried = Groups(chunk, bits, clip).rounded(chunk)
            difference = tried - chunk
            error = np.einsum("oi,oi->o", difference @ of_chunk, difference)
            better = error < least
            least = np.where(better, error, least)
            decoded[better, columns] = tried[better]
    return Quantized(decoded / scales, Groups(values, bits).bits_of(values))


def smooth_quant(values, inputs, bits=8):
    """SmoothQuant's weights: half of each input's range, in logarithms, moved from activations to weights, which are then
    integers with a scale per output channel. Activations stay as they are here: only weights are measured. The scales of
    inputs are not charged, as in `awq`.
    """
    of_inputs = np.maximum(inputs.greatest_magnitude, 1e-5)
    of_weights = np.maximum(np.abs(values).max(0), 1e-5)
    scales = np.sqrt(of_inputs / of_weights).astype(np.float32)
    codes, steps = symmetric_codes(values * scales, bits)
    return Quantized(codes * steps / scales, bits * values.size + SCALE_BITS * len(values))
