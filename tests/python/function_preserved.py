"""The permutations that `mcwcfs analyze` chooses leave the model's function as it was (section 4.2, Appendices D and M).

    python function_preserved.py MCWCFS WORK_DIRECTORY [FAMILY...]

For each row of the paper's Table 17, and some more: makes a small random checkpoint, has `MCWCFS analyze CHECKPOINT --write-aligned ALIGNED` write it
with every layer's blocks permuted and compensated, and runs both through transformers. Checks that

- blocks of every expected kind really moved, under the architecture's own tensor names;
- a tensor that moved holds the same values as before, in another order, and no tensor outside the blocks changed;
- the forward pass gives the same output up to float rounding;
- undoing the move of any one matrix alone changes the output: a check that cannot fail would prove nothing;
- where the symmetry is restricted, a move that the restriction forbids changes the output;
- `analyze` says of every kind of block what alignment finds, beside its control and where nothing was fitted.

Prints one line per architecture; the exit status is 1 if any check failed.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
import transformers

import checkpoints

# Patterns of tensor names, each of which a permutation must show in.
GATED_FFN = ["gate_proj", "up_proj", "down_proj"]
SPLIT_HEADS = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]
T5_CROSS = [rf"EncDecAttention.{tensor}.weight" for tensor in "qkvo"]
TIMM_ATTENTION, TIMM_FFN = ["attn.qkv.weight", "attn.proj.weight"], [r"mlp.fc1.weight", r"mlp.fc2.weight"]
MUST_MOVE = {
    "bert": ["intermediate.dense.weight", r"layer\.\d\.output.dense.weight", "self.query.weight", "attention.output.dense.weight"],
    "cait": [*TIMM_ATTENTION, *TIMM_FFN, "proj_l.weight", "proj_w.weight", "proj_l.bias", "proj_w.bias"],
    "convnext": ["pwconv1.weight", "pwconv2.weight", "pwconv1.bias"],
    "convnext-timm": TIMM_FFN,
    "deit": ["fc1.weight", "fc2.weight", *SPLIT_HEADS],
    "gpt2": ["mlp.c_fc.weight", "mlp.c_proj.weight", "attn.c_attn.weight", "attn.c_proj.weight"],
    "gpt-neox": ["dense_h_to_4h.weight", "dense_4h_to_h.weight", "query_key_value.weight", "attention.dense.weight"],
    "llama-gqa": [*GATED_FFN, *SPLIT_HEADS],
    "llama-mqa": [*GATED_FFN, "q_proj", "o_proj"],  # one key/value head: nowhere to go
    "mistral-gqa": [*GATED_FFN, *SPLIT_HEADS],
    "mixtral": ["experts.gate_up_proj", "experts.down_proj", *SPLIT_HEADS],
    "mlp-mixer": ["mlp_tokens.fc1", "mlp_tokens.fc2", "mlp_channels.fc1", "mlp_channels.fc2"],
    "opt": ["fc1.weight", "fc2.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight"],
    "phi": ["fc1.weight", "fc2.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", "self_attn.dense.weight"],
    "phi3": ["gate_up_proj", "down_proj", "qkv_proj", "o_proj"],
    "qwen-moe": ["experts.gate_up_proj", "experts.down_proj", "shared_expert.gate_proj", *SPLIT_HEADS],
    "swin": [*SPLIT_HEADS, "mlp.fc1.weight", "mlp.fc2.weight", "position_bias_table"],
    "swin-timm": [*TIMM_ATTENTION, *TIMM_FFN, "position_bias_table"],
    "switch": [*T5_CROSS, r"mlp.*wi.*", r"mlp.*wo.*"],
    "t5": [*T5_CROSS, "DenseReluDense.wi.weight", "DenseReluDense.wo.weight"],
    "t5-gated": [*T5_CROSS, "DenseReluDense.wi_0.weight", "DenseReluDense.wi_1.weight", "DenseReluDense.wo.weight"],
    "vit": ["mlp.fc1.weight", "mlp.fc2.weight", *SPLIT_HEADS],
    "vit-timm": [*TIMM_ATTENTION, *TIMM_FFN],
}
# What no permutation may reach: what all heads share, what a residual carries through, routers and output heads.
MUST_STAY = "norm|embed|ln_|classifier|router|mlp.gate.weight|^head|SelfAttention|dwconv|conv_dw|gamma|layer_scale"

# Moves that look like a symmetry and are none: tensors, axis and width of two blocks that change places in one layer. Each
# must change the output, or the rule that forbids it forbids too much.
T5_HEADS = [(r"encoder.block.1.layer.0.SelfAttention.[qkv].weight", 0, 8), (r"encoder.block.1.layer.0.SelfAttention.o.weight", 1, 8)]
QUERY_HEADS = [(r"layers.1.self_attn.q_proj.weight", 0, 8), (r"layers.1.self_attn.o_proj.weight", 1, 8)]
MUST_NOT_MOVE = {
    "cait": [(r"blocks.1.attn.qkv.weight", 0, 16, 3), (r"blocks.1.attn.qkv.bias", 0, 16, 3), (r"blocks.1.attn.proj.weight", 1, 16)],
    "convnext": [(r"stages.1.layers.1.dwconv", 0, 1), (r"stages.1.layers.1.layernorm", 0, 1), (r"stages.1.layers.1.pwconv1.weight", 1, 1)],
    "llama-gqa": QUERY_HEADS,
    "llama-mqa": [(r"layers.1.self_attn.[kv]_proj.weight", 0, 4)],
    "mistral-gqa": QUERY_HEADS,
    "mixtral": [(r"layers.1.mlp.experts", 0, 1)],
    "mlp-mixer": [(r"blocks.1.mlp_tokens.fc1.weight", 1, 1)],
    "qwen-moe": [(r"layers.1.mlp.experts", 0, 1)],
    "swin": [(r"layers.1.blocks.1.attention.[qkv]_proj", 0, 16), (r"layers.1.blocks.1.attention.o_proj.weight", 1, 16)],
    "switch": T5_HEADS,
    "t5": T5_HEADS,
}
# Largest difference of two outputs, relative to the largest output. Reordered float32 sums stay below the first;
# one matrix in the wrong order is far above the second.
SAME, DIFFERENT = 1e-4, 1e-3


class Failed(Exception):
    """A check that did not hold; the message says which and by how much."""


def relative_difference(output, reference):
    return ((output - reference).abs().max() / reference.abs().max()).item()


def check_moves(family, original, aligned):
    """Names of the tensors that moved, after checking that they only moved."""
    if original.keys() != aligned.keys():
        raise Failed(f"tensors differ: {sorted(original.keys() ^ aligned.keys())}")
    moved = [name for name in original if not torch.equal(original[name], aligned[name])]
    for name in moved:
        if not torch.equal(original[name].flatten().sort().values, aligned[name].flatten().sort().values):
            raise Failed(f"{name}: its values are not the original's in another order")
        if re.search(MUST_STAY, name):
            raise Failed(f"{name}: changed, though no block's permutation reaches it")
    for pattern in MUST_MOVE[family]:
        if not any(re.search(pattern, name) for name in moved):
            raise Failed(f"no tensor like {pattern} moved, so the identity was all that was tested")
    return moved


def swapped_output(model, moves):
    """The output with the first and the last block of some tensors of the model in one another's place."""
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for pattern, axis, width, *repeat in moves:
        names = [name for name in kept if re.search(pattern, name)]
        if not names:
            raise Failed(f"no tensor is like {pattern}")
        for name in names:
            rows = kept[name].movedim(axis, 0).unflatten(0, (*(repeat or [1]), -1, width))
            blocks = torch.arange(rows.shape[1])
            blocks[0], blocks[-1] = blocks[-1].item(), blocks[0].item()
            model.state_dict()[name].copy_(rows[:, blocks].flatten(0, 2).movedim(0, axis))
    output = checkpoints.forward(model)
    for name, tensor in kept.items():
        model.state_dict()[name].copy_(tensor)
    return output


