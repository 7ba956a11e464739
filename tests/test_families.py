"""Today's bases: small random decoders and encoders of each family, ours beside transformers'."""

import math

import numpy as np
import pytest
import torch
from bpe_models import ENGLISH, KOREAN, byte_level_model
from PIL import Image

import checkpoint
import data
import generate
import vision
from checkpoint.build import build, plan_build
from checkpoint.config import parse_text_config, parse_vision_config
from kernels.rope import RopeScaling, rope_table
from vision import VisionConfig
from vocabulary.extend import learn_pieces

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
DECODERS = {
    "SmolLM2": ("Llama", {"tie_word_embeddings": True, "rope_theta": 1e5, "rms_norm_eps": 1e-5}),
    "TinyLlama": ("Llama", {"rms_norm_eps": 1e-5}),
    "Llama-3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "Qwen2": ("Qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {"rope_theta": 1e6, "head_dim": 12}),
}
SHAPE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 2, "patch_size": 8}
ENCODERS = {
    "CLIP": ("CLIP", {"image_size": 16}),
    "SigLIP": ("Siglip", {"image_size": 20}),  # 4 pixels are left over, as in so400m-patch14-384
    "SigLIP2": ("Siglip", {"image_size": 16}),
}


def close(ours, theirs):
    """Equal to 1e-5 of the largest number."""
    return (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def randomise(model):
    """transformers begins with biases of zero and norms of one: a test would not see them."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) / 2
    return model.eval()


def byte_level_base(eos="<|im_end|>"):
    base = byte_level_model("SmolLM2").with_roles("<|im_start|>", eos)
    return base.with_pieces(learn_pieces(base, ENGLISH + KOREAN, 60, foreign_only=False))


def make_llm(name, folder):
    """transformers' decoder, saved with a tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    tokenizer, (family, settings) = byte_level_base(), DECODERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=tokenizer.vocab_size, **SMALL | settings
    )
    model = randomise(getattr(transformers, f"{family}ForCausalLM")(config))
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return model


def make_encoder(name, folder):
    """transformers' vision encoder, saved with its image processor."""
    transformers = pytest.importorskip("transformers")
    kind, settings = ENCODERS[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}VisionConfig")(**SHAPE | settings)
    model = randomise(getattr(transformers, f"{kind}VisionModel")(config))
    model.save_pretrained(folder)
    if kind == "Siglip":
        size = {"height": config.image_size, "width": config.image_size}
        processor = {"image_processor_type": "SiglipImageProcessor", "size": size}
        processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        processor["resample"] = 2 if name == "SigLIP2" else 3
        checkpoint.write_json(folder / "preprocessor_config.json", processor)
    return model


def make_llava(decoder, encoder, folder):
    """-> (transformers' decoder, its encoder, the model that we build of both)."""
    llm, vit = make_llm(decoder, folder / "llm"), make_encoder(encoder, folder / "vit")
    build(plan_build(folder / "llm", folder / "vit"), folder / "out")
    return llm, vit, checkpoint.load_model(folder / "out").eval()


