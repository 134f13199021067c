"""Points of rate and error, and what lies between them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Point:
    """One coding of all matrices of a checkpoint."""

    bits: float
    """Bits per matrix weight."""
    error: float
    """Relative squared error."""
    label: str = ""
    """The setting, in the codec's own terms."""
    whole_file_bits: float | None = None
    """Bits per parameter of the whole archive; of ours alone."""


class Curve:
    """Rate and error of one codec over its settings.

    Between points the logarithm of the error is taken as linear in the rate: exact for high-rate quantization, where
    each bit divides the error by four. There is nothing beyond the first and last point.
    """

    def __init__(self, points):
        self.points = sorted(points, key=lambda point: point.bits)
        self._bits = np.array([point.bits for point in self.points])
        self._log_errors = np.log2([point.error for point in self.points])

    def error_at(self, bits):
        """Relative squared error at `bits` per matrix weight; None outside the curve."""
        if not self.points or not self._bits[0] <= bits <= self._bits[-1]:
            return None
        return float(2 ** np.interp(bits, self._bits, self._log_errors))

    def bits_at(self, error):
        """Bits per matrix weight at this relative squared error; None outside the curve."""
        wanted = np.log2(error)
        if not self.points or not self._log_errors[-1] <= wanted <= self._log_errors[0]:
            return None
        return float(np.interp(-wanted, -self._log_errors, self._bits))
