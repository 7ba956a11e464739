"""config.json: transformers' configs of LLaVA and its parts <-> our ModelConfig.

Parts: Llama's, Qwen2's and Qwen3's decoder; CLIP's and SigLIP's vision encoder.

Reads and writes what transformers 4 and 5 read and write. fields.json is the table of the fields
that are not shapes: the values that we compute, and names whose value does not change the model. A
file with other values, or with fields of other names, is a ValueError: it may be another model.
`where`: the name of the file.
"""

from dataclasses import asdict, fields, replace
from pathlib import Path

from checkpoint.processor import read_template, select_strategy
from kernels.rope import RopeScaling
from model import DecoderConfig, ModelConfig
from vision import VisionConfig
from vocabulary.files import read_json

# transformers' values of what a config.json leaves out, where ours are others.
QWEN_DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
TEXT_DEFAULTS = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "qwen2": QWEN_DEFAULTS,
    "qwen3": QWEN_DEFAULTS | {"head_dim": 128},
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
SIGLIP |= {"model_type": "siglip_vision_model"}
VISION_DEFAULTS = {
    "clip": asdict(VisionConfig(224, 32, 768, 3072, 12, 12)),
    "siglip": asdict(VisionConfig(224, 16, 768, 3072, 12, 12, **SIGLIP)),
}

ALLOWED = read_json(Path(__file__).with_name("fields.json"))
ANY_VALUE = ALLOWED.pop("any value")
ANY_VALUE["llama"] += [field.name for field in fields(DecoderConfig)]
ANY_VALUE["clip"] += [field.name for field in fields(VisionConfig)]
ANY_VALUE["siglip"] += ANY_VALUE["clip"]
HINTS = {
    "model_type": "; docs/bases.md has a table of the bases that are read",
    "quantization_config": "; quantised weights are not read: take those that were quantised",
}


def check_fields(data, part, where, **further):
    """ValueError unless we compute what each field of a JSON object says. part: of fields.json.
    further: {field: its allowed values}, beside the table."""
    allowed, free = ALLOWED[part] | further, {*ANY_VALUE[part], *ANY_VALUE["each"]}
    # Absent or null means transformers' default, which is an allowed value.
    for name in [name for name in allowed if data.get(name) is not None]:
        if data[name] not in allowed[name]:
            values = ", ".join(map(repr, allowed[name])) or "null"
            reason = f"is {data[name]!r:.60}, supported: {values}{HINTS.get(name, '')}"
            raise ValueError(f"{where}: {name} {reason}")

    # What a field of another name does is not known, unless it is off.
    for name, value in data.items():
        known = name in allowed or name in free or name.startswith("_")
        if not known and value not in (None, False, "", [], {}):
            raise ValueError(
                f"{where}: {name} is {value!r:.60}, which may change the model: it is not known "
                "here; delete it there if the model is the same without"
            )


def require_layer(layer, vision, where):
    """ValueError if the vision encoder has no such hidden state."""
    count = vision.num_hidden_layers
    if type(layer) is not int or not -count - 1 <= layer <= count:
        reason = f"must be one of the {count} layers"
        raise ValueError(f"{where}: the vision feature layer is {layer!r}, {reason}")


def get_object(data, name, where):
    """A JSON object inside another; {} if it is absent or null."""
    value = data.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {name} must be an object")
    return value


def drop_nulls(data):
    return {name: value for name, value in data.items() if value is not None}


