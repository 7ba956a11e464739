"""Lesson 6: the KV cache, and streaming."""

import itertools

import torch

from course.exercise import Check, Exercise
from course.exercises import tiny
from course.exercises.tiny import attend_by_loops, near, randn

TITLE = "The KV cache and streaming"


# ------------------------------------------------------------------------------------ the cache
def sequences(T):
    """Queries, keys and values of 2 samples of T tokens, and a cache with noise from earlier."""
    q, k, v = randn(2, T, 4, 8), randn(2, T, 2, 8, seed=1), randn(2, T, 2, 8, seed=2)
    return q, k, v, 5 * randn(2, 12, 2, 8, seed=3), 5 * randn(2, 12, 2, 8, seed=4)


def run_cached(parts, T):
    """The outputs of T tokens that come in parts, for example (3, 1, 1)."""
    from model import Attention

    q, k, v, k_cache, v_cache = sequences(T)
    lengths, outputs = torch.zeros(2, dtype=torch.long), []
    for size in parts:
        new = slice(int(lengths[0]), int(lengths[0]) + size)
        out = Attention.attend_cached(
            None, q[:, new], k[:, new], v[:, new], k_cache, v_cache, lengths
        )
        outputs.append(out.reshape(2, size, 4, 8))
        lengths = lengths + size
    want = attend_by_loops(q, k, v, lambda b, i, j: j <= i)
    return torch.cat(outputs, dim=1), want


def caches_first_token():
    got, want = run_cached([1], 1)
    near(got, want, "the first token")


def caches_token_after_token():
    got, want = run_cached([1, 1, 1, 1], 4)
    near(got, want, "4 tokens, one after another")


def caches_prompt_and_turn():
    got, want = run_cached([5, 1, 3], 9)
    near(got, want, "a prompt of 5 tokens, one of the answer, a next question of 3")


def caches_rows_of_other_lengths():
    from model import Attention

    q, k, v, k_cache, v_cache = sequences(6)
    lengths = torch.tensor([4, 1])
    for b, length in enumerate(lengths.tolist()):
        k_cache[b, :length], v_cache[b, :length] = k[b, :length], v[b, :length]
    # Sample 0 gets its tokens 4 and 5, sample 1 its tokens 1 and 2.
    new = lengths[:, None] + torch.arange(2)
    rows = torch.arange(2)[:, None]
    got = Attention.attend_cached(
        None, q[rows, new], k[rows, new], v[rows, new], k_cache, v_cache, lengths
    )
    want = attend_by_loops(q, k, v, lambda b, i, j: j <= i)
    near(got, want[rows, new], "samples with 4 and with 1 cached token")


# ------------------------------------------------------------------------------------ sampling
def sample(logits, **options):
    from generate import Sampling, sample_tokens

    generator = torch.Generator().manual_seed(1)
    return sample_tokens(logits, Sampling(generator=generator, **options))


def samples_greedily():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 1.0, 2.0], [0.0, 0.0, 0.1]])
    got = sample(logits, temperature=0.0)
    assert got.tolist() == [1, 0, 2], f"{got.tolist()} from temperature 0, must be [1, 0, 2]"
    try:
        got = sample(logits, temperature=1e-42)
    except RuntimeError as error:
        raise AssertionError(f"a temperature of 1e-42 gives: {error}") from None
    assert got.tolist() == [1, 0, 2], f"{got.tolist()} from a temperature of 1e-42"


def samples_smallest_nucleus():
    logits = torch.tensor([[0.0, 1.0, 0.5]]).repeat(100, 1)
    got = sample(logits, temperature=1.0, top_p=0.01)
    assert set(got.tolist()) == {1}, "the most probable token has 51%: it must stay for any top_p"


def samples_as_softmax():
    logits = torch.tensor([0.0, 4.0, 2.0, -2.0])
    got = sample(logits.repeat(40_000, 1), temperature=2.0)
    shares = torch.bincount(got, minlength=4) / 40_000
    # By hand: e^0, e^2, e^1, e^-1, divided by their sum.
    near(shares, torch.tensor([0.0871, 0.6439, 0.2369, 0.0321]), "the shares of 4 tokens", 0.01)


