"""The model against PyTorch's own ops in float64, hand-worked numbers, and transformers' LLaVA."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_model

import checkpoint
import generate
from checkpoint.names import find_names
from model import IGNORE_INDEX, PRESETS, DecoderConfig, KVCache, XLlava, parameter_counts
from vision import normalise


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return XLlava(config).init_weights().double()


def prompt(config, text_ids, images=1):
    image_ids = [config.image_token_id] * (config.vision.num_patches * images)
    return torch.tensor([[1, *image_ids, *text_ids]])


def random_images(count):
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)


def near(got, want):
    return (got - want).norm() <= 1e-5 * want.norm()


def test_the_published_parameter_counts_come_out():
    # llava-hf/llava-1.5-7b-hf, with 32,064 rows.
    preset = PRESETS["x-llava-7b"]
    text = dataclasses.replace(preset.text, vocab_size=32064)
    published = dataclasses.replace(preset, text=text)
    assert sum(parameter_counts(published).values()) == 7_063_427_072

    # meta-llama/Llama-2-7b-hf and Llama-2-13b-hf have 6,738,415,616 and 13,015,864,320 parameters
    # at 32,000 rows; the X-LLaVA paper adds 7,478, twice. The vision half of CLIP ViT-L/14-336 has
    # 303,507,456.
    counts = parameter_counts(preset)
    assert counts["decoder"] == 6_738_415_616 + 2 * 7_478 * 4096
    assert counts["vision"] == 303_507_456
    assert counts["projector"] == (1024 + 1) * 4096 + (4096 + 1) * 4096
    assert parameter_counts(PRESETS["x-llava-13b"])["decoder"] == 13_015_864_320 + 2 * 7_478 * 5120


def written_out(model, ids, pixels):
    """Logits (T, V) of one row of ids, from the formulas of the papers, in float64: CLIP (arXiv
    2103.00020) or SigLIP, LLaVA's projector, Llama 2 (2307.09288) with Qwen2's biases or Qwen3's
    norms."""
    vision, text = model.config.vision, model.config.text
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def layer_norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + vision.layer_norm_eps).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def rms_norm(x, name):
        x = x / (x.square().mean(-1, keepdim=True) + text.rms_norm_eps).sqrt()
        return x * w[f"{name}.weight"]

    def head(q, k, v, is_causal):
        scores = (q @ k.T / q.shape[-1] ** 0.5).exp()
        scores = scores.tril() if is_causal else scores
        return scores / scores.sum(1, keepdim=True) @ v

    def gelu(x):
        if vision.hidden_act == "quick_gelu":
            return x / (1 + (-1.702 * x).exp())
        return x / 2 * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())

    def encode(image):
        P, D = vision.patch_size, vision.hidden_size // vision.num_attention_heads
        mean, std = torch.full((2, 3, 1, 1), 0.5).double()
        if vision.is_clip:
            mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).double().view(3, 1, 1)
            std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).double().view(3, 1, 1)
        image = (image.double() / 255 - mean) / std
        corners = range(0, vision.image_size - P + 1, P)
        patches = [image[:, y : y + P, x : x + P].flatten() for y in corners for x in corners]
        x = torch.stack(patches) @ w["vision.patch_embed.weight"].flatten(1).T
        x = x + w.get("vision.patch_embed.bias", 0)
        if vision.is_clip:
            x = torch.cat([w["vision.class_embed"][None], x])
        x = x + w["vision.pos_embed"]
        x = layer_norm(x, "vision.pre_norm") if vision.is_clip else x
        num_layers = vision.num_hidden_layers + 1 + model.config.vision_feature_layer
        for name in (f"vision.layers.{n}" for n in range(num_layers)):
            h = layer_norm(x, f"{name}.norm1")
            parts = [linear(h, f"{name}.attn.{p}_proj").split(D, dim=1) for p in "qkv"]
            heads = [head(*own, is_causal=False) for own in zip(*parts)]
            x = x + linear(torch.cat(heads, dim=1), f"{name}.attn.out_proj")
            h = gelu(linear(layer_norm(x, f"{name}.norm2"), f"{name}.fc1"))
            x = x + linear(h, f"{name}.fc2")
        h = linear(x[-vision.num_patches :], "projector.0")
        return linear(h / 2 * (1 + (h / 2**0.5).erf()), "projector.2")

    def rotated(x):
        """Channels i and i + D/2 are a complex number, turned by position · theta^(−2i/D)."""
        T, D = x.shape
        angles = text.rope_theta ** (-torch.arange(0, D, 2).double() / D)
        angles = torch.arange(T).double()[:, None] * angles
        x = torch.complex(x[:, : D // 2], x[:, D // 2 :])
        x = x * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([x.real, x.imag], dim=1)

    x = w["decoder.embed_tokens.weight"][ids]
    x[ids == model.config.image_token_id] = torch.cat([encode(image) for image in pixels])
    group = text.num_attention_heads // text.num_key_value_heads
    for name in (f"decoder.layers.{n}" for n in range(text.num_hidden_layers)):
        h = rms_norm(x, f"{name}.attn_norm")
        q, k, v = (linear(h, f"{name}.attn.{p}_proj").split(text.head_dim, dim=1) for p in "qkv")
        if text.model_type == "qwen3":
            q = [rms_norm(own, f"{name}.attn.q_norm") for own in q]
            k = [rms_norm(own, f"{name}.attn.k_norm") for own in k]
        heads = [
            head(rotated(own), rotated(k[n // group]), v[n // group], is_causal=True)
            for n, own in enumerate(q)
        ]
        x = x + linear(torch.cat(heads, dim=1), f"{name}.attn.o_proj")
        h = rms_norm(x, f"{name}.mlp_norm")
        gate, up = (linear(h, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
        x = x + linear(gate / (1 + (-gate).exp()) * up, f"{name}.mlp.down_proj")
    return linear(rms_norm(x, "decoder.norm"), "decoder.lm_head")


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "image_size": 18,  # two pixels are not enough for a patch
    "layer_norm_eps": 1e-2,
}


@pytest.mark.parametrize(
    "text, vision, layer",
    [
        ({}, {}, -2),
        ({"model_type": "qwen2", "tie_word_embeddings": True}, {"layer_norm_eps": 1e-2}, -1),
        ({"model_type": "qwen3", "rms_norm_eps": 1e-2, "rope_theta": 1e6}, SIGLIP, -2),
    ],
)
def test_the_model_computes_what_the_papers_write(config, text, vision, layer):
    torch.manual_seed(0)
    text = dataclasses.replace(config.text, **text)
    vision = dataclasses.replace(config.vision, **vision)
    config = dataclasses.replace(config, text=text, vision=vision, vision_feature_layer=layer)
    model = XLlava(config).double().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    ids = torch.cat([prompt(config, [20, 21]), prompt(config, [30, 31, 22])], dim=1)
    pixels = torch.randint(0, 256, (2, 3, *[vision.image_size] * 2), dtype=torch.uint8)
    assert ("decoder.layers.0.attn.q_proj.bias" in model.state_dict()) == (
        text.model_type == "qwen2"
    )
    want = written_out(model, ids[0], pixels)
    with torch.no_grad():
        assert near(model.logits(model(ids, pixels))[0], want)


def test_a_later_token_changes_nothing_before_it(model, config):
    ids = prompt(config, [20, 21, 22, 23])
    other = ids.clone()
    other[0, -1] = 30
    pixels = random_images(1)
    a, b = model(ids, pixels), model(other, pixels)
    assert torch.equal(a[:, :-1], b[:, :-1]) and not torch.equal(a[:, -1], b[:, -1])


def test_the_cache_gives_the_same_hidden_states_as_the_whole_at_once(model, config):
    pixels = random_images(1)
    ids = prompt(config, [20, 21, 22, 23, 24, 25])
    whole = model(ids, pixels)
    cache = KVCache(config.text, 1, 32, "cpu", torch.float64)
    cut = 7
    parts = [model(ids[:, :cut], pixels, cache=cache)]
    cache.lengths = cache.lengths + cut
    # Several at once, as a further turn of a chat; then one at a time.
    parts.append(model(ids[:, cut : cut + 2], cache=cache))
    cache.lengths = cache.lengths + 2
    for t in range(cut + 2, ids.shape[1]):
        parts.append(model(ids[:, t : t + 1], cache=cache))
        cache.lengths = cache.lengths + 1
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-12)


def test_rows_of_other_lengths_do_not_disturb_each_other_in_the_cache(model, config):
    prompts = [[1, 20, 21, 22, 23, 24], [1, 30, 31]]
    ids = torch.full((2, 6), 2)
    for row, p in enumerate(prompts):
        ids[row, : len(p)] = torch.tensor(p)
    cache = KVCache(config.text, 2, 8, "cpu", torch.float64)
    model(ids, cache=cache)
    cache.lengths = torch.tensor([6, 3])
    got = model(torch.tensor([[40], [41]]), cache=cache)
    for row, p in enumerate(prompts):
        alone = model(torch.tensor([p + [40 + row]]))[:, -1]
        assert torch.allclose(got[row], alone, atol=1e-12)


def test_the_loss_is_the_sum_over_target_tokens_only(model, config):
    ids = torch.tensor([[1, 20, 21, 22]])
    targets = torch.tensor([[IGNORE_INDEX, 21, IGNORE_INDEX, 2]])
    logits = model.logits(model(ids)).double()
    want = -(logits[0, 1].log_softmax(-1)[21] + logits[0, 3].log_softmax(-1)[2])
    assert torch.allclose(model.loss(ids, targets).double(), want, rtol=1e-6)


def test_a_model_that_has_answered_can_be_trained(config):
    # float32, as the tables of RoPE are: converted, they would be other tensors.
    model, ids = XLlava(config).init_weights(), prompt(config, [20, 21], images=0)
    with torch.inference_mode():
        model(ids)
    model.loss(ids, ids).backward()
    assert model.decoder.layers[0].attn.q_proj.weight.grad.abs().max() > 0


def test_the_sum_of_all_blocks_is_not_rounded_where_the_weights_are_copies_in_bfloat16(config):
    """As train.py --fsdp gathers them."""
    model, dtypes = XLlava(config).init_weights().bfloat16(), []
    for block in model.decoder.layers:
        block.register_forward_hook(lambda block, _, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(prompt(config, [20, 21], images=0))
    assert dtypes == [torch.float32] * len(model.decoder.layers)
    assert hidden.dtype == torch.bfloat16  # normed, for the product with the head


def test_a_model_without_weights_does_not_import_torchs_compiler():
    """It takes a second at each start of generate.py."""
    program = (
        "import sys, torch, model; before = 'torch._dynamo' in sys.modules\n"
        "with torch.device('meta'): model.XLlava(model.PRESETS['tiny'])\n"
        "assert ('torch._dynamo' in sys.modules) == before"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)


def test_a_batch_without_targets_has_loss_zero_and_zero_gradients(model):
    loss = model.loss(torch.tensor([[1, 20]]), torch.full((1, 2), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_number_of_image_tokens_must_fit_the_images(model, config):
    with pytest.raises(ValueError, match="8 <image> tokens for 1 images of 4 patches"):
        model(prompt(config, [20], images=2), random_images(1))
    with pytest.raises(ValueError, match="4 <image> tokens for 0 images of 4 patches"):
        model(prompt(config, [20], images=1))
    model(torch.tensor([[config.image_token_id]]))  # a generated one


def test_a_wrong_shape_is_refused_with_its_numbers():
    reason = "num_attention_heads 6: no multiple of num_key_value_heads 4"
    with pytest.raises(ValueError, match=reason):
        DecoderConfig(num_attention_heads=6, num_key_value_heads=4)


# ------------------------------------------------------------------------------------ transformers
@pytest.fixture(
    params=[(kv_heads, tied) for kv_heads in (4, 2) for tied in (False, True)],
    ids=[
        "heads of their own, untied",
        "heads of their own, tied",
        "grouped, untied",
        "grouped, tied",
    ],
)
def twins(request, config, tokenizer_file, tmp_path):
    """Our model and the same one in transformers, by way of a folder. No size or constant is a
    default."""
    transformers = pytest.importorskip("transformers")
    kv_heads, tied = request.param
    text = dataclasses.replace(
        config.text,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        rope_theta=5e5,
        rms_norm_eps=3e-5,
        num_hidden_layers=3,
    )
    vision = dataclasses.replace(
        config.vision,
        hidden_act="gelu" if tied else "quick_gelu",
        layer_norm_eps=2e-5,
        num_hidden_layers=3,
    )
    torch.manual_seed(0)
    ours = XLlava(dataclasses.replace(config, text=text, vision=vision)).init_weights().eval()
    for p in ours.parameters():  # norms and biases must count, too
        p.data += 0.1 * torch.randn_like(p)
    # Else a tied model repeats its last token again and again.
    ours.decoder.embed_tokens.weight.data *= 0.3
    save_model(ours, tokenizer_file, tmp_path)
    kind = transformers.LlavaForConditionalGeneration
    return ours, kind.from_pretrained(tmp_path, attn_implementation="eager").eval()


def test_transformers_llava_computes_the_same_states_and_gradients(twins, config):
    ours, theirs = twins
    image, N = config.image_token_id, config.vision.num_patches
    rows = [  # two images, one, none
        [1] + [image] * N + [20, 21] + [image] * N + [22, 23],
        [1, 24] + [image] * N + [25],
        [1, 26, 27, 28],
    ]
    ids = torch.full((3, max(map(len, rows))), 2)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    pixels, real = random_images(3), mask.bool()

    # Hidden states, as transformers returns them: the last one after the norm.
    states = [ours.embed_inputs(ids, pixels)]
    hooks = [
        block.register_forward_hook(lambda *call: states.append(call[2]))
        for block in ours.decoder.layers[:-1]
    ]
    states.append(ours(ids, pixels))
    for hook in hooks:
        hook.remove()
    logits = ours.logits(states[-1])
    out = theirs(
        input_ids=ids,
        pixel_values=normalise(pixels),
        attention_mask=mask,
        output_hidden_states=True,
    )
    assert near(logits[real], out.logits[real])
    assert len(states) == len(out.hidden_states) == 4
    for got, want in zip(states, out.hidden_states):
        assert near(got[real], want[real])
    features = theirs.get_image_features(pixel_values=normalise(pixels))
    features = getattr(features, "pooler_output", features)  # transformers 4 gives them bare
    if not isinstance(features, torch.Tensor):
        features = torch.stack(list(features))
    assert near(ours.encode_images(pixels), features)

    # Gradients.
    weight = torch.randn(logits.shape)[real]
    (logits[real] * weight).sum().backward()
    (out.logits[real] * weight).sum().backward()
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    names = find_names(dict(ours.named_parameters()), grads)
    counted = 0
    for name, p in ours.named_parameters():
        want = grads[names[name]]
        if want is None or p.grad is None:  # what lies behind the feature layer
            assert (want is None or not want.any()) and (p.grad is None or not p.grad.any()), name
        elif name.startswith("vision") and name.endswith("k_proj.bias"):
            # Zero by theory: it adds the same to all scores of a query, which softmax ignores.
            scale = ours.get_parameter(name.replace("bias", "weight")).grad.norm()
            assert p.grad.norm() < 1e-5 * scale and want.norm() < 1e-5 * scale, name
        else:
            counted += 1
            assert near(p.grad, want), name
    assert counted > 60


def test_transformers_llava_generates_the_same_fifty_ids(twins, config):
    ours, theirs = twins
    image, N = config.image_token_id, config.vision.num_patches
    rows = [[1, 20] + [image] * N + [21, 22, 23, 24], [1] + [image] * N + [25]]
    torch.manual_seed(0)
    pixels, longest = random_images(2), max(map(len, rows))
    left = torch.tensor([[2] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    theirs.generation_config.eos_token_id = None
    want = theirs.generate(
        input_ids=left,
        pixel_values=normalise(pixels),
        attention_mask=mask,
        max_new_tokens=50,
        do_sample=False,
    )[:, longest:]
    used = set(want.flatten().tolist())
    never = min(set(range(config.text.vocab_size)) - used)
    steps = generate.generate(ours, rows, pixels, max_new_tokens=50, eos_id=never)
    assert torch.equal(torch.tensor(list(steps)).T, want) and len(used) > 10


def test_random_weights_keep_the_variance_and_branches_start_small(config):
    """Fan-in: n inputs, a standard deviation of n^-½; what is added to the residual stream, two
    branches a layer, (2·layers)^-½ of it; the head 0.02 (GPT-2). n numbers tell a standard
    deviation to (2n)^-½ of it."""
    torch.manual_seed(0)
    model = XLlava(config).init_weights()
    ends = {"o_proj": model.decoder.layers, "down_proj": model.decoder.layers}
    ends |= {"out_proj": model.vision.layers, "fc2": model.vision.layers}
    checked = 0
    for name, weight in model.named_parameters():
        layer = name.split(".")[-2]
        if weight.dim() != 2 or layer == "vision":  # not the positions of the ViT
            continue
        want = 0.02 if layer == "lm_head" else weight.shape[1] ** -0.5
        want *= (2 * len(ends[layer])) ** -0.5 if layer in ends else 1
        assert abs(weight.std().item() / want - 1) < 5 * (2 * weight.numel()) ** -0.5, name
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("kv_heads, tied", [(1, True), (4, False)])
def test_a_model_that_transformers_saved_is_the_same_here(config, tmp_path, kv_heads, tied):
    transformers = pytest.importorskip("transformers")
    text = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=12,
        tie_word_embeddings=tied,
        rope_theta=7e4,
        max_position_embeddings=99,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    torch.manual_seed(0)
    llava = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=299,
        vision_feature_layer=1,
        tie_word_embeddings=tied,
    )
    theirs = transformers.LlavaForConditionalGeneration(llava).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = checkpoint.load_model(tmp_path)
    ids, pixels = torch.tensor([[1, 299, 299, 299, 299, 7, 8, 9]]), random_images(1)
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=normalise(pixels)).logits
        assert near(ours.logits(ours(ids, pixels)), want)
        assert near(ours.logits(ours(ids[:, 5:])), theirs(input_ids=ids[:, 5:]).logits)
