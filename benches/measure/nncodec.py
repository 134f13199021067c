"""NNCodec, the reference software of ISO/IEC 15938-17: dependent quantization and DeepCABAC.

Its front end (`nncodec.nn`) imports PyTorch, torchvision, OpenCV, pandas and more to walk a model's modules. The tools
of the standard are `nncodec.nnc_core`, and here they are called as `nncodec.nn.encode` calls them for a dictionary of
arrays, with its default settings: dependent quantization, parameter optimisation and row skipping on.
"""

import numpy as np
from nncodec import nnc_core

from .checkpoint import energy, relative_squared_error, weight_count
from .curve import Point

VERSION = "2.1.3"
QP_DENSITY = 2
"""Quantization parameters per octave of the step: its default."""
QP_PER_BIT = 1 << QP_DENSITY
CABAC_UNARY_LENGTH_MINUS1 = 10


def around(weights, bits):
    """The two points next to each other, one quantization parameter apart, with `bits` per matrix weight between them.

    One parameter for all matrices: the uniform step that squared error asks for.
    """
    parameter = expected_parameter(weights, bits)
    point = at(weights, parameter)
    finer = point.bits < bits
    while True:
        parameter += -1 if finer else 1
        next_point = at(weights, parameter)
        if (next_point.bits < bits) != finer:
            return [point, next_point]
        point = next_point


def expected_parameter(weights, bits):
    """The quantization parameter that `bits` per matrix weight should take."""
    root_mean_square = np.sqrt(energy(weights) / weight_count(weights))
    # A Gaussian's step at this rate, an octave down: dependent quantization uses two interleaved quantizers.
    return round(QP_PER_BIT * np.log2(root_mean_square * 4.13 / 2**bits)) - QP_PER_BIT


def nearest(weights, bits):
    """The quantization parameter whose rate is nearest to `bits` per matrix weight, and its bitstream."""
    parameter, tried = expected_parameter(weights, bits), {}
    while True:
        bitstream = encode(weights, parameter)
        tried[parameter] = bitstream
        taken = 8 * len(bitstream) / weight_count(weights)
        parameter += round(QP_PER_BIT * (taken - bits))
        if parameter in tried:
            break

    def off(parameter):
        return abs(8 * len(tried[parameter]) / weight_count(weights) - bits)

    best = min(tried, key=off)
    return best, tried[best]


def at(weights, quantization_parameter):
    """The point at this quantization parameter: all matrices encoded, the bitstream counted whole, and decoded."""
    bitstream = encode(weights, quantization_parameter)
    error = relative_squared_error(weights, decode(bitstream))
    return Point(8 * len(bitstream) / weight_count(weights), error, f"QP {quantization_parameter}")


def encode(weights, quantization_parameter):
    """`nncodec.nnc.compress` without the parts that a dictionary of arrays does not use."""
    model = nnc_core.nnr_model.NNRModel(weights)
    data = nnc_core.approximator.init_approx_data(weights, model.model_info, qp_density=QP_DENSITY, scan_order=0)
    approximation = nnc_core.approximator.ApproxInfo(
        data,
        model.model_info,
        "uniform",
        0,  # codebook mode: off
        quantization_parameter,
        False,  # opt_qp, a heuristic that moves the parameter by tensor: off by default, no help to squared error
        False,  # disable dependent quantization
        CABAC_UNARY_LENGTH_MINUS1,
        0,  # lambda scale
        nonweight_qp=-75,
    ).approx_info
    settings = {
        "cabac_unary_length_minus1": CABAC_UNARY_LENGTH_MINUS1,
        "param_opt_flag": True,
        "partial_data_counter": 0,
        "general_profile_idc": 1,
        "node_id_present_flag": 1,
        "device_id": 0,
        "mps_parent_signalling_enabled_flag": 0,
        "parent_node_id_present_flag": 0,
        "temporal_context_modeling_flag": 0,
        "row_skip_enabled_flag": 1,
        "pre_signalling": 0,
    }
    quantized = nnc_core.approximator.approx(approximation, model.model_info, data, settings)
    bitstream, _ = nnc_core.coder.encode(enc_info=settings, model_info=model.model_info, approx_data=quantized)
    return bitstream


def decode(bitstream):
    """`nncodec.nnc.decompress`, likewise."""
    information = {
        "parameter_type": {},
        "parameter_dimensions": {},
        "parameter_index": {},
        "block_identifier": {},
        "topology_storage_format": None,
        "topology_compression_format": None,
        "performance_maps": {"mps": {}, "lps": {}},
        "performance_map_flags": {
            f"{scope}_{flag}": {}
            for scope in ("mps", "lps")
            for flag in (
                "sparsification_flag",
                "pruning_flag",
                "unification_flag",
                "decomposition_performance_map_flag",
            )
        },
    }
    data = nnc_core.coder.decode(bitstream, information, hls_stats={}, oob_dict={})
    nnc_core.approximator.rec(data)
    return nnc_core.approximator.recompose_params(information, data)["parameters"]
