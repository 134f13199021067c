"""NNCodec and GGUF on a task, each at the setting whose rate is nearest to the one asked for."""

import sys

from . import gguf, nncodec
from .evaluation import TaskPoint


class Peers:
    """What the other codecs make of one model; points are kept, for they never change."""

    def __init__(self, results, rewriter):
        self.results, self.rewriter = results, rewriter
        self.ggml = None

    def at(self, rate):
        """The point of each codec near `rate` bits per parameter."""
        yield self._kept("NNCodec", f"{rate:g}", f"nncodec {nncodec.VERSION}", lambda: self._nncodec(rate))
        name = gguf.nearest(self.rewriter.matrix_bits(rate))
        try:
            yield self._kept("GGUF", name, gguf.VERSION, lambda: self._gguf(name))
        except gguf.Unavailable as why:
            print(f"GGUF {name} is not measured: {why}", file=sys.stderr)

    def _kept(self, codec, setting, version, measure):
        name = f"{self.rewriter.model.name}/{codec}/{setting}"
        return TaskPoint.of_json(self.results.kept(name, self.rewriter.made_with(version), lambda: measure().to_json()))

    def _nncodec(self, rate):
        weights = self.rewriter.weights
        parameter, bitstream = nncodec.nearest(weights, self.rewriter.matrix_bits(rate))
        return self.rewriter.point("NNCodec", f"QP {parameter}", 8 * len(bitstream), nncodec.decode(bitstream))

    def _gguf(self, name):
        self.ggml = self.ggml or gguf.Ggml()
        taken, decoded = gguf.round_trip(self.ggml, self.rewriter.weights, name)
        return self.rewriter.point("GGUF", name, 8 * taken, decoded)
