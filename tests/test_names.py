"""Names of tensors, against names copied by hand from published files."""

import pytest
import torch

from checkpoint.names import find_names, hf_name, match_tensors

VISION = {
    "class_embed": "embeddings.class_embedding",
    "patch_embed.weight": "embeddings.patch_embedding.weight",
    "pos_embed": "embeddings.position_embedding.weight",
    "pre_norm.weight": "pre_layrnorm.weight",
    "pre_norm.bias": "pre_layrnorm.bias",
    "layers.23.attn.q_proj.weight": "encoder.layers.23.self_attn.q_proj.weight",
    "layers.23.attn.k_proj.bias": "encoder.layers.23.self_attn.k_proj.bias",
    "layers.23.attn.v_proj.weight": "encoder.layers.23.self_attn.v_proj.weight",
    "layers.23.attn.out_proj.bias": "encoder.layers.23.self_attn.out_proj.bias",
    "layers.0.norm1.weight": "encoder.layers.0.layer_norm1.weight",
    "layers.0.norm2.bias": "encoder.layers.0.layer_norm2.bias",
    "layers.0.fc1.weight": "encoder.layers.0.mlp.fc1.weight",
    "layers.0.fc2.bias": "encoder.layers.0.mlp.fc2.bias",
    "final_norm.weight": "post_layernorm.weight",
}
DECODER = {
    "embed_tokens.weight": "embed_tokens.weight",
    "layers.39.attn.q_proj.weight": "layers.39.self_attn.q_proj.weight",
    "layers.39.attn.k_proj.weight": "layers.39.self_attn.k_proj.weight",
    "layers.39.attn.v_proj.weight": "layers.39.self_attn.v_proj.weight",
    "layers.39.attn.o_proj.weight": "layers.39.self_attn.o_proj.weight",
    "layers.0.mlp.gate_proj.weight": "layers.0.mlp.gate_proj.weight",
    "layers.0.mlp.up_proj.weight": "layers.0.mlp.up_proj.weight",
    "layers.0.mlp.down_proj.weight": "layers.0.mlp.down_proj.weight",
    "layers.0.attn_norm.weight": "layers.0.input_layernorm.weight",
    "layers.0.mlp_norm.weight": "layers.0.post_attention_layernorm.weight",
    "norm.weight": "norm.weight",
}
# How each kind of file begins the names of: vision encoder, projector (twice), decoder, head.
FAMILIES = {
    "llava-hf/llava-1.5-7b-hf": (
        "vision_tower.vision_model.",
        "multi_modal_projector.linear_1.",
        "multi_modal_projector.linear_2.",
        "language_model.model.",
        "language_model.lm_head.",
    ),
    "transformers 5": (
        "vision_tower.",
        "multi_modal_projector.linear_1.",
        "multi_modal_projector.linear_2.",
        "language_model.model.",
        "language_model.lm_head.",
    ),
    "named_parameters() of transformers 4.52": (
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.",
        "model.multi_modal_projector.linear_2.",
        "model.language_model.",
        "lm_head.",
    ),
    "named_parameters() of transformers 5": (
        "model.vision_tower.",
        "model.multi_modal_projector.linear_1.",
        "model.multi_modal_projector.linear_2.",
        "model.language_model.",
        "lm_head.",
    ),
    "liuhaotian/llava-v1.5-7b": (
        "model.vision_tower.vision_tower.vision_model.",
        "model.mm_projector.0.",
        "model.mm_projector.2.",
        "model.",
        "lm_head.",
    ),
    "meta-llama/Llama-2-7b-hf": (None, None, None, "model.", "lm_head."),
    "openai/clip-vit-large-patch14-336": ("vision_model.", None, None, None, None),
    "CLIPVisionModel of transformers 5": ("", None, None, None, None),
    "mm_projector.bin": (None, "mm_projector.0.", "mm_projector.2.", None, None),
}


def names_of(family):
    """{our name: name in the files of a family}."""
    vision, first, second, decoder, head = FAMILIES[family]
    names = {}
    if vision is not None:
        names |= {f"vision.{ours}": vision + theirs for ours, theirs in VISION.items()}
    if first:
        names |= {f"projector.0.{kind}": first + kind for kind in ("weight", "bias")}
        names |= {f"projector.2.{kind}": second + kind for kind in ("weight", "bias")}
    if decoder:
        names |= {f"decoder.{ours}": decoder + theirs for ours, theirs in DECODER.items()}
        names["decoder.lm_head.weight"] = f"{head}weight"
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_each_kind_of_published_file_is_understood(family):
    names = names_of(family)
    tensors = {name: torch.full((2,), i) for i, name in enumerate(names.values())}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    shapes = dict.fromkeys(names, (2,))
    assert find_names(shapes, tensors) == names
    matched = match_tensors(tensors, shapes, "x")
    assert {name: tensor[0].item() for name, tensor in matched.items()} == {
        name: i for i, name in enumerate(names)
    }


def test_the_names_that_we_write_are_those_of_llava_hf():
    names = names_of("llava-hf/llava-1.5-7b-hf")
    assert {name: hf_name(name) for name in names} == names
    with pytest.raises(ValueError, match="resampler.queries: checkpoint/names.json has no name"):
        hf_name("resampler.queries")


def test_what_does_not_fit_is_named():
    names = names_of("meta-llama/Llama-2-7b-hf")
    tensors = {name: torch.zeros(2) for name in names.values()}
    shapes = dict.fromkeys(names, (2,)) | {"decoder.norm.weight": (3,)}
    del tensors["model.embed_tokens.weight"]
    tensors |= {"logit_scale": torch.zeros(1), "text_model.final_layer_norm.bias": torch.zeros(1)}
    with pytest.raises(ValueError) as error:
        match_tensors(tensors, shapes, "folder")
    assert str(error.value) == (
        "folder: missing model.embed_tokens.weight; model.norm.weight is [2], must be [3]; "
        "left over logit_scale; left over text_model.final_layer_norm.bias"
    )
    # Of CLIP, the text encoder may be left over.
    tensors["model.embed_tokens.weight"], shapes["decoder.norm.weight"] = torch.zeros(2), (2,)
    assert len(match_tensors(tensors, shapes, "folder", is_clip=True)) == len(names)


@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_tied_model_may_hold_its_embedding_twice_but_not_another_head(head):
    names = names_of("meta-llama/Llama-2-7b-hf")
    del names["decoder.lm_head.weight"]
    tensors = {name: torch.zeros(2) for name in names.values()}
    shapes = dict.fromkeys(names, (2,))
    assert len(match_tensors(tensors | {head: torch.zeros(2)}, shapes, "x")) == len(names)
    with pytest.raises(ValueError, match=f"x: left over {head}$"):
        match_tensors(tensors | {head: torch.ones(2)}, shapes, "x")