def parse_fields(kind, data, where):
    """JSON object -> a config class, from the fields that it knows."""
    values = drop_nulls({field.name: data.get(field.name) for field in fields(kind)})
    for name, value in values.items():
        # The class attribute is the default. A JSON number without a point is an int.
        wanted = type(getattr(kind, name))
        if type(value) is not wanted and not (wanted is float and isinstance(value, int)):
            raise ValueError(f"{where}: {name} is {value!r}, must be {wanted.__name__}")
        if type(value) in (int, float) and value <= 0:
            raise ValueError(f"{where}: {name} is {value!r}, must be above 0")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def parse_text_config(data, where):
    """transformers' LlamaConfig, Qwen2Config or Qwen3Config -> DecoderConfig."""
    if set(data.get("layer_types") or ()) == {"full_attention"}:
        data = data | {"layer_types": None}
    if data.get("use_sliding_window") is False:  # as in all of Qwen's: the window is not used
        data = data | {"sliding_window": None}
    check_fields(data, "llama", where)
    theta, scaling = read_rope(data, where)
    defaults = TEXT_DEFAULTS[data.get("model_type") or "llama"]
    data = defaults | drop_nulls(data) | {"rope_theta": theta, "rope_scaling": None}

    # Two defaults follow from other sizes, which must be valid before we divide.
    sizes = parse_fields(DecoderConfig, data | {"num_key_value_heads": 1, "head_dim": 2}, where)
    data.setdefault("num_key_value_heads", sizes.num_attention_heads)
    data.setdefault("head_dim", sizes.hidden_size // sizes.num_attention_heads)
    return replace(parse_fields(DecoderConfig, data, where), rope_scaling=scaling)


def read_rope(data, where):
    """-> (RoPE's base, a RopeScaling or None). transformers 4 writes rope_theta and rope_scaling, 5
    writes rope_parameters; a file may have all. Each must say the same."""
    thetas, scalings = [data.get("rope_theta")], []
    for name in ("rope_scaling", "rope_parameters"):
        rope = get_object(data, name, where)
        scaled = rope.get("rope_type", rope.get("type")) == "llama3"
        names = [field.name for field in fields(RopeScaling)] if scaled else []
        for key, value in rope.items():
            key = "rope_type" if key == "type" else key
            if key not in names:
                check_fields({key: value}, "rope", where)
        for key in names:
            if rope.get(key) is None:
                raise ValueError(f"{where}: {name} lacks {key}")
        if rope:
            scalings.append(parse_fields(RopeScaling, rope, where) if scaled else None)
        thetas.append(rope.get("rope_theta"))

    thetas = [theta for theta in thetas if theta is not None] or [10000.0]
    if any(theta != thetas[0] for theta in thetas):
        raise ValueError(f"{where}: rope_theta is {' and '.join(map(str, thetas))}: keep one value")
    if any(scaling != scalings[0] for scaling in scalings):
        raise ValueError(f"{where}: rope_scaling and rope_parameters differ: keep one of them")
    return thetas[0], scalings[0] if scalings else None


def parse_vision_config(data, where):
    """transformers' CLIPVisionConfig or SiglipVisionConfig, or a CLIPConfig or SiglipConfig with
    one inside -> VisionConfig."""
    kind = data.get("model_type")
    if kind in ("clip", "siglip"):
        vision = get_object(data, "vision_config", where)
        further = get_object(data, "vision_config_dict", where)
        quantised = {"quantization_config": data.get("quantization_config")}
        data = {**vision, **further, **quantised, "model_type": f"{kind}_vision_model"}
    part = "siglip" if data.get("model_type") == "siglip_vision_model" else "clip"
    check_fields(data, part, where)
    return parse_fields(VisionConfig, VISION_DEFAULTS[part] | drop_nulls(data), where)


def parse_llava_config(data, where, image_aspect_ratio="pad"):
    """transformers' LlavaConfig -> ModelConfig."""
    check_fields(data, "llava", where, image_aspect_ratio=[image_aspect_ratio])
    text, vision = (get_object(data, name, where) for name in ("text_config", "vision_config"))
    data, text = drop_nulls(data), drop_nulls(text)
    tied = data.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    decoder = parse_text_config(text | {"tie_word_embeddings": bool(tied)}, where)
    encoder = parse_vision_config(vision, where) if vision else VisionConfig()
    strategy, supported = data.get("vision_feature_select_strategy"), select_strategy(encoder)
    if (strategy or "default") != supported:
        reason = f"is {strategy!r}, supported: {supported!r}"
        raise ValueError(f"{where}: vision_feature_select_strategy {reason}")

    # Absent: transformers' default, and no <pad>.
    layer = data.get("vision_feature_layer", -2)
    image_id = data.get("image_token_index", data.get("image_token_id", 32000))
    pad_id = data.get("pad_token_id", text.get("pad_token_id", -1))
    require_layer(layer, encoder, where)
    if type(image_id) is not int or not 0 <= image_id < decoder.vocab_size:
        reason = f"the vocabulary has {decoder.vocab_size:,} rows"
        raise ValueError(f"{where}: image_token_index is {image_id!r}, {reason}")
    return ModelConfig(encoder, decoder, layer, image_aspect_ratio, image_id, pad_id)


def llava_config(config, dtype, tokenizer):
    """ModelConfig -> transformers' LlavaConfig as a JSON object. dtype: "float32" …"""
    data = read_template("config.json")
    # Some fields have one name in transformers 4 and another one in 5.
    data |= {
        "dtype": dtype,
        "torch_dtype": dtype,
        "image_token_index": config.image_token_id,
        "image_token_id": config.image_token_id,
        "pad_token_id": config.pad_token_id,
        "image_seq_length": config.vision.num_patches,
        "vision_feature_layer": config.vision_feature_layer,
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }
    data["vision_feature_select_strategy"] = select_strategy(config.vision)
    data["vision_config"] = asdict(config.vision)
    if config.vision.is_clip:
        data["vision_config"]["projection_dim"] = config.vision.hidden_size
    else:
        data["vision_config"]["vision_use_head"] = False  # LLaVA does not call it

    # transformers 4 reads rope_scaling, 5 rope_parameters.
    text = asdict(config.text)
    scaling = text.pop("rope_scaling")
    rope = {"rope_type": "llama3" if scaling else "default", **(scaling or {})}
    rope["rope_theta"] = config.text.rope_theta
    if scaling:
        text["rope_scaling"] = rope
    data["text_config"] |= {
        "architectures": [ARCHITECTURES[config.text.model_type]],
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": config.pad_token_id,
        **text,
        "rope_parameters": rope,
    }
    return data
