"""Faults that really happen. `break` plants one, a student finds it by its symptom.

A symptom says what a user would notice, never the cause. `sound` must be in the file exactly once:
if the source has changed, planting stops. At the top no module of the project is imported: a check
takes these from the student's copy.
"""

import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

from course.exercise import Repair, expect
from course.exercises import tiny
from course.exercises.tiny import near


# ------------------------------------------------------------------------- the checks
def one_beginning():
    from data import encode_chat

    tokenizer = tiny.tokenizer()
    ids, _ = encode_chat([("What?", "red"), ("Where?", "left")], tokenizer, 4)
    expect("the number of <s> in a conversation of two turns", ids.count(tokenizer.bos_id), 1)


def new_pieces_are_reached():
    from tokenizer import select_pieces, train

    base = train(["the cat sat on the mat"] * 5, 280)
    # Nothing merges into 가나다 alone; behind 가나 it is one merge away.
    expect("what is appended of 가나다", select_pieces(base, ["가나다"])[0], [])
    found = select_pieces(base, ["가나다", "가나"])[0]
    expect("what is appended of 가나다 and 가나", found, ["가나", "가나다"])


def colours_are_kept():
    from PIL import Image

    from vision import to_rgb

    found = to_rgb(Image.new("RGB", (2, 2), (200, 30, 60))).getpixel((0, 0))
    expect("a pixel (200, 30, 60), loaded,", found, (200, 30, 60))


def broken_images_are_not_used():
    from training.phrases import PhraseDataset

    def load(path):
        if path == "broken.png":
            raise ValueError("broken.png: not an image")
        return torch.ones(3, 4, 4, dtype=torch.uint8)

    dataset = PhraseDataset.__new__(PhraseDataset)
    dataset.image_size, dataset.load_image = 4, load
    names = ("good.png", "broken.png")
    dataset.images = [SimpleNamespace(path=name, where=name) for name in names]
    _, usable, errors = dataset.load_images([0, 1, None])
    expect("usable, of a good image, a broken one and none,", usable.tolist(), [True, False, False])
    expect("the number of messages", len(errors), 1)


def attention_by_hand():
    from kernels import attention

    # One query of four ones; scores 4 and 0, divided by √4: e² and 1.
    q, k = torch.ones(1, 1, 1, 4), torch.tensor([[1.0] * 4, [0.0] * 4]).view(1, 2, 1, 4)
    v = torch.tensor([[1.0] * 4, [0.0] * 4]).view(1, 2, 1, 4)
    want = torch.full((1, 1, 1, 4), math.e**2 / (math.e**2 + 1))
    near(attention(q, k, v, causal=False), want, "attention of one query to two keys", 1e-5)


def cache_changes_nothing():
    from model import KVCache

    model, ids = tiny.model(), torch.tensor([[1, 5, 9, 3, 2, 7]])
    with torch.no_grad():
        want = model(ids)
        cache = KVCache(model.config.text, 1, 8, "cpu", torch.float32)
        found = [model(ids[:, :3], cache=cache)]
        cache.lengths += 3
        for t in range(3, 6):
            found.append(model(ids[:, t : t + 1], cache=cache))
            cache.lengths += 1
    near(torch.cat(found, dim=1), want, "hidden states with a cache", 1e-4)


def targets_are_the_answers():
    from data import Sample, collate

    # <s> question answer </s> question answer </s>
    sample = Sample([1, 5, 6, 2, 7, 8, 2], [0, 0, 1, 1, 0, 1, 1], [])
    targets = [t for t in collate([sample], pad_id=0)["targets"][0].tolist() if t != -100]
    expect("targets, where answers are 6 and 8 and </s> is 2,", targets, [6, 2, 8, 2])


def chats():
    """Two samples: one with a short answer, one with a long one."""
    from data import Sample

    short = Sample([1, 5, 6, 2], [0, 0, 1, 1], [])
    return short, Sample([1, *range(5, 20), 2], [0, 0] + [1] * 15, [])


def cost(model, samples):
    """The loss and the number of targets that training has of a batch."""
    from data import collate
    from training.objectives import NextTokenObjective

    with torch.no_grad():
        batch = collate(samples, pad_id=61)
        count = int((batch["targets"] != -100).sum())
        loss = NextTokenObjective(model)(batch | {"num_targets": count})
    return float(loss), int(count)


