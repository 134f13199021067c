"""Small random checkpoints of every architecture the codec aligns, written by transformers as a user's would be.

    python checkpoints.py DIRECTORY [FAMILY...]

makes DIRECTORY/FAMILY/ for each. Every parameter is random, biases and norms too: a fresh model's are 0 and 1, and then
a forgotten bias would go unnoticed. The same family gives the same bytes every time.
"""

import sys
from pathlib import Path

import torch
import transformers

LAYERS, HIDDEN, HEADS, VOCABULARY, POSITIONS = 4, 64, 8, 96, 40
# More than 256 blocks, so that FFN units take the screened greedy matching and heads the exact one.
FFN_UNITS = 272


def bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=FFN_UNITS, max_position_embeddings=POSITIONS,
    )
    return transformers.BertModel(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=FFN_UNITS, n_positions=POSITIONS,
        bos_token_id=0, eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def gpt_neox():
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=FFN_UNITS, max_position_embeddings=POSITIONS, bos_token_id=0, eos_token_id=0,
    )
    return transformers.GPTNeoXForCausalLM(config)


def opt():
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        ffn_dim=FFN_UNITS, max_position_embeddings=POSITIONS, word_embed_proj_dim=HIDDEN,
    )
    return transformers.OPTForCausalLM(config)


def llama(key_value_heads):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=key_value_heads, intermediate_size=FFN_UNITS, max_position_embeddings=POSITIONS,
    )
    return transformers.LlamaForCausalLM(config)


def mistral():
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=4, intermediate_size=FFN_UNITS, max_position_embeddings=POSITIONS, sliding_window=16,
    )
    return transformers.MistralForCausalLM(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=FFN_UNITS,
        image_size=32, patch_size=8, num_labels=10,
    )
    return transformers.ViTForImageClassification(config)


FAMILIES = {
    "bert": bert,
    "gpt2": gpt2,
    "gpt-neox": gpt_neox,
    "opt": opt,
    "llama-gqa": lambda: llama(key_value_heads=2),
    "llama-mqa": lambda: llama(key_value_heads=1),
    "mistral-gqa": mistral,
    "vit": vit,
}


def make(family, directory):
    """Writes the checkpoint of one family into `directory` and returns the model."""
    torch.manual_seed(sorted(FAMILIES).index(family))
    model = FAMILIES[family]().float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.15)
            if "norm" in name.lower() or ".ln_" in name:
                parameter.add_(1.0 if name.endswith("weight") else 0.0)
    model.save_pretrained(directory)
    return model


def model_input(model):
    """Seeded input that reaches every weight: token ids, or pixels for a vision model."""
    generator = torch.Generator().manual_seed(7)
    if hasattr(model.config, "image_size"):
        pixels = torch.randn(2, 3, model.config.image_size, model.config.image_size, generator=generator)
        return {"pixel_values": pixels}
    return {"input_ids": torch.randint(0, VOCABULARY, (2, POSITIONS - 8), generator=generator)}


def forward(model):
    """The model's first output on `model_input`, in float32."""
    with torch.no_grad():
        return model(**model_input(model), return_dict=False)[0]


if __name__ == "__main__":
    if len(sys.argv) < 2 or not set(sys.argv[2:]) <= set(FAMILIES):
        sys.exit(f"usage: checkpoints.py DIRECTORY [FAMILY...], families: {', '.join(FAMILIES)}")
    for chosen in sys.argv[2:] or FAMILIES:
        make(chosen, Path(sys.argv[1]) / chosen)
