"""The model against what it must equal: PyTorch's own ops in float64, hand-worked numbers, and transformers' Llama and CLIP."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from model import IGNORE, PRESETS, DecoderConfig, KVCache, Model, parameter_counts


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return Model(config).init_weights().double()


def prompt(config, text_ids, pictures=1):
    ids = [1] + [config.image_token_id] * (config.vision.num_patches * pictures) + text_ids
    return torch.tensor([ids])


def test_the_published_parameter_counts_come_out():
    # Llama-2-7B has 6,738,415,616 parameters at 32,000 rows; 7,478 more rows, twice, of 4,096 columns; CLIP ViT-L/14-336's vision half has 303,507,456.
    counts = parameter_counts(PRESETS["x-llava-7b"])
    assert counts["decoder"] == 6_738_415_616 + 2 * 7_478 * 4096
    assert counts["vision"] == 303_507_456
    assert counts["projector"] == (1024 + 1) * 4096 + (4096 + 1) * 4096
    assert parameter_counts(PRESETS["x-llava-13b"])["decoder"] == 13_015_864_320 + 2 * 7_478 * 5120


def test_a_later_token_changes_nothing_before_it(model, config):
    ids = prompt(config, [20, 21, 22, 23])
    other = ids.clone()
    other[0, -1] = 30
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    a, b = model(ids, pixels), model(other, pixels)
    assert torch.equal(a[:, :-1], b[:, :-1]) and not torch.equal(a[:, -1], b[:, -1])


def test_the_cache_gives_the_same_hidden_states_as_the_whole_at_once(model, config):
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    ids = prompt(config, [20, 21, 22, 23, 24, 25])
    whole = model(ids, pixels)
    cache = KVCache(config.text, 1, 32, "cpu", torch.float64)
    cut = 7
    parts = [model(ids[:, :cut], pixels, cache=cache)]
    cache.lengths = cache.lengths + cut
    parts.append(model(ids[:, cut : cut + 2], cache=cache))  # several at once, as a further turn of a chat
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
    ids, targets = torch.tensor([[1, 20, 21, 22]]), torch.tensor([[IGNORE, 21, IGNORE, 2]])
    logits = model.logits(model(ids)).double()
    want = -(logits[0, 1].log_softmax(-1)[21] + logits[0, 3].log_softmax(-1)[2])
    assert torch.allclose(model.loss(ids, targets).double(), want, rtol=1e-6)


def test_a_batch_without_targets_has_loss_zero_and_zero_gradients(model):
    loss = model.loss(torch.tensor([[1, 20]]), torch.full((1, 2), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_number_of_picture_tokens_must_fit_the_pictures(model, config):
    with pytest.raises(ValueError, match="8 <image> tokens for 1 pictures of 4 patches"):
        model(prompt(config, [20], pictures=2), torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_a_wrong_shape_is_refused_with_its_numbers():
    with pytest.raises(ValueError, match="num_attention_heads 6 is not a multiple of num_key_value_heads 4"):
        DecoderConfig(num_attention_heads=6, num_key_value_heads=4)


@pytest.mark.parametrize("kv_heads, tied", [(4, False), (2, True)])
def test_the_decoder_equals_transformers_llama(config, kv_heads, tied):
    transformers = pytest.importorskip("transformers")
    text = dataclasses.replace(config.text, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    torch.manual_seed(0)
    ours = Model(dataclasses.replace(config, text=text)).init_weights().decoder
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**dataclasses.asdict(text), attn_implementation="eager"))
    import checkpoint

    state = {checkpoint.rename("decoder." + n, "Llama"): t for n, t in ours.state_dict().items()}
    theirs.load_state_dict(state)
    ids = torch.randint(3, 100, (2, 11))
    a, b = ours.lm_head(ours(ours.embed_tokens(ids))), theirs(ids).logits
    assert (a - b).norm() / b.norm() < 1e-5
    F.cross_entropy(a.flatten(0, 1), ids.flatten()).backward()
    F.cross_entropy(b.flatten(0, 1), ids.flatten()).backward()
    grads = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        want = grads[checkpoint.rename("decoder." + name, "Llama")].grad
        assert (p.grad - want).norm() <= 1e-5 * want.norm(), name