def micro_batches_change_nothing():
    model, samples = tiny.model(), chats()
    loss, count = cost(model, samples)
    parts = [cost(model, [sample]) for sample in samples]
    apart = sum(part[0] for part in parts) / sum(part[1] for part in parts)
    assert abs(loss / count - apart) < 1e-4, (
        f"the loss of two samples is {loss / count:.4f} together, {apart:.4f} in two micro-batches"
    )
    expect("targets of the two samples", count, 17)


def loss_is_of_the_next_token():
    model, (_, sample) = tiny.model(), chats()
    ids = torch.tensor([sample.ids])
    with torch.no_grad():
        log_probs = model.logits(model(ids[:, :-1])).double().log_softmax(-1)
    want = -log_probs.gather(2, ids[:, 1:, None])[0, 1:, 0].sum().item()
    loss, _ = cost(model, [sample])
    assert abs(loss - want) < 1e-2, f"the loss is {loss:.3f}; −log P of the answer is {want:.3f}"


class Numbers:
    """A data set whose sample i is the token i + 10."""

    sort_keys, sizes = [0] * 40, [40]

    def sample(self, i):
        from data import Sample

        return Sample([1, i + 10, 2], [0, 1, 1], [])


def every_sample_once():
    from training.sampler import MicroBatchDataset

    seen = []
    for rank in range(2):
        batches = MicroBatchDataset(Numbers(), 8, 0, rank=rank, world_size=2)
        for n in range(len(batches)):
            seen += [i for batch in batches[n] for i in batch["sample_indices"]]
    twice = sorted({i for i in seen if seen.count(i) > 1})
    assert sorted(seen) == list(range(40)), (
        f"in an epoch on two processes {len(twice)} of 40 samples come twice"
    )


def no_look_ahead():
    model, ids = tiny.model(), torch.tensor([[1, 5, 9, 3, 2, 7]])
    other = ids.clone()
    other[0, 3:] = torch.tensor([8, 4, 6])
    with torch.no_grad():
        found, want = model(ids)[:, :3], model(other)[:, :3]
    near(found, want, "the first three tokens' outputs, when later tokens change", 1e-5)


