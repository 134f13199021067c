"""The permutations that `mcwcfs analyze` chooses leave the model's function as it was (section 4.2, Appendices D and M).

    python function_preserved.py MCWCFS WORK_DIRECTORY [FAMILY...]

For each architecture: makes a small random checkpoint, has `MCWCFS analyze CHECKPOINT --write-aligned ALIGNED` write it
with every layer's blocks permuted and compensated, and runs both through transformers. Checks that

- blocks of every expected kind really moved: FFN units and attention heads, under the architecture's own tensor names;
- a tensor that moved holds the same values as before, in another order, and no tensor outside the blocks changed;
- the forward pass gives the same output up to float rounding;
- undoing the move of any one matrix alone changes the output: a check that cannot fail would prove nothing.

Prints one line per architecture; the exit status is 1 if any check failed.
"""

import re
import subprocess
import sys
from pathlib import Path

import torch
import transformers

import checkpoints

# Patterns of tensor names, each of which a permutation must show in: (FFN, attention).
MUST_MOVE = {
    "bert": (["intermediate.dense.weight", r"layer\.\d\.output.dense.weight"], ["self.query.weight", "attention.output.dense.weight"]),
    "gpt2": (["mlp.c_fc.weight", "mlp.c_proj.weight"], ["attn.c_attn.weight", "attn.c_proj.weight"]),
    "gpt-neox": (["dense_h_to_4h.weight", "dense_4h_to_h.weight"], ["query_key_value.weight", "attention.dense.weight"]),
    "opt": (["fc1.weight", "fc2.weight"], ["q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight"]),
    "llama-gqa": (["gate_proj", "up_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "llama-mqa": (["gate_proj", "up_proj", "down_proj"], ["q_proj", "o_proj"]),  # one key/value head: nowhere to go
    "mistral-gqa": (["gate_proj", "up_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "vit": (["mlp.fc1.weight", "mlp.fc2.weight"], ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]),
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
        if re.search("norm|embed|ln_", name.lower()):
            raise Failed(f"{name}: changed, though no block's permutation reaches it")
    for kind, patterns in zip(("FFN", "attention"), MUST_MOVE[family]):
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in moved):
                raise Failed(f"{kind}: no tensor like {pattern} moved, so the identity was all that was tested")
    return moved


def check_family(family, binary, work):
    directory, aligned_directory = work / family, work / f"{family}-aligned"
    model = checkpoints.make(family, directory)
    command = [binary, "analyze", str(directory), "--write-aligned", str(aligned_directory)]
    analyze = subprocess.run(command, capture_output=True, text=True)
    if analyze.returncode != 0:
        raise Failed(f"{' '.join(command)}: exit code {analyze.returncode}\n{analyze.stderr}")

    aligned, loading = type(model).from_pretrained(aligned_directory, output_loading_info=True)
    if any(loading.values()):
        raise Failed(f"transformers loads the aligned checkpoint with {loading}")
    aligned = aligned.float().eval()
    original_tensors, aligned_tensors = model.state_dict(), aligned.state_dict()
    moved = check_moves(family, original_tensors, aligned_tensors)

    reference = checkpoints.forward(model)
    difference = relative_difference(checkpoints.forward(aligned), reference)
    if not difference <= SAME:
        raise Failed(f"the output changed by {difference:.1e} of its largest value, allowed is {SAME:.0e}")

    # One matrix at a time, back in the original order: compensation is now missing.
    matrices = [name for name in moved if aligned_tensors[name].ndim == 2]
    smallest = float("inf")
    for name in matrices:
        kept = aligned_tensors[name].clone()
        aligned_tensors[name].copy_(original_tensors[name])
        changed = relative_difference(checkpoints.forward(aligned), reference)
        aligned_tensors[name].copy_(kept)
        smallest = min(smallest, changed)
        if not changed >= DIFFERENT:
            raise Failed(f"{name} in the wrong order changed the output by {changed:.1e} only: the check is blind to it")
    return f"{len(moved)} tensors moved, output within {difference:.1e}; any one matrix not moved: at least {smallest:.1e}"


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
