"""config.json: read as transformers reads it; what model.py does not compute is refused."""

import dataclasses
import json

import pytest

import checkpoint
from checkpoint.config import parse_llava_config, parse_text_config, parse_vision_config
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
        if name == "rope_scaling":
            assert value is None
        elif name == "rope_theta" and hasattr(theirs.text_config, "rope_parameters"):
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
    assert parse_text_config({}, "x") == DecoderConfig(
        32000, 4096, 11008, 32, 32, 32, 128, 2048, 10000.0, 1e-6, False
    )
    assert parse_vision_config({}, "x") == VisionConfig(
        224, 32, 768, 3072, 12, 12, "quick_gelu", 1e-5
    )
    small = {"hidden_size": 96, "num_attention_heads": 6, "rope_theta": None}
    text = parse_text_config(small, "x")
    assert (text.head_dim, text.num_key_value_heads, text.rope_theta) == (16, 6, 10000.0)
    model = parse_llava_config({"text_config": {"vocab_size": 32064}, "vision_config": {}}, "x")
    assert (model.vision_feature_layer, model.image_token_id, model.pad_token_id) == (-2, 32000, -1)
    assert model.vision == VisionConfig() and model.image_aspect_ratio == "pad"


def test_rope_is_read_as_transformers_4_and_5_write_it():
    assert parse_text_config({"rope_theta": 7e4}, "x").rope_theta == 7e4
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert parse_text_config({"rope_parameters": rope}, "x").rope_theta == 5e5


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
            "rope_parameters lacks factor",
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
            {"model_type": "siglip2_vision_model"},
            "model_type is 'siglip2_vision_model', supported: 'clip_vision_model', 'siglip_vi",
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
    checkpoint.write_json(path / "config.json", stored)
    with pytest.raises(ValueError, match=reason) as error:
        checkpoint.load_model(path)
    assert str(path / "config.json") in str(error.value)