def generate_50(model, ids, **inputs):
    """transformers' greedy ids."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=50, do_sample=False, **inputs
    )
    return out[0, ids.shape[1] :].tolist()


def image(width=37, height=23):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_has_transformers_logits_and_greedy_ids(name, tmp_path):
    theirs, _, ours = make_llava(name, "CLIP", tmp_path)
    ids = torch.arange(3, 90)[None]
    expected = theirs(ids).logits
    logits = ours.logits(ours(ids))[..., : expected.shape[-1]]  # without <image>
    assert close(logits, expected)

    # The new row of <image> is the mean of all: it never wins.
    prompt = ids[0, :20].tolist()
    found = [step[0] for step in generate.generate(ours, [prompt], max_new_tokens=50, eos_id=-1)]
    assert found == generate_50(theirs, prompt) and len(found) == 50


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_has_transformers_hidden_states(name, tmp_path):
    _, theirs, ours = make_llava("SmolLM2", name, tmp_path)
    config = ours.config.vision
    pixels = vision.preprocess(image(), config.image_size, ours.config.image_aspect_ratio)[None]
    normal = vision.normalise(pixels, *config.mean_and_std)
    states = theirs(normal, output_hidden_states=True).hidden_states
    for layer in (-1, -2, 0):
        assert close(ours.vision(pixels, layer), states[layer])
    assert ours.encode_images(pixels).shape == (1, 4, 32)

    last = plan_build(tmp_path / "llm", tmp_path / "vit", layer=-1).config
    assert last.vision_feature_layer == -1
    with pytest.raises(ValueError, match="trained on layer -2, not on -1"):
        plan_build(tmp_path / "out", layer=-1)
    with pytest.raises(ValueError, match="the vision feature layer is 4"):
        plan_build(tmp_path / "llm", tmp_path / "vit", layer=4)


PAIRS = [(name, "SigLIP") for name in DECODERS] + [("Qwen3", "CLIP"), ("Qwen3", "SigLIP2")]


@torch.no_grad()
@pytest.mark.parametrize("decoder, encoder", PAIRS)
def test_what_we_save_opens_as_llava_with_the_same_prompt_pixels_logits_and_ids(
    decoder, encoder, tmp_path
):
    transformers = pytest.importorskip("transformers")
    _, _, ours = make_llava(decoder, encoder, tmp_path)
    tokenizer, config = checkpoint.load_tokenizer(tmp_path / "out"), ours.config
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")

    # The same prompt, and the same pixels up to 1/255.
    prompt = "What colour is the 고양이?"
    ids, _ = data.encode_chat([(["", "\n" + prompt], None)], tokenizer, 4)
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=image(), text=text, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == ids
    size = config.vision.image_size
    pixels = vision.preprocess(image(), size, config.image_aspect_ratio)[None]
    mean, std = config.vision.mean_and_std
    normal = vision.normalise(pixels, mean, std)
    assert (inputs["pixel_values"] - normal).abs().max() * max(std) <= 1 / 255 + 1e-6

    expected = theirs(input_ids=torch.tensor([ids]), pixel_values=normal).logits
    assert close(ours.logits(ours(torch.tensor([ids]), pixels)), expected)
    found = [
        step[0] for step in generate.generate(ours, [ids], pixels, max_new_tokens=50, eos_id=-1)
    ]
    assert found == generate_50(theirs, ids, pixel_values=normal)

    # And back: we read what transformers saves.
    theirs.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    again = checkpoint.load_model(tmp_path / "again")
    assert again.config == config
    assert all(map(torch.equal, ours.state_dict().values(), again.state_dict().values()))


# ------------------------------------------------------------------------- without transformers
def test_llama_3_slows_long_waves_down_by_hand():
    # D = 4, theta = 100: waves of 2π and 20π positions. In 32 positions the first turns 5.1 times
    # and stays; the second turns 0.51 times, less than once, and is divided by 8.
    scaling = RopeScaling(8.0, 1.0, 4.0, 32)
    cos, sin = rope_table(3, 4, 100.0, scaling)
    assert torch.allclose(sin[2], torch.tensor([2.0, 0.2 / 8]).sin())
    # Half way, at 2.5 turns: the mean of 1 and 1/8.
    theta = (2.5 * 2 * math.pi / 32) ** -2
    cos, _ = rope_table(2, 4, theta, scaling)
    assert torch.allclose(cos[1, 1], torch.tensor(theta**-0.5 * (1 + 1 / 8) / 2).cos())
    plain = rope_table(2, 4, 100.0)[1][1]
    assert torch.allclose(plain, torch.tensor([1.0, 0.1]).sin())


def test_configs_of_the_families_as_their_makers_publish_them():
    qwen = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864}
    qwen |= {"num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": 24}
    qwen |= {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    qwen |= {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21}
    config = parse_text_config(qwen | {"max_position_embeddings": 32768}, "x")  # Qwen2.5-0.5B
    assert (config.model_type, config.head_dim, config.vocab_size) == ("qwen2", 64, 151936)
    llama = {"model_type": "llama", "rope_theta": 5e5, "head_dim": 64, "vocab_size": 128256}
    scaling = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
    config = parse_text_config(llama | {"rope_scaling": scaling}, "x")  # Llama-3.2-1B
    assert config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    vit = {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304}
    vit |= {"model_type": "siglip_vision_model", "num_attention_heads": 16}
    vit |= {"num_hidden_layers": 27, "patch_size": 14}
    config = parse_vision_config({"model_type": "siglip", "vision_config": vit}, "x")
    assert (config.num_patches, config.hidden_act) == (729, "gelu_pytorch_tanh")
    assert config.layer_norm_eps == 1e-6 and config.mean_and_std == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2', supported: 'llama', 'qwen2', 'qwen3'"),
        ({"model_type": "phi3"}, "model_type is 'phi3'"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is True"),
        ({"model_type": "mistral", "sliding_window": 4096}, "model_type is 'mistral'"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"]}, "layer_types is"),
        ({"model_type": "qwen3", "num_experts": 8}, "num_experts is 8, which may change the model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling lacks low_freq"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(config, reason):
    with pytest.raises(ValueError, match=reason):
        parse_text_config(config, "x")


def test_an_encoder_of_variable_resolution_is_refused_by_name():
    with pytest.raises(ValueError, match="model_type is 'siglip2'"):
        parse_vision_config({"model_type": "siglip2"}, "x")


@pytest.mark.parametrize("mode, filter_", [("resize", 3), ("resize-bilinear", 2)])
def test_siglip_resizes_without_padding_to_pixels_from_minus_one_to_one(mode, filter_):
    pixels = vision.preprocess(image(), 16, mode)
    expected = np.asarray(image().resize((16, 16), filter_)).transpose(2, 0, 1)
    assert (pixels.numpy() == expected).all()
    config = VisionConfig(model_type="siglip_vision_model")
    normal = vision.normalise(torch.tensor([0, 255]).view(1, 1, 1, 2), *config.mean_and_std)
    assert normal[0, 0, 0].tolist() == [-1, 1]