def samples_from_nucleus():
    probabilities = torch.tensor([0.15, 0.5, 0.05, 0.3])
    got = sample(probabilities.log().repeat(4_000, 1), temperature=1.0, top_p=0.75)
    shares = torch.bincount(got, minlength=4) / 4_000
    near(shares, torch.tensor([0.0, 0.625, 0.0, 0.375]), "50% and 30% are the nucleus", 0.03)

    # At temperature ½ they are squared and divided by their sum: 0.68, 0.25, 0.06, 0.01.
    got = sample(probabilities.log().repeat(400, 1), temperature=0.5, top_p=0.75)
    assert set(got.tolist()) == {1, 3}, f"the nucleus at temperature ½: {set(got.tolist())}"
    got = sample(probabilities.log().repeat(400, 1), temperature=0.5, top_p=0.6)
    assert set(got.tolist()) == {1}, (
        "the nucleus is chosen behind the temperature: one token has 68%"
    )

    # Each row has a nucleus of its own: one token in row 0, another in row 1, all three in row 2.
    rows = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0], [0.0, 0.0, 0.0]]).repeat(100, 1)
    got = sample(rows, temperature=1.0, top_p=0.9).view(100, 3).T
    found = [set(row.tolist()) for row in got]
    assert found == [{0}, {2}, {0, 1, 2}], f"three rows with their own nuclei: {found}"

    again = [sample(rows, temperature=1.0, top_p=0.9).tolist() for _ in range(2)]
    assert again[0] == again[1], "the same generator draws other tokens"


# ------------------------------------------------------------------------------------ streaming
def stream(chunks, final=False):
    """What a StreamDecoder shows after each chunk of bytes."""
    from vocabulary.stream_decoder import StreamDecoder

    decoder, shown = StreamDecoder(None), []
    for chunk in chunks:
        decoder.pending += chunk
        shown.append(decoder.take_characters())
    if final:
        shown.append(decoder.take_characters(final=True))
        assert not decoder.pending, f"at the end {bytes(decoder.pending)} is left in pending"
    return shown


def must_show(chunks, want, final=False):
    got = stream(chunks, final)
    chunks = [chunk.hex(" ") for chunk in chunks]
    assert got == want, f"of the bytes {chunks} it shows {got}, must be {want}"


def streams_whole_characters():
    must_show(["cat 고양이 ".encode(), "猫".encode(), "🐈".encode()], ["cat 고양이 ", "猫", "🐈"])
    must_show(["\ufeffcat".encode(), "\ufeff".encode()], ["\ufeffcat", "\ufeff"])


def streams_no_half_syllable():
    for character in "é가猫🐈":
        raw = character.encode()
        chunks = [raw[i : i + 1] for i in range(len(raw))]
        must_show(chunks, [""] * (len(raw) - 1) + [character])


def streams_what_is_complete():
    raw = "가".encode()
    must_show([b"ab" + raw[:1], raw[1:] + raw[:2], raw[2:]], ["ab", "가", "가"])


def streams_past_impossible_bytes():
    # 0xff starts no character. 0xea announces two more bytes, and a letter comes.
    must_show([b"\xffA", b"B"], ["\ufffdA", "B"])
    must_show([b"\xea", b"\xb0", b"A"], ["", "", "\ufffd\ufffdA"])
    # UTF-8 leaves out surrogates, a longer way to write a character, and all above 10FFFF.
    must_show([b"\xed", b"\xa0", b"\x80"], ["", "\ufffd\ufffd", "\ufffd"])
    must_show([b"\xe0\x80", b"\xc0", b"\xf4\x90"], ["\ufffd\ufffd", "\ufffd", "\ufffd\ufffd"])


def streams_the_end():
    from vocabulary.stream_decoder import StreamDecoder

    decoder, started = StreamDecoder(None), []
    for chunk in (b"\xea", b"\xb0\x80", b"\xea"):
        decoder.pending += chunk
        decoder.take_characters()
        started.append(decoder.started)
    assert started == [False, True, True], f"`started` is {started} after no, one, no character"

    raw = "가".encode()
    must_show([b"a" + raw[:2]], ["a", "\ufffd\ufffd"], final=True)
    for cut in itertools.product((0, 1, 2), repeat=2):
        text = raw[: cut[0]] + raw + raw[: cut[1]]
        shown = stream([text[i : i + 1] for i in range(len(text))], final=True)
        want = "\ufffd" * cut[0] + "가" + "\ufffd" * cut[1]
        assert "".join(shown) == want, f"{text.hex(' ')}: all together {''.join(shown)!r}"