def check_diagnostics(report):
    """Every architecture with rules has the diagnostics of Appendices I and M: for each block type, beside its control."""
    if not 0 < report["alignable_fraction"] <= 1 or not report["block_types"]:
        raise Failed(f"analyze finds nothing to align: {report}")
    for block_type in report["block_types"]:
        for found in block_type["weights_found"], block_type["gaussian_control"]:
            name = block_type["block_type"]
            before, after = found["cosine_before"]["mean"], found["cosine_after"]["mean"]
            if not before - 1e-6 <= after <= 1:
                raise Failed(f"{name}: the mean cosine goes from {before} to {after} by alignment")
            if not 0 <= found["nre_after"]["mean"] <= 1:
                raise Failed(f"{name}: a residual energy of {found['nre_after']['mean']}")
            if not found["r2_held_out"]["mean"] <= found["r2_after"]["mean"] + 0.2:
                raise Failed(f"{name}: more is explained where nothing was fitted: {found}")


def check_family(family, binary, work):
    directory, aligned_directory = work / family, work / f"{family}-aligned"
    model = checkpoints.make(family, directory)
    command = [binary, "analyze", str(directory), "--json", "--write-aligned", str(aligned_directory)]
    analyze = subprocess.run(command, capture_output=True, text=True)
    if analyze.returncode != 0:
        raise Failed(f"{' '.join(command)}: exit code {analyze.returncode}\n{analyze.stderr}")
    check_diagnostics(json.loads(analyze.stdout))

    aligned = checkpoints.load(family, aligned_directory)
    original_tensors, aligned_tensors = model.state_dict(), aligned.state_dict()
    moved = check_moves(family, original_tensors, aligned_tensors)

    reference = checkpoints.forward(model)
    difference = relative_difference(checkpoints.forward(aligned), reference)
    if not difference <= SAME:
        raise Failed(f"the output changed by {difference:.1e} of its largest value, allowed is {SAME:.0e}")

    # One matrix at a time, back in the original order: compensation is now missing.
    matrices = [name for name in moved if aligned_tensors[name].ndim >= 2]
    smallest = float("inf")
    for name in matrices:
        kept = aligned_tensors[name].clone()
        aligned_tensors[name].copy_(original_tensors[name])
        changed = relative_difference(checkpoints.forward(aligned), reference)
        aligned_tensors[name].copy_(kept)
        smallest = min(smallest, changed)
        if not changed >= DIFFERENT:
            raise Failed(f"{name} in the wrong order changed the output by {changed:.1e} only: the check is blind to it")
    said = f"{len(moved)} tensors moved, output within {difference:.1e}; any one matrix not moved: at least {smallest:.1e}"
    if family in MUST_NOT_MOVE:
        changed = relative_difference(swapped_output(model, MUST_NOT_MOVE[family]), reference)
        if not changed >= DIFFERENT:
            raise Failed(f"a move that the rules forbid changed the output by {changed:.1e} only")
        said += f"; a forbidden move: {changed:.1e}"
    return said


def main(binary, work, families):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    failures = 0
    for family in families:
        try:
            print(f"{family}: {check_family(family, binary, work)}", flush=True)
        except Failed as failed:
            failures += 1
            print(f"{family}: FAILED: {failed}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:] or checkpoints.FAMILIES))
