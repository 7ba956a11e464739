"""config.json: read as transformers reads it; what model.py does not compute is refused."""

import dataclasses
import json

import pytest

import checkpoint
from checkpoint.config import parse_clip_config, parse_llama_config, parse_llava_config
from model import DecoderConfig, parameter_counts
from vision import VisionConfig

# llava-hf/llava-1.5-7b-hf leaves most of Llama's fields out, the 13B one gives its sizes.
PUBLISHED_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
}
PUBLISHED_13B = {
    **PUBLISHED_7B,
    "text_config": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 40,
        "model_type": "llama",
        "vocab_size": 32064,
        "rope_scaling": None,
        "rope_theta": 5e5,
    },
}
ALMOST_EMPTY = {
    "model_type": "llava",
    "text_config": {"model_type": "llama", "vocab_size": 32064},
    "vision_config": {"model_type": "clip_vision_model"},
}


@pytest.mark.parametrize("published", [PUBLISHED_7B, PUBLISHED_13B, ALMOST_EMPTY])
def test_a_sparse_config_of_transformers_4_means_what_transformers_takes_it_for(published):
    transformers = pytest.importorskip("transformers")
    ours = parse_llava_config(published, "x")
    theirs = transformers.LlavaConfig(**json.loads(json.dumps(published)))
    for name, value in dataclasses.asdict(ours.vision).items():
        assert value == getattr(theirs.vision_config, name), name
    for name, value in dataclasses.asdict(ours.text).items():
        if name == "rope_theta" and hasattr(theirs.text_config, "rope_parameters"):
            assert value == theirs.text_config.rope_parameters["rope_theta"]  # transformers 5
        else:
            assert value == getattr(theirs.text_config, name), name
    assert ours.vision_feature_layer == theirs.vision_feature_layer
    assert ours.image_token_id == theirs.image_token_index


def test_the_published_config_has_the_published_number_of_parameters():
    counts = parameter_counts(parse_llava_config(PUBLISHED_7B, "x"))
    assert sum(counts.values()) == 7_063_427_072  # what llava-hf/llava-1.5-7b-hf holds


def test_what_a_config_leaves_out_is_transformers_default_not_ours():
    """The defaults of transformers' LlamaConfig, CLIPVisionConfig and LlavaConfig, by hand."""
    assert parse_llama_config({}, "x") == DecoderConfig(
        32000, 4096, 11008, 32, 32, 32, 128, 2048, 10000.0, 1e-6, False
    )
    assert parse_clip_config({}, "x") == VisionConfig(
        224, 32, 768, 3072, 12, 12, "quick_gelu", 1e-5
    )
    small = {"hidden_size": 96, "num_attention_heads": 6, "rope_theta": None}
    text = parse_llama_config(small, "x")
    assert (text.head_dim, text.num_key_value_heads, text.rope_theta) == (16, 6, 10000.0)
    model = parse_llava_config({"text_config": {"vocab_size": 32064}, "vision_config": {}}, "x")
    assert (model.vision_feature_layer, model.image_token_id, model.pad_token_id) == (-2, 32000, -1)
    assert model.vision == VisionConfig() and model.image_aspect_ratio == "pad"


def test_rope_is_read_as_transformers_4_and_5_write_it():
    assert parse_llama_config({"rope_theta": 7e4}, "x").rope_theta == 7e4
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert parse_llama_config({"rope_parameters": rope}, "x").rope_theta == 5e5


@pytest.mark.parametrize(
    "part, change, reason",
    [
        (
            "text_config",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type is 'linear', supported: 'default'",
        ),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
            "rope_type is 'llama3'",
        ),
        ("text_config", {"attention_bias": True}, "attention_bias is True, supported: False"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu', supported: 'silu'"),
        ("text_config", {"model_type": "mistral"}, "model_type is 'mistral', supported: 'llama'"),
        ("text_config", {"hidden_size": "32"}, "hidden_size is '32', must be int"),
        ("text_config", {"num_hidden_layers": 0}, "num_hidden_layers is 0, must be above 0"),
        (
            "text_config",
            {"num_key_value_heads": 3},
            "num_attention_heads 4: no multiple of num_key_value_heads 3",
        ),
        ("text_config", {"rope_scaling": [1]}, "rope_scaling must be an object"),
        (
            "vision_config",
            {"model_type": "siglip_vision_model"},
            "model_type is 'siglip_vision_model', supported: 'clip_vision_model'",
        ),
        (
            "vision_config",
            {"hidden_act": "relu"},
            "hidden_act 'relu' is not one of quick_gelu, gelu, gelu_pytorch_tanh",
        ),
        (
            None,
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy is 'full', supported: 'default'",
        ),
        (
            None,
            {"vision_feature_layer": [-2, -5]},
            r"the vision feature layer is \[-2, -5\], must be one of the 2 layers",
        ),
        (
            None,
            {"projector_hidden_act": "relu"},
            "projector_hidden_act is 'relu', supported: 'gelu'",
        ),
        (
            None,
            {"image_token_index": 10**6, "image_token_id": 10**6},
            "image_token_index is 1000000, the vocabulary has",
        ),
    ],
)
def test_a_config_that_we_do_not_compute_is_refused(saved_model, part, change, reason):
    _, path = saved_model
    stored = checkpoint.read_json(path / "config.json")
    (stored[part] if part else stored).update(change)
    if "rope_scaling" in change:
        del stored["text_config"]["rope_parameters"]
    checkpoint.write_json(path / "config.json", stored)
    with pytest.raises(ValueError, match=reason) as error:
        checkpoint.load_model(path)
    assert str(path / "config.json") in str(error.value)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_images_that_were_normalised_otherwise_are_refused(saved_model, name):
    _, path = saved_model
    settings = checkpoint.read_json(path / "preprocessor_config.json")
    (path / "preprocessor_config.json").unlink()
    settings["image_mean"] = [0.5, 0.5, 0.5]
    if name == "processor_config.json":  # as transformers 5 writes it
        settings = {"image_processor": settings}
    checkpoint.write_json(path / name, settings)
    with pytest.raises(ValueError, match="only CLIP's"):
        checkpoint.load_model(path)


@pytest.mark.parametrize("do_pad, mode", [(True, "pad"), (False, "square"), (None, "pad")])
def test_the_folder_says_how_an_image_becomes_square(saved_model, do_pad, mode):
    _, path = saved_model
    settings = checkpoint.read_json(path / "preprocessor_config.json")
    checkpoint.write_json(path / "preprocessor_config.json", {**settings, "do_pad": do_pad})
    assert checkpoint.load_config(path).image_aspect_ratio == mode
