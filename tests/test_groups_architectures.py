"""Grouping of real architectures, built from their configurations at a tiny size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import transformers
from torch import nn

from ebbtide.torch.groups import explain_groups, param_groups

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
TEXT = {**SMALL, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}


def build(architecture: str, configuration: str, **settings: object) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        config = getattr(transformers, configuration)(**settings)
        return getattr(transformers, architecture)(config)

    return model


MODELS = {
    "ResNet": build(
        "ResNetForImageClassification", "ResNetConfig",
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3,
    ),
    "ConvNeXt": build(
        "ConvNextForImageClassification", "ConvNextConfig",
        hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_labels=3,
    ),
    "CLIP": build(
        "CLIPModel", "CLIPConfig", text_config=TEXT, vision_config=IMAGE, projection_dim=8
    ),
    "Mamba": build(
        "MambaForCausalLM", "MambaConfig",
        vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2,
    ),
    "GPT-2": build(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=50, n_embd=16, n_layer=2, n_head=2,
        n_positions=20, bos_token_id=1, eos_token_id=2,
    ),
    "Llama": build("LlamaForCausalLM", "LlamaConfig", **TEXT, num_key_value_heads=1),
    "BERT": build("BertForMaskedLM", "BertConfig", **TEXT),
    "ViT": build("ViTForImageClassification", "ViTConfig", **IMAGE, num_labels=3),
    "T5": build(
        "T5ForConditionalGeneration", "T5Config",
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
    ),
}  # fmt: skip

# The parameters of two dimensions or more that do not decay, without the numbers of their layers.
SPARED = {
    "Mamba": {"backbone.layers.mixer.A_log"},
    "ViT": {"vit.embeddings.cls_token"},
    "T5": {
        "encoder.block.layer.SelfAttention.relative_attention_bias.weight",
        "decoder.block.layer.SelfAttention.relative_attention_bias.weight",
    },
}
EMBEDDINGS = {
    "CLIP": {
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "vision_model.embeddings.position_embedding.weight",
    },
    "Mamba": {"backbone.embeddings.weight"},
    "GPT-2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "Llama": {"model.embed_tokens.weight"},
    "BERT": {
        f"bert.embeddings.{table}_embeddings.weight" for table in ("word", "position", "token_type")
    },
    "ViT": {"vit.embeddings.position_embeddings"},
    "T5": {"shared.weight"},
}
# Layers from the embeddings to the head, the tallest tower of several.
LAYERS = {
    "ResNet": 5, "ConvNeXt": 6, "CLIP": 4, "Mamba": 4, "GPT-2": 4, "Llama": 4, "BERT": 4, "ViT": 4,
    "T5": 4,
}  # fmt: skip

each_model = pytest.mark.parametrize("name", MODELS)


def without_numbers(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


@each_model
def test_matrices_and_kernels_decay_and_nothing_else(name: str) -> None:
    model = MODELS[name]()
    groups = param_groups(model, weight_decay=0.1)
    table = explain_groups(groups)
    assert [group["name"] for group in groups] in (["decay", "no_decay"], ["no_decay", "decay"])
    assert table.decayed_below_2d == ()
    spared = {
        without_numbers(row.name) for row in table.rows if not row.decays and len(row.shape) > 1
    }
    assert spared == SPARED.get(name, set())
    kept = {id(tensor) for tensor in model.parameters()}
    assert {id(tensor) for group in groups for _, tensor in group["params"]} == kept
    norms = {
        f"{path}.{leaf}"
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for leaf in module._parameters
    }
    assert norms
    assert norms <= {row.name for row in table.rows if not row.decays}


@each_model
def test_embeddings_are_found(name: str) -> None:
    groups = param_groups(MODELS[name](), weight_decay=0.1, embeddings="no_decay")
    listed = {entry for group in groups for entry in group["embeddings"].split(",") if entry}
    tokens = {"vit.embeddings.cls_token"} if name == "ViT" else set()
    biases = {entry for entry in listed if entry.endswith("relative_attention_bias.weight")}
    assert listed - tokens - biases == EMBEDDINGS.get(name, set())
    spared = {row.name for row in explain_groups(groups).rows if not row.decays}
    assert listed <= spared


@each_model
def test_names_alone_give_the_same_groups(name: str) -> None:
    model = MODELS[name]()
    decayed = [
        {row.name for row in explain_groups(param_groups(given, 0.1)).rows if row.decays}
        for given in (model, model.named_parameters())
    ]
    # Only the class of T5's tables of biases tells that they are tables.
    differ = {f"{part}.block.0.layer.0.SelfAttention" for part in ("encoder", "decoder")}
    tables = {f"{part}.relative_attention_bias.weight" for part in differ}
    assert decayed[0] ^ decayed[1] == (tables if name == "T5" else set())


@each_model
def test_layers_are_found(name: str) -> None:
    groups = param_groups(MODELS[name](), 0.1, lr=1.0, layer_decay=0.5)
    assert {group["lr"] for group in groups} == {0.5**i for i in range(LAYERS[name])}
    assert len(groups) <= 2 * LAYERS[name]
