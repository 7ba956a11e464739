"""The model against PyTorch's own ops in float64, hand-worked numbers, and transformers' LLaVA."""

import dataclasses
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
