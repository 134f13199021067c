"""Predictions made of several reference values, by SPEC.md sections 5.2 and 7.4; beside spec_decoder.py, which has the rest."""

import numpy as np
from spec_format import integers, require

FLOAT = np.float32


class Map:
    def __init__(self, reader, rows, columns):
        weights = np.frombuffer(reader.take("network weights", rows * columns), np.int8)
        self.weights = weights.astype(np.int64).reshape(rows, columns)
        self.biases = read_biases(reader, rows)

    def sums(self, inputs):
        """Inputs are rows: one for each unit."""
        return inputs @ self.weights.T + self.biases


def read_biases(reader, count):
    biases = np.frombuffer(reader.take("network biases", 4 * count), "<i4").astype(np.int64)
    require(count == 0 or np.abs(biases).max() <= 2**24, "network biases")
    return biases


class Requantization:
    def __init__(self, reader):
        self.multiplier, self.shift = reader.u16("network multiplier"), reader.u8("network shift", below=41)
        require(self.multiplier > 0 and self.shift > 0, "network multiplier or shift: 0")

    def eight(self, sums):
        return np.clip((sums * self.multiplier + 2 ** (self.shift - 1)) // 2**self.shift, -127, 127)


class Network:
    def __init__(self, reader):
        self.unit, self.contexts = reader.varint("network unit", 2**10), reader.u8("network contexts", below=3)
        width, hidden = reader.varint("network width", 2**8), reader.varint("network hidden", 2**10)
        require(self.unit > 0 and self.contexts > 0 and width > 0, "network: a size of 0")
        self.to_latent, self.up = Requantization(reader), None
        if hidden:
            self.up, self.to_hidden = Map(reader, hidden, width), Requantization(reader)
            self.activation = np.frombuffer(reader.take("network activation", 256), np.int8).astype(np.int64)
            self.down, self.back = Map(reader, width, hidden), Requantization(reader)
        self.kinds = []
        for _ in range(reader.count("network kinds", 64)):
            self.kinds.append((Map(reader, width, self.unit * self.contexts), Map(reader, self.unit, width)))
        self.layers = [read_biases(reader, width) for _ in range(reader.count("network layers", 2**12))]

    def outputs(self, kind, layer, inputs):
        embedding = self.layers[layer - 1] if layer else 0
        latent = self.to_latent.eight(self.kinds[kind][0].sums(inputs) + embedding)
        if self.up:
            hidden = self.activation[self.to_hidden.eight(self.up.sums(latent)) + 128]
            latent = np.clip(latent + self.back.eight(self.down.sums(hidden)), -127, 127)
        return self.kinds[kind][1].sums(latent)


def read_vectors(part, reader):
    shape = part.tensor.shape
    part.vector_axis, step = reader.u8("vector axis"), reader.f32("gain step")
    require(part.vector_axis < len(shape) and 0 not in shape, f"vector axis: {part.vector_axis} of {shape}")
    require(part.axis is None, "placement: beside motion vectors")
    units = shape[part.vector_axis]
    require(units <= 2**20, f"vector axis: {units} units")
    part.counts = integers(reader.blob("vector counts"), units, 0, 4, "vector counts").tolist()
    total = sum(part.counts)
    part.sources = integers(reader.blob("vector sources"), total, 0, units - 1, "vector sources")
    part.vector_gains = step * integers(reader.blob("vector gains"), total, -(2**24), 2**24, "vector gains").astype(FLOAT)
    require(np.isfinite(part.vector_gains).all(), "vector gains: not finite")


def vector_predictions(part, reference):
    """`reference` has the tensor's shape, and so has what comes back."""
    reference = np.moveaxis(reference, part.vector_axis, 0)
    prediction, vector = np.zeros_like(reference), 0
    for unit, count in enumerate(part.counts):
        for vector in range(vector, vector + count):
            prediction[unit] += part.vector_gains[vector] * reference[part.sources[vector]]
        vector += count > 0
    return np.moveaxis(prediction, 0, part.vector_axis)


def read_network(part, reader, side_of):
    networks = part.archive.networks
    number, part.kind = reader.varint("network", 15), reader.varint("network kind", 63)
    require(number < len(networks), f"network: {number}")
    part.network, part.layer = networks[number], reader.varint("network layer", 2**12)
    require(part.kind < len(part.network.kinds), f"network kind: {part.kind}")
    require(part.layer <= len(part.network.layers), f"network layer: {part.layer}")
    part.input_scale, part.output_scale = reader.f32("input scale"), reader.f32("output scale")
    second, part.second = reader.varint("second reference part", 2**20), None
    if second:
        below = part.record.reference.reference
        require(part.network.contexts == 2 and below is not None, "second reference part: there is none")
        parts = side_of(part.archive, below).parts
        require(second <= len(parts), f"second reference part: {second - 1}")
        part.second = parts[second - 1]
        require((part.second.tensor.dtype, part.second.tensor.shape) == (part.tensor.dtype, part.tensor.shape), "second reference part: shape")


def network_predictions(part, references):
    """`references` are one or two arrays of all elements, each where section 8.3 finds it."""
    unit, network = part.network.unit, part.network
    predictions = []
    for start in range(0, part.tensor.elements, part.run_elements):
        run = slice(start, min(start + part.run_elements, part.tensor.elements))
        units = -(-(run.stop - run.start) // unit)
        inputs = np.zeros((units, network.contexts, unit), np.int64)
        for context, reference in enumerate(references):
            with np.errstate(invalid="ignore"):
                scaled = np.nan_to_num(np.clip(np.rint(reference[run] * part.input_scale), -127, 127), nan=0)
            padded = np.zeros(units * unit, np.int64)
            padded[: len(scaled)] = scaled
            inputs[:, context] = padded.reshape(units, unit)
        outputs = network.outputs(part.kind, part.layer, inputs.reshape(units, -1)).reshape(-1)[: run.stop - run.start]
        predictions.append(outputs.astype(FLOAT) * part.output_scale)
    return np.concatenate(predictions) if predictions else np.zeros(0, FLOAT)
