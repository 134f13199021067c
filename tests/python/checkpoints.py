"""Small random checkpoints of every architecture the codec aligns, written by transformers and timm as a user's would be.

    python checkpoints.py DIRECTORY [FAMILY...]

makes DIRECTORY/FAMILY/ for each. Every parameter is random, biases and norms too: a fresh model's are 0 and 1, and then
a forgotten bias would go unnoticed. The same family gives the same bytes every time.
"""

import json
import sys
from pathlib import Path

import safetensors.torch
import timm
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


def llama(key_value_heads, **options):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=key_value_heads, intermediate_size=FFN_UNITS, max_position_embeddings=POSITIONS, **options,
    )
    return transformers.LlamaForCausalLM(config)


def mistral():
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=4, intermediate_size=FFN_UNITS, max_position_embeddings=POSITIONS, sliding_window=16,
    )
    return transformers.MistralForCausalLM(config)


def mixture(config_class, model_class, **options):
    config = config_class(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=4, intermediate_size=FFN_UNITS, max_position_embeddings=POSITIONS, **options,
    )
    return model_class(config)


def mixtral():
    return mixture(transformers.MixtralConfig, transformers.MixtralForCausalLM, num_local_experts=4)


def qwen_moe():
    return mixture(
        transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=FFN_UNITS, shared_expert_intermediate_size=FFN_UNITS,
    )


def phi():
    config = transformers.PhiConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=FFN_UNITS, max_position_embeddings=POSITIONS,
    )
    return transformers.PhiForCausalLM(config)


def phi3():
    config = transformers.Phi3Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=FFN_UNITS, max_position_embeddings=POSITIONS, pad_token_id=0, eos_token_id=0,
    )
    return transformers.Phi3ForCausalLM(config)


T5_SHAPE = dict(vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=HIDDEN // HEADS, d_ff=FFN_UNITS, num_heads=HEADS)


def t5(projection):
    config = transformers.T5Config(num_layers=LAYERS, feed_forward_proj=projection, **T5_SHAPE)
    return transformers.T5ForConditionalGeneration(config)


def switch_transformers():
    config = transformers.SwitchTransformersConfig(
        num_layers=LAYERS, num_decoder_layers=LAYERS, num_sparse_encoder_layers=LAYERS, num_sparse_decoder_layers=2,
        num_experts=4, expert_capacity=64, router_jitter_noise=0.0, **T5_SHAPE,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def vit(config_class=transformers.ViTConfig, model_class=transformers.ViTForImageClassification):
    config = config_class(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=FFN_UNITS,
        image_size=32, patch_size=8, num_labels=10,
    )
    return model_class(config)


def deit():
    return vit(transformers.DeiTConfig, transformers.DeiTForImageClassificationWithTeacher)


def swin():
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=HIDDEN, depths=[2, 2], num_heads=[4, 8], window_size=4, num_labels=10,
    )
    return transformers.SwinForImageClassification(config)


def convnext():
    config = transformers.ConvNextConfig(
        image_size=32, patch_size=2, num_stages=2, hidden_sizes=[HIDDEN, 2 * HIDDEN], depths=[2, 2], num_labels=10,
    )
    return transformers.ConvNextForImageClassification(config)


def of_timm(architecture, model_class, **options):
    """A model of timm, as one that `timm.create_model` makes and `save_pretrained` writes."""
    model = model_class(num_classes=10, **options)
    model.architecture = architecture
    return model


def timm_image(patch):
    return dict(img_size=32, patch_size=patch)


def vit_timm():
    return of_timm(
        "vit_tiny_patch16_224", timm.models.vision_transformer.VisionTransformer,
        embed_dim=2 * HIDDEN, depth=LAYERS, num_heads=2, **timm_image(8),
    )


def swin_timm():
    return of_timm(
        "swin_tiny_patch4_window7_224", timm.models.swin_transformer.SwinTransformer,
        embed_dim=HIDDEN, depths=(2, 2), num_heads=(4, 8), window_size=4, **timm_image(2),
    )


def convnext_timm():
    return of_timm(
        "convnext_tiny", timm.models.convnext.ConvNeXt, depths=(2, 2, 1, 1), dims=4 * (HIDDEN,), patch_size=2,
    )


def mlp_mixer():
    return of_timm(
        "mixer_s16_224", timm.models.mlp_mixer.MlpMixer, embed_dim=HIDDEN, num_blocks=LAYERS, **timm_image(4)
    )


def cait():
    return of_timm(
        "cait_xxs24_224", timm.models.cait.Cait, embed_dim=HIDDEN, depth=LAYERS, num_heads=4, **timm_image(8)
    )


FAMILIES = {
    "bert": bert,
    "cait": cait,
    "convnext": convnext,
    "convnext-timm": convnext_timm,
    "deit": deit,
    "gpt2": gpt2,
    "gpt-neox": gpt_neox,
    "llama-gqa": lambda: llama(key_value_heads=2),
    "llama-mqa": lambda: llama(key_value_heads=1),
    "mistral-gqa": mistral,
    "mixtral": mixtral,
    "mlp-mixer": mlp_mixer,
    "opt": opt,
    "phi": phi,
    "phi3": phi3,
    "qwen-moe": qwen_moe,
    "swin": swin,
    "swin-timm": swin_timm,
    "switch": switch_transformers,
    "t5": lambda: t5("relu"),
    "t5-gated": lambda: t5("gated-gelu"),
    "vit": vit,
    "vit-timm": vit_timm,
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
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(directory)
    else:
        directory.mkdir(parents=True)
        safetensors.torch.save_file(model.state_dict(), directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps({"architecture": model.architecture, "num_classes": 10}))
    return model


def load(family, directory):
    """The model of a checkpoint that has every tensor `make` wrote, and no other."""
    if hasattr(FAMILIES[family](), "save_pretrained"):
        model, loading = type(FAMILIES[family]()).from_pretrained(directory, output_loading_info=True)
        if any(loading.values()):
            raise ValueError(f"{directory}: transformers loads it with {loading}")
    else:
        model = FAMILIES[family]()
        model.load_state_dict(safetensors.torch.load_file(directory / "model.safetensors"))
    return model.float().eval()


def model_input(model):
    """Seeded input that reaches every weight: token ids, or pixels for a vision model."""
    generator = torch.Generator().manual_seed(7)
    config = getattr(model, "config", None)
    if config is None or hasattr(config, "image_size"):
        return {"x" if config is None else "pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    ids = torch.randint(0, VOCABULARY, (2, POSITIONS - 8), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids.flip(0)} if config.is_encoder_decoder else {"input_ids": ids}


def forward(model):
    """The model's first output on `model_input`, in float32."""
    with torch.no_grad():
        if hasattr(model, "config"):
            return model(**model_input(model), return_dict=False)[0]
        return model(**model_input(model))


if __name__ == "__main__":
    if len(sys.argv) < 2 or not set(sys.argv[2:]) <= set(FAMILIES):
        sys.exit(f"usage: checkpoints.py DIRECTORY [FAMILY...], families: {', '.join(FAMILIES)}")
    for chosen in sys.argv[2:] or FAMILIES:
        make(chosen, Path(sys.argv[1]) / chosen)