# ------------------------------------------------------------------------------------ generation
def prompts_and_images():
    """Three prompts of 7, 11 and 3 tokens; the second has an image of 4 patches."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 60, (n,), generator=generator).tolist() for n in (7, 7, 3)]
    prompts[1][2:2] = [60] * 4
    return prompts, tiny.images(1)


@torch.inference_mode()
def greedy(model, prompt, pixels, count):
    """The `count` most probable tokens, without a cache: the whole text again for each."""
    ids = list(prompt)
    for _ in range(count):
        hidden = model(torch.tensor([ids]), pixels)
        ids.append(model.decoder.lm_head(hidden[0, -1]).argmax().item())
    return ids[len(prompt) :]


def generated(prompts, pixels=None, **options):
    from generate import generate

    return list(generate(tiny.model(), prompts, pixels, **options))


def generates_one_token():
    from generate import generate

    (prompt, *_), _ = prompts_and_images()
    model, calls = tiny.model(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    got = list(generate(model, [prompt], max_new_tokens=1, eos_id=-1))
    want = greedy(tiny.model(), prompt, None, 1)
    assert got == [want], f"{got}, must be one step with one token: {[want]}"
    assert len(calls) == 1, f"the model ran {len(calls)} times: nobody asks what follows the last"


def generates_as_without_cache():
    prompts, _ = prompts_and_images()
    got = generated(prompts[:1], max_new_tokens=10, eos_id=-1)
    want = [[token] for token in greedy(tiny.model(), prompts[0], None, 10)]
    assert got == want, f"{got}; without a cache {want}"


def generates_until_the_end():
    prompts, _ = prompts_and_images()
    tokens = greedy(tiny.model(), prompts[0], None, 10)
    end = tokens[4]
    tokens = tokens[: tokens.index(end)]
    got = generated(prompts[:1], max_new_tokens=10, eos_id=end)
    want = [[token] for token in tokens] + [[None]]
    assert got == want, f"{end} is the end: {got}, must be {want}"


def generates_batches():
    prompts, pixels = prompts_and_images()
    model, images = tiny.model(), (None, pixels, None)
    alone = [greedy(model, prompt, image, 12) for prompt, image in zip(prompts, images)]
    # The end of the first answer is a token that the others do not say.
    end = next(token for token in alone[0] if token not in alone[1] + alone[2])
    alone[0] = alone[0][: alone[0].index(end)]
    steps = generated(prompts, pixels, max_new_tokens=12, eos_id=end)
    for row, want in enumerate(alone):
        got = [step[row] for step in steps]
        want = want + [None] * (len(steps) - len(want))
        assert got == want, f"prompt {row}: {got}, alone {want}"
    assert len(steps) == 12, f"{len(steps)} steps: the longest answer has 12"


def generates_long_answers():
    prompts, pixels = prompts_and_images()
    got = generated(prompts[1:2], pixels, max_new_tokens=60, eos_id=-1)
    want = [[token] for token in greedy(tiny.model(), prompts[1], pixels, 60)]
    assert got == want, f"60 tokens: the first {sum(a == b for a, b in zip(got, want))} are right"


def generates_about_one_image():
    prompts, pixels = prompts_and_images()
    prompts = [prompts[1], prompts[1] + [7]]
    got = generated(prompts, pixels, max_new_tokens=3, eos_id=-1, image_indices=[[0], [0]])
    want = [greedy(tiny.model(), prompt, pixels, 3) for prompt in prompts]
    assert [list(row) for row in zip(*got)] == want, f"two questions about one image: {got}"


# ------------------------------------------------------------------------------------ exercises
EXERCISES = [
    Exercise(
        name="cache",
        title="Attention with a KV cache",
        file="model.py",
        functions=["Attention.attend_cached"],
        minutes=45,
        checks=[
            Check(
                1,
                "the first token, into an empty cache",
                "The cache holds noise behind its lengths. Nothing may attend to it.",
                caches_first_token,
            ),
            Check(
                2,
                "one token after another",
                "Into which slot goes the second token? The caller counts: read `lengths`.",
                caches_token_after_token,
            ),
            Check(
                2,
                "several tokens at once, at the beginning and later",
                "The new tokens come together, but each may see only those up to itself.",
                caches_prompt_and_turn,
            ),
            Check(
                2,
                "samples whose lengths differ",
                "slots must be (B, T). Index the cache with two index tensors.",
                caches_rows_of_other_lengths,
            ),
        ],
        wrong={"06_cache_a.py": 1, "06_cache_b.py": 2, "06_cache_c.py": 3},
    ),
    Exercise(
        name="sample",
        title="Choosing the next token",
        file="generate.py",
        functions=["sample_tokens"],
        minutes=25,
        checks=[
            Check(
                1,
                "temperature 0 takes the most probable token",
                "A division by 0 is not needed; one by nearly 0 overflows.",
                samples_greedily,
            ),
            Check(
                1,
                "the most probable token always stays",
                "Compare top_p with what stands before a token, without the token itself.",
                samples_smallest_nucleus,
            ),
            Check(
                2,
                "the shares of 40,000 draws",
                "Does a high temperature make the shares more equal? Are these ids, or ranks?",
                samples_as_softmax,
            ),
            Check(
                1,
                "the nucleus",
                "Write the sorted probabilities 0.5 0.3 0.15 0.05, and below them their sums.",
                samples_from_nucleus,
            ),
        ],
        wrong={"06_sample_a.py": 1, "06_sample_b.py": 2},
    ),
    Exercise(
        name="stream",
        title="Never half a syllable",
        file="vocabulary/stream_decoder.py",
        functions=["StreamDecoder.take_characters"],
        minutes=30,
        checks=[
            Check(
                1,
                "whole characters come out at once",
                "pending are bytes. bytes.decode() makes text of them.",
                streams_whole_characters,
            ),
            Check(
                2,
                "a character of several bytes waits for its last byte",
                "The first byte tells how many belong together: see Wikipedia's table of UTF-8.",
                streams_no_half_syllable,
            ),
            Check(
                1,
                "what is complete does not wait for what is not",
                "Take one character after another from the front of pending.",
                streams_what_is_complete,
            ),
            Check(
                2,
                "a byte that fits nowhere holds nothing up",
                "A UnicodeDecodeError has a `reason`. Print it for b'\\xea' and for b'\\xeaA'.",
                streams_past_impossible_bytes,
            ),
            Check(
                1,
                "at the end nothing is held back",
                "With final=True, half a character stays half. And who sets `started`?",
                streams_the_end,
            ),
        ],
        wrong={"06_stream_a.py": 1, "06_stream_b.py": 2, "06_stream_c.py": 3, "06_stream_d.py": 3},
    ),
    Exercise(
        name="generate",
        title="The loop of generation",
        file="generate.py",
        functions=["generate"],
        minutes=120,
        checks=[
            Check(
                1,
                "one token",
                "prefill gives the last hidden states (B, C); model.logits the scores.",
                generates_one_token,
            ),
            Check(
                2,
                "ten tokens, as without a cache",
                "Who counts the cached tokens? Read the docstring of Decoder.forward.",
                generates_as_without_cache,
            ),
            Check(
                1,
                "the end of an answer",
                "The step at which an answer ends yields None for it.",
                generates_until_the_end,
            ),
            Check(
                3,
                "three prompts, one of them with an image, one ends early",
                "An answer that has ended must not stop the others, nor move them.",
                generates_batches,
            ),
            Check(
                2,
                "sixty tokens: more than the first cache holds",
                "select_cache_rows gives a cache of another size.",
                generates_long_answers,
            ),
            Check(
                1,
                "two questions about one image",
                "image_indices says which prompt has which image: prefill needs to know.",
                generates_about_one_image,
            ),
        ],
        wrong={"06_generate_a.py": 1, "06_generate_b.py": 3, "06_generate_c.py": 4},
    ),
]
