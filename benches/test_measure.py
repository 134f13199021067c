"""What the drivers measure with: run by tests/run, needs numpy alone.

python3 -m unittest discover --start-directory benches
"""

import json
import tempfile
import unittest
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import publish
from measure import checkpoint, entropy_coded, weight_only
from measure.results import Results


@dataclass
class Inputs:
    """As `activations.Inputs`, which needs PyTorch."""

    second_moment: np.ndarray
    mean_magnitude: np.ndarray
    greatest_magnitude: np.ndarray

    @classmethod
    def of(cls, rows):
        magnitudes = np.abs(rows)
        return cls(rows.T @ rows / len(rows), magnitudes.mean(0), magnitudes.max(0))


def a_matrix_and_its_inputs():
    """Weights, and inputs that are correlated and of very different scales, as activations are."""
    random = np.random.default_rng(3)
    weights = random.standard_normal((96, 256)).astype(np.float32)
    mixing = random.standard_normal((256, 256)) / 16 + np.eye(256)
    rows = (random.standard_normal((2048, 256)) @ mixing * np.exp(random.standard_normal(256))).astype(np.float32)
    return weights, Inputs.of(rows)


class WeightOnly(unittest.TestCase):
    def setUp(self):
        self.weights, self.inputs = a_matrix_and_its_inputs()

    def output_error(self, quantized):
        return weight_only.output_error(quantized.values - self.weights, self.inputs.second_moment)

    def test_gptq_and_awq_lose_less_at_the_outputs_than_rounding_at_the_same_bits(self):
        nearest = weight_only.nearest_in_groups(self.weights)
        for quantizer in (weight_only.gptq, weight_only.awq):
            quantized = quantizer(self.weights, self.inputs)
            self.assertEqual(quantized.bits, nearest.bits)
            self.assertLess(self.output_error(quantized), 0.8 * self.output_error(nearest), quantizer.__name__)

    def test_gptq_without_correlation_is_rounding(self):
        white = Inputs(np.eye(256, dtype=np.float32), np.ones(256), np.ones(256))
        nearest = weight_only.nearest_in_groups(self.weights)
        np.testing.assert_allclose(weight_only.gptq(self.weights, white).values, nearest.values, atol=1e-6)

    def test_four_bits_in_groups_of_128_take_four_bits_a_scale_and_a_zero_point(self):
        self.assertEqual(weight_only.nearest_in_groups(self.weights).bits, 96 * (256 * 4 + 2 * (16 + 4)))

    def test_a_scale_per_channel_loses_less_than_one_for_all(self):
        scaled = self.weights * np.geomspace(0.1, 10, 96, dtype=np.float32)[:, None]
        errors = [
            np.square(weight_only.symmetric(scaled, 4, per_channel).values - scaled).sum()
            for per_channel in (True, False)
        ]
        self.assertLess(errors[0], errors[1] / 2)

    def test_integers_come_back_as_they_were(self):
        integers = np.arange(-7, 8, dtype=np.float32).reshape(1, -1).repeat(4, 0)
        np.testing.assert_array_equal(weight_only.symmetric(integers, 4, True).values, integers)


class EntropyCoded(unittest.TestCase):
    def test_equal_shares_of_four_symbols_take_two_bits_each_and_a_table(self):
        codes = np.arange(4096) % 4
        self.assertEqual(entropy_coded.entropy_bits(codes, 4), 2 * 4096 + 4 * entropy_coded.TABLE_BITS)

    def test_another_codebook_takes_more_bits_and_loses_less(self):
        weights = {"matrix": np.random.default_rng(5).standard_normal((64, 130)).astype(np.float32)}
        points = []
        for stages in (1, 2):
            bits, decoded = entropy_coded.residual_vectors(weights, stages, index_bits=5, length=4)
            self.assertEqual(decoded["matrix"].shape, (64, 130))
            points.append((bits, checkpoint.relative_squared_error(weights, decoded)))
        self.assertGreater(points[1][0], points[0][0])
        self.assertLess(points[1][1], points[0][1])

    def test_pruning_keeps_the_larger_half_of_the_blocks(self):
        values = np.ones((2, 64), np.float32)
        values[:, :32] = 0.25
        _, decoded = entropy_coded.pruned({"matrix": values}, bits_kept=8)
        np.testing.assert_array_equal(decoded["matrix"][:, :32], 0)
        np.testing.assert_allclose(decoded["matrix"][:, 32:], 1, rtol=0.01)


class Kept(unittest.TestCase):
    def test_a_result_is_measured_again_when_what_it_was_made_with_changes(self):
        with tempfile.TemporaryDirectory() as work:
            path, calls = Path(work) / "results.json", []

            def measure():
                calls.append(1)
                return len(calls)

            for codec, expected in (("1", 1), ("1", 1), ("2", 2)):
                self.assertEqual(Results(path).kept("point", {"codec": codec}, measure), expected)
            self.assertEqual(json.loads(path.read_text())["point"], {"made_with": {"codec": "2"}, "result": 2})

    def test_tensors_of_more_axes_are_folded_to_their_first_long_one(self):
        self.assertEqual(checkpoint.folded_shape([192, 3, 16, 16]), [192, 768])
        self.assertEqual(checkpoint.folded_shape([1, 197, 192]), [197, 192])
        self.assertEqual(checkpoint.folded_shape([1, 1, 192]), [192])


class Published(unittest.TestCase):
    def test_a_driver_replaces_its_own_section_and_nothing_else(self):
        page = "a\n<!-- one -->\nold\n<!-- /one -->\nb\n<!-- two -->\nkept\n<!-- /two -->\n"
        expected = page.replace("old", "| new |")
        self.assertEqual(publish.published(page, "one", "\n| new |\n"), expected)
        self.assertIsNone(publish.published(page, "three", "text"))


if __name__ == "__main__":
    unittest.main()
