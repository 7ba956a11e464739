"""config.json: LlavaConfig, LlamaConfig and CLIPVisionConfig of transformers <-> our ModelConfig.

Reads and writes what transformers 4 and 5 read and write. templates/config.json has the values that
never change: a file with others is a ValueError. `where`: the name of the file.
"""

from dataclasses import asdict, fields

from checkpoint.processor import read_template
from model import DecoderConfig, ModelConfig
from vision import VisionConfig

# transformers' values of what a config.json leaves out, where ours are others.
LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
CLIP_DEFAULTS = asdict(VisionConfig(224, 32, 768, 3072, 12, 12))


def require_values(data, where, required):
    """ValueError if a field has another value. A list, an object and null require nothing."""
    for name, value in required.items():
        free = value is None or isinstance(value, (list, dict))
        # Absent or null means transformers' default, which is the required value.
        if not free and data.get(name) not in (None, value):
            raise ValueError(f"{where}: {name} is {data[name]!r}, supported: {value!r}")


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


def parse_llama_config(data, where):
    """transformers' LlamaConfig -> DecoderConfig."""
    require_values(data, where, read_template("config.json")["text_config"])

    # RoPE: transformers 4 writes rope_theta and rope_scaling, 5 writes rope_parameters.
    rope = {"rope_theta": data.get("rope_theta"), **get_object(data, "rope_scaling", where)}
    rope |= get_object(data, "rope_parameters", where)
    rope["rope_type"] = rope.get("rope_type", rope.get("type"))
    require_values(data | rope, where, {"rope_type": "default", "partial_rotary_factor": 1.0})
    data = LLAMA_DEFAULTS | drop_nulls(data) | {"rope_theta": rope["rope_theta"] or 10000.0}

    # Two defaults follow from other sizes, which must be valid before we divide.
    sizes = parse_fields(DecoderConfig, data | {"num_key_value_heads": 1, "head_dim": 2}, where)
    data.setdefault("num_key_value_heads", sizes.num_attention_heads)
    data.setdefault("head_dim", sizes.hidden_size // sizes.num_attention_heads)
    return parse_fields(DecoderConfig, data, where)


def parse_clip_config(data, where):
    """transformers' CLIPVisionConfig, or a CLIPConfig with one inside -> VisionConfig."""
    if data.get("model_type") == "clip":
        vision = get_object(data, "vision_config", where)
        further = get_object(data, "vision_config_dict", where)
        data = {**vision, **further, "model_type": "clip_vision_model"}
    require_values(data, where, {"model_type": "clip_vision_model", "num_channels": 3})
    return parse_fields(VisionConfig, CLIP_DEFAULTS | drop_nulls(data), where)


def parse_llava_config(data, where, image_aspect_ratio="pad"):
    """transformers' LlavaConfig -> ModelConfig."""
    require_values(data, where, read_template("config.json"))

    text, vision = (get_object(data, name, where) for name in ("text_config", "vision_config"))
    data, text = drop_nulls(data), drop_nulls(text)
    tied = data.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    decoder = parse_llama_config(text | {"tie_word_embeddings": bool(tied)}, where)
    encoder = parse_clip_config(vision, where) if vision else VisionConfig()

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
    data["vision_config"] |= {"projection_dim": config.vision.hidden_size, **asdict(config.vision)}
    data["text_config"] |= {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": config.pad_token_id,
        **asdict(config.text),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.text.rope_theta},
    }
    return data