# A field of these three parts, and what it may not be: one line names it, in a folder of ours too.
FUNCTION_CHANGES = {
    "text_config": {
        "rope_scaling": [{"factor": 8.0}, {"rope_type": "yarn"}, {"type": "su", "factor": 2.0}],
        "rope_parameters": [{"full_attention": {"rope_type": "default"}}, {"mrope_section": [1]}],
        "rope_theta": [7e4],  # beside rope_parameters, which say 10,000
        "partial_rotary_factor": [0.5],
        "sliding_window": [4096],
        "layer_types": [["sliding_attention", "full_attention"]],
        "attention_bias": [True],
        "mlp_bias": [True],
        "hidden_act": ["gelu_pytorch_tanh"],
        "logit_scale": [0.0625],
        "final_logit_softcapping": [30.0],
        "embedding_multiplier": [12.0],
        "num_local_experts": [8],
        "use_qk_norm": [True],
        "quantization_config": [{"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}],
    },
    "vision_config": {
        "num_channels": [1],
        "vision_use_head": [True],
        "quantization_config": [{"quant_method": "bitsandbytes"}],
    },
    None: {
        "image_aspect_ratio": ["anyres", "anyres_max_9", "square"],
        "image_grid_pinpoints": [[[336, 672]]],
        "mm_patch_merge_type": ["spatial_unpad"],
        "mm_use_im_start_end": [True],
        "projector_hidden_act": ["silu"],
        "multimodal_projector_bias": [False],
        "vision_feature_select_strategy": ["full"],
        "quantization_config": [{"quant_method": "fp8"}],
    },
}
CASES = [
    (part, name, value)
    for part, changes in FUNCTION_CHANGES.items()
    for name, values in changes.items()
    for value in values
]


@pytest.mark.parametrize("part, name, value", CASES)
def test_a_field_that_changes_the_model_is_honoured_or_refused_by_name(
    saved_model, part, name, value
):
    _, path = saved_model
    stored = checkpoint.read_json(path / "config.json")
    changed = stored[part] if part else stored
    before = changed.get(name)
    for harmless in (None, before):
        changed[name] = harmless
        checkpoint.write_json(path / "config.json", stored)
        checkpoint.load_config(path)
    changed[name] = value
    checkpoint.write_json(path / "config.json", stored)
    with pytest.raises(ValueError) as error:
        checkpoint.load_config(path)
    text = str(error.value)
    # RoPE's objects are named by the field inside them.
    inner = {"factor", "rope_type", "full_attention", "mrope_section"}
    assert text.startswith(f"{path / 'config.json'}: ") and "\n" not in text and len(text) < 400
    assert f" {name} is " in text or any(f" {field} is " in text for field in inner), text


def test_fields_that_do_not_change_the_model_are_passed_over():
    """As in SmolLM2, Vicuna and CLIP, whose files hold all that transformers knows."""
    free = {"is_llama_config": True, "rope_interleaved": False, "use_cache": False}
    free |= {"pretraining_tp": 2, "attention_dropout": 0.1, "max_sequence_length": 2048}
    free |= {"_name_or_path": "x", "transformers_version": "4.1", "eos_token_id": [2, 7]}
    free |= {"transformers.js_config": {"dtype": "q4"}, "temperature": 0.9, "top_k": 50}
    free |= {"layer_types": ["full_attention"] * 32, "sliding_window": None, "unknown": None}
    free |= {"rope_scaling": {"type": "default", "rope_theta": 1e4}, "use_sliding_window": False}
    assert parse_text_config(free, "x") == parse_text_config({}, "x")
    # openai/clip-vit-large-patch14-336 has a field for each thing that transformers 4.21 knew.
    free = {"dropout": 0.0, "projection_dim": 768, "bad_words_ids": None, "return_dict": True}
    free |= dict.fromkeys(("length_penalty", "top_p", "typical_p", "repetition_penalty"), 1.0)
    free |= dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1)
    free |= {"chunk_size_feed_forward": 0, "id2label": {"0": "LABEL_0"}, "max_length": 20}
    free |= {"tie_word_embeddings": True, "torchscript": False, "initializer_factor": 1.0}
    free |= {"label2id": {"LABEL_0": 0}, "pruned_heads": {}, "diversity_penalty": 0.0, "top_k": 50}
    assert parse_vision_config(free, "x") == parse_vision_config({}, "x")
    free = {"ignore_index": -100, "image_seq_length": 576, "image_aspect_ratio": "pad"}
    free |= {"mm_patch_merge_type": "flat", "text_config": {"vocab_size": 32064}}
    assert parse_llava_config(free, "x").text.vocab_size == 32064


def test_configs_of_transformers_5_and_of_all_its_defaults_are_read():
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    ours = parse_text_config(json.loads(llama.to_json_string(use_diff=False)), "x")
    assert ours.rope_theta == 5e5 and ours.rms_norm_eps == 1e-6
    clip = transformers.CLIPConfig().to_json_string(use_diff=False)
    assert parse_vision_config(json.loads(clip), "x").image_size == 224
    llava = transformers.LlavaConfig(text_config=transformers.LlamaConfig(vocab_size=32064))
    ours = parse_llava_config(json.loads(llava.to_json_string(use_diff=False)), "x")
    assert ours.text.vocab_size == 32064 and ours.vision.hidden_size == 1024


# Each makes other pixels than `preprocess`: for a model that pads, and for one that crops.
PIXEL_CHANGES = {
    "do_rescale": [False],
    "rescale_factor": [1 / 127.5, 1 / 256],
    "do_resize": [False],
    "do_normalize": [False],
    "resample": [2],
    "image_mean": [0.5, [0.5, 0.5, 0.5], [0.48145466], ["a", "b", "c"]],
    "image_std": [[0.5, 0.5, 0.5]],
    "size": [{"shortest_edge": 20}, {"longest_edge": 16}, 24, {"height": 16, "width": 20}],
    "crop_size": [{"height": 8, "width": 8}, 8],
    "image_processor_type": ["SiglipImageProcessor", "LlavaNextImageProcessor"],
    "image_grid_pinpoints": [[[16, 32]]],
    "do_flip_channel_order": [True],
}


@pytest.mark.parametrize("do_pad", [True, False])
@pytest.mark.parametrize("name", PIXEL_CHANGES)
def test_an_image_processor_that_makes_other_pixels_is_refused(saved_model, name, do_pad):
    _, path = saved_model
    file = path / "preprocessor_config.json"
    settings = {**checkpoint.read_json(file), "do_pad": do_pad}
    for value in PIXEL_CHANGES[name]:
        checkpoint.write_json(file, settings | {name: value})
        with pytest.raises(ValueError) as error:
            checkpoint.load_config(path)
        text = str(error.value)
        assert text.startswith(f"{file}: {name} is ") and "\n" not in text, text


def test_other_spellings_of_the_same_pixels_are_read(saved_model):
    _, path = saved_model
    file = path / "preprocessor_config.json"
    settings = checkpoint.read_json(file)
    mean = [0.4815, 0.4578, 0.4082]
    same = {"size": 16, "crop_size": 16, "image_mean": mean, "rescale_factor": 0.0039215686}
    same |= {"feature_extractor_type": "CLIPFeatureExtractor", "_valid_processor_keys": ["size"]}
    square = {"height": 16, "width": 16, "shortest_edge": None}
    for further in (same, {"do_center_crop": False, "size": square}, {"do_pad": False}):
        checkpoint.write_json(file, settings | further)
        checkpoint.load_config(path)
    # Cropped, not padded: a size of both sides would stretch the image, and no crop leaves it long.
    for further in ({"do_center_crop": False}, {"size": square}):
        checkpoint.write_json(file, settings | further | {"do_pad": False})
        with pytest.raises(ValueError, match=f"{[*further][0]} is "):
            checkpoint.load_config(path)

    # transformers 5 keeps the image processor in another file. Both must say the same.
    checkpoint.write_json(file, settings)
    both = {"image_processor": settings | {"do_pad": False}}
    checkpoint.write_json(path / "processor_config.json", both)
    with pytest.raises(ValueError, match="do_pad differs between the files"):
        checkpoint.load_config(path)
    for name, value in (
        ("image_token", "<img>"),
        ("num_additional_image_tokens", 0),
        ("vision_feature_select_strategy", "full"),
    ):
        checkpoint.write_json(path / "processor_config.json", {name: value})
        with pytest.raises(ValueError, match=f"processor_config.json: {name} is "):
            checkpoint.load_config(path)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_images_that_were_normalised_otherwise_are_refused(saved_model, name):
    _, path = saved_model
    settings = checkpoint.read_json(path / "preprocessor_config.json")
    (path / "preprocessor_config.json").unlink()
    settings["image_mean"] = [0.5, 0.5, 0.5]
    if name == "processor_config.json":  # as transformers 5 writes it
        settings = {"image_processor": settings}
    checkpoint.write_json(path / name, settings)
    with pytest.raises(ValueError, match=r"image_mean is \[0.5, 0.5, 0.5\], supported: 0.48"):
        checkpoint.load_model(path)


@pytest.mark.parametrize("do_pad, mode", [(True, "pad"), (False, "square"), (None, "pad")])
def test_the_folder_says_how_an_image_becomes_square(saved_model, do_pad, mode):
    _, path = saved_model
    settings = checkpoint.read_json(path / "preprocessor_config.json")
    checkpoint.write_json(path / "preprocessor_config.json", {**settings, "do_pad": do_pad})
    assert checkpoint.load_config(path).image_aspect_ratio == mode