def prompts_without_their_answer():
    from evaluation.questions import read_file

    turns = [("human", "What is it?"), ("gpt", "a heron"), ("human", "Where?"), ("gpt", "afloat")]
    record = {"id": 1, "conversations": [{"from": who, "value": text} for who, text in turns]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.json"
        path.write_text(json.dumps([record]), encoding="utf-8")
        questions = read_file(path)
    for question in questions:
        asked = [answer for _, answer in question.turns]
        assert question.truth not in asked, f"the right answer {question.truth!r} is in the prompt"
    expect("turns of the two questions", [len(q.turns) for q in questions], [1, 2])


def both_orders_are_judged():
    from evaluation.judge import make_requests

    row = dict.fromkeys(
        "id image turn language kind skill metric question truth full blind".split()
    )
    row |= {"split": "s", "id": 1, "turn": 0, "language": "en", "kind": "object", "skill": "colour"}
    row |= {"metric": "exact", "question": "What colour?", "truth": "red", "blind": "grey"}
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for answer in ("crimson", "turquoise"):
            paths.append(str(Path(folder) / f"{answer}.answers.jsonl"))
            lines = [json.dumps(each) for each in ({"data": []}, row | {"full": answer})]
            Path(paths[-1]).write_text("\n".join(lines) + "\n", encoding="utf-8")
        args = SimpleNamespace(mode="pairwise", answers=paths, limit=5, seed=0, model="m")
        _, requests = make_requests(args)
    texts = [request.user for request, _ in requests]
    first = ["crimson" if t.find("crimson") < t.find("turquoise") else "turquoise" for t in texts]
    expect("the answers shown first in the two requests", first, ["crimson", "turquoise"])


def packed_alone():
    """(a batch of two packed samples, that of the second alone)."""
    from data import Sample
    from training.sampler import pack

    second = Sample([1, 7, 8, 2], [0, 1, 1, 1], [])
    return pack([Sample([1, 5, 6, 2], [0, 0, 1, 1], []), second]), pack([second])


def neighbours_are_hidden():
    both, _ = packed_alone()
    start, end = both["layout"].key_ranges
    expect("the first key of each token of two documents", start.tolist(), [[0, 0, 0, 3, 3, 3]])
    expect("the key after its last", end.tolist(), [[1, 2, 3, 4, 5, 6]])


def positions_begin_anew():
    both, alone = packed_alone()
    found = both["layout"].positions[:, -3:].tolist()
    expect("positions of a packed document", found, alone["layout"].positions.tolist())


def tokens_are_the_tokenizers():
    import tokenizer as module
    from training.texts import read_tokens

    first = tiny.tokenizer()
    # The same pieces, of which the last two have changed places.
    *pieces, last, other = first.pieces
    second = module.Tokenizer([*pieces, other, last], first.fields)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text("the cat\n", encoding="utf-8")
        files = []
        for each in (first, second):
            read_tokens(path, each, folder)
            files.append(len(list(Path(folder).glob("text-*"))))
    expect("files of tokens after the first and the second tokenizer", files, [1, 2])


# ------------------------------------------------------------------------- the faults
REPAIRS = [
    Repair(
        number=1,
        lesson=1,
        symptom="In the copy, `python data.py show ../out/quick/data/instruct.json --model "
        "../out/quick/instruct` prints <s> before every question and every answer, not once.",
        file="tokenizer.py",
        sound="def encode(self, text: str, bos: bool = False, eos: bool = False)",
        faulty="def encode(self, text: str, bos: bool = True, eos: bool = False)",
        hint="Who adds <s>? Follow one text through encode_chat and Tokenizer.encode.",
        test=one_beginning,
    ),
    Repair(
        number=2,
        lesson=2,
        symptom="`python tokenizer.py merge` of the lesson's English and README vocabularies, with "
        "--no-foreign-only, now ends with a number of unreachable pieces. Last week it said 0.",
        file="tokenizer.py",
        sound="if len(bpe(text, scores)) <= 2:",
        faulty="if len(bpe(text, scores)) <= 3:",
        hint="When is a piece the last of a chain of merges?",
        test=new_pieces_are_reached,
    ),
    Repair(
        number=3,
        lesson=3,
        symptom="The model calls red things blue and blue things red. Green ones, black ones and "
        "all shapes are right.",
        file="vision.py",
        sound='return image.convert("RGB")',
        faulty='return Image.merge("RGB", image.convert("RGB").split()[::-1])',
        hint="Look at one pixel after each step of loading an image.",
        test=colours_are_kept,
    ),
    Repair(
        number=4,
        lesson=4,
        symptom="Some image files are broken. The vision stage names them and goes on. Afterwards "
        "a black square gets high scores for many phrases.",
        file="training/phrases.py",
        sound="                pixels[row] = self.load_image(self.images[i].path)\n"
        "                usable[row] = True\n",
        faulty="                usable[row] = True\n"
        "                pixels[row] = self.load_image(self.images[i].path)\n",
        hint="What becomes of the place of an image that can't be read?",
        test=broken_images_are_not_used,
    ),
    Repair(
        number=5,
        lesson=5,
        symptom="Attention weights are nearly 0 or 1, the more so the wider the heads. Training "
        "begins slowly, and models that were read in from elsewhere answer nonsense.",
        file="kernels/attention.py",
        sound="q = (q * D**-0.5).unflatten(2, (K, H // K))",
        faulty="q = q.unflatten(2, (K, H // K))",
        hint="Work out one softmax of two keys by hand.",
        test=attention_by_hand,
    ),
    Repair(
        number=6,
        lesson=6,
        symptom="The first word of an answer is right. The longer it gets, the odder it is. The "
        "loss on the same answers is as good as ever.",
        file="model.py",
        sound="positions = cache.lengths[:, None] + torch.arange(T, device=x.device)",
        faulty="positions = torch.arange(T, device=x.device)[None]",
        hint="Run the same ids at once, and one by one with a cache.",
        test=cache_changes_nothing,
    ),
    Repair(
        number=7,
        lesson=7,
        symptom="Answers begin with a wrong word and go on well. At its end an answer does not "
        "stop: USER: follows.",
        file="data.py",
        sound="np.array(sample.loss_mask[1:], bool)",
        faulty="np.array(sample.loss_mask[:-1], bool)",
        hint="Which tokens of a conversation are targets? List them.",
        test=targets_are_the_answers,
    ),
    Repair(
        number=8,
        lesson=8,
        symptom="Same data, seed and batch size: --micro-batch-size 1 trains another model than "
        "--micro-batch-size 8. With 1, long answers are learnt worse.",
        file="training/objectives.py",
        sound='batch.get("pixels"), batch["layout"])\n',
        faulty='batch.get("pixels"), batch["layout"]) / (\n'
        '            max(batch["num_targets"], 1)\n'
        "        )\n",
        hint="What does a target of a long answer weigh, and one of a short answer?",
        test=micro_batches_change_nothing,
    ),
    Repair(
        number=9,
        lesson=9,
        symptom="One process: all is well. On two, some samples come twice in an epoch and others "
        "not at all.",
        file="training/sampler.py",
        sound="order = sort_keys, self.batch_size, self.seed\n",
        faulty="order = sort_keys, self.batch_size, self.seed + self.rank\n",
        hint="What must all processes agree on before each takes its share?",
        test=every_sample_once,
    ),
    Repair(
        number=10,
        lesson=10,
        symptom="The training loss falls to nearly 0 in a few steps. Answers are nonsense.",
        file="kernels/attention.py",
        sound="dtype=torch.int32) + (Tk - Tq + 1)",
        faulty="dtype=torch.int32) + (Tk - Tq + 2)",
        hint="Change the last token of a text. Which outputs change?",
        test=no_look_ahead,
    ),
    Repair(
        number=11,
        lesson=11,
        symptom="Accuracy is close to 100% in each language and for each kind of question, also "
        "without the image.",
        file="evaluation/questions.py",
        sound="turns = [*conversation.turns[:turn], (parts, None)]",
        faulty="turns = [*conversation.turns[: turn + 1], (parts, None)]",
        hint="Decode the prompt of one question and read it.",
        test=prompts_without_their_answer,
    ),
    Repair(
        number=12,
        lesson=12,
        symptom="A fair judge is reported to contradict itself on every question where one answer "
        "is better, and no model wins. The server receives fewer requests than it used to.",
        file="evaluation/judge.py",
        sound="for pair in ((ours, theirs), (theirs, ours)):",
        faulty="for pair in ((ours, theirs), (ours, theirs)):",
        hint="Print the two requests of one question.",
        test=both_orders_are_judged,
    ),
    Repair(
        number=13,
        lesson=9,
        symptom="With --pack, what a text costs depends on the texts before it in its row: packed "
        "behind another text it has another loss than alone.",
        file="training/sampler.py",
        sound="key_ranges=(first.int(), (index + 1).int())",
        faulty="key_ranges=(torch.zeros_like(first).int(), (index + 1).int())",
        hint="Pack two documents. What does the first token of the second attend to?",
        test=neighbours_are_hidden,
    ),
    Repair(
        number=14,
        lesson=7,
        symptom="The loss falls, but not as far as it used to. Answers leave out every second "
        "token.",
        file="training/objectives.py",
        sound='self.model.loss(batch["ids"], batch["targets"], ',
        faulty='self.model.loss(batch["ids"], batch["targets"].roll(-1, dims=1), ',
        hint="Follow the ids of one sample from the file to the loss. Who moves them by one?",
        test=loss_is_of_the_next_token,
    ),
    Repair(
        number=15,
        lesson=9,
        symptom="A model that was trained with --pack answers short prompts badly. Its training "
        "loss in the middle of a row is good.",
        file="training/sampler.py",
        sound="positions=index - first,",
        faulty="positions=index,",
        hint="Pack two documents, and compare the second with a batch of its own.",
        test=positions_begin_anew,
    ),
    Repair(
        number=16,
        lesson=2,
        symptom="Two runs of the text stage with one --cache folder, each with a tokenizer of its "
        "own. The second adds no tokens to the folder, and its model writes nonsense. With an "
        "empty folder all is well.",
        file="training/texts.py",
        sound="hashlib.sha256(tokenizer.to_bytes() + repr(file_version(path)).encode())",
        faulty="hashlib.sha256(repr(file_version(path)).encode())",
        hint="What does a run keep on the disk, and what does it depend on?",
        test=tokens_are_the_tokenizers,
    ),
]
