"""A chat-completions server that answers as a perfect model would: it knows what each image of the
demo world shows. With it the whole way of annotation/ can be walked without a vision model, and the
set that it makes can be compared with the demo's own.

    python tests/scene_endpoint.py lay-out out/demo/data -o out/annotate --images 640
    python tests/scene_endpoint.py serve out/demo/data --images 640 --port 8123 &
    python -m annotation out/annotate/all -o out/annotate/all.json \
        --base-url http://127.0.0.1:8123/v1 --model scenes
    python -m annotation out/annotate/english -o out/annotate/english.json --languages en \
        --base-url http://127.0.0.1:8123/v1 --model scenes

`lay-out` copies training images under names that say nothing. Images with English-only objects go
into a folder of their own, as the demo speaks of them in English alone."""

import argparse
import base64
import io
import json
import shutil
import sys
import threading
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import annotation.prompts as prompts  # noqa: E402
from demo.questions import Interviewer  # noqa: E402
from demo.words import LANGUAGES, WORDS, training_languages  # noqa: E402
from demo.world import BASE_ONLY, Scene, Thing, random_for  # noqa: E402

ASKED = {  # as in the demo's set: skill, which thing, how the question calls it
    "object": (("what", 0, None), ("colour", 1, None), ("count", 2, None), ("size", 3, None)),
    "location": (
        ("where", 0, "kind"),
        ("at", 1, None),
        ("relation", 0, None),
        ("relation", 1, None),
        ("where", 1, "colour"),
    ),
    "atmosphere": (("background", 0, None), ("mood", 0, None)),
}


def read_scenes(folder, count=None):
    """[(image's path, Scene)] of the training split."""
    folder, scenes = Path(folder), []
    for row in json.loads((folder / "scenes.json").read_text(encoding="utf-8")):
        if row["image"].startswith("images/train/"):
            things = tuple(Thing(**thing) for thing in row["things"])
            scenes.append((folder / row["image"], Scene(things, row["background"])))
    return scenes[:count]


def thumbnail(image):
    small = image.convert("RGB").resize((32, 32), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).ravel()


class Eye:
    """Finds the scene of an image by its look at 32 × 32 pixels: sent images are encoded anew, so
    that no byte of the file is left."""

    def __init__(self, images):
        self.scenes, looks = [scene for _, scene in images], []
        for path, _ in images:
            with Image.open(path) as image:
                looks.append(thumbnail(image))
        self.looks = np.stack(looks)
        self.norms = (self.looks**2).sum(1)
        self.found, self.lock = lru_cache(64)(self.find), threading.Lock()

    def __call__(self, jpeg):
        # An image's kinds are asked about at the same time: it is looked for once.
        with self.lock:
            return self.found(jpeg)

    def find(self, jpeg):
        """The index of the scene. Raises ValueError unless one image is like it, and by far more
        than the next."""
        look = thumbnail(Image.open(io.BytesIO(jpeg)))
        squares = np.maximum(0, self.norms - 2 * self.looks @ look + look @ look)
        distance = np.sqrt(squares / look.size)  # root mean square, of 255
        first, second = np.argsort(distance)[:2] if len(distance) > 1 else (0, 0)
        if distance[first] > 6 or (len(distance) > 1 and distance[second] < 2 * distance[first]):
            raise ValueError(
                f"no image is like it: distances {distance[first]:.1f} and {distance[second]:.1f}"
            )
        return int(first)


def unlike(turns):
    """No Korean or Chinese turn may name an English-only kind, as in the demo's own set."""
    names = [WORDS[language]["kind"][kind] for language in ("ko", "zh") for kind in BASE_ONLY]
    return not any(
        name in part
        for language in ("ko", "zh")
        for turn in turns[language]
        for part in turn
        for name in names
    )


YES_NO = {  # as in the demo's set: what a kind's yes/no questions are about
    "object": ("pair", "kind", "colour", "size"),
    "location": ("place",),
    "atmosphere": (),
    "conversation": ("pair", "place"),
}


def talk(scene, index, kind):
    """{language: [(question, answer), …]} of one kind. The same draws in every language make the
    same questions."""

    def each(make, *names):
        # The demo draws from tables of one length in every language.
        return {code: make(code, random_for("endpoint", index, kind, *names)) for code in LANGUAGES}

    def converse(code, rng):
        return Interviewer(scene, code, rng).converse(4 + index % 3)

    # A conversation without its yes/no, whose draws depend on the language.
    if kind == "conversation":
        for attempt in range(1000):
            turns = each(converse, attempt)
            if not any(answer in ("yes", "no") for _, answer in turns["en"]):
                break
    else:
        turns = {code: [] for code in LANGUAGES}
        for n, (skill, nth, by) in enumerate(ASKED[kind]):
            thing = scene.things[(index + nth) % len(scene.things)]

            def ask(code, rng, skill=skill, thing=thing, by=by):
                return Interviewer(scene, code, rng).ask(skill, thing, by)

            for code, turn in each(ask, n).items():
                if turn and turn not in turns[code]:
                    turns[code].append(turn)
        turns = {code: turns[code][:4] for code in LANGUAGES}

    # One question whose answer is yes in half of the images.
    if types := YES_NO[kind]:
        kind_of, yes = types[index // 2 % len(types)], index % 2 == 0

        def ask_yes_no(code, rng):
            interviewer = Interviewer(scene, code, rng, text_only=True)
            return [interviewer.ask_yes_no(kind_of, yes)]

        for attempt in range(1000):
            more = each(ask_yes_no, "yes or no", attempt)
            if unlike(more) or scene.base_only:
                break
        turns = {code: turns[code] + more[code] for code in LANGUAGES}
    return turns


def answer(body, eye, images):
    """The text of the reply to a request of annotation/."""
    system, (text, image) = body["messages"][0]["content"], body["messages"][1]["content"]
    index = eye(base64.b64decode(image["image_url"]["url"].split(",", 1)[1]))
    number = int(images[index][0].stem)
    for kind, prompt in prompts.KINDS.items():
        if text["text"].startswith(prompt):
            said = {}
            for code, turns in talk(eye.scenes[index], number, kind).items():
                if f"({code})" in system:
                    said[code] = [{"question": q, "answer": a} for q, a in turns]
            return json.dumps(said, ensure_ascii=False)

    # To verify: what it would have said itself is right.
    truth = [talk(eye.scenes[index], number, kind) for kind in prompts.KINDS]
    verdicts = []
    for pair in json.loads(text["text"]):
        number = pair.pop("pair")
        turns = {code: (texts["question"], texts["answer"]) for code, texts in pair.items()}
        right = any(all(turns[code] in said[code] for code in turns) for said in truth)
        verdicts.append({"pair": number, "confirmed": right})
    return json.dumps({"pairs": verdicts})


def make_server(images, port=0):
    eye = Eye(images)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                message = {"role": "assistant", "content": answer(body, eye, images)}
                choices = [{"message": message, "finish_reason": "stop"}]
                usage = {"prompt_tokens": 1000, "completion_tokens": 500}
                status, reply = 200, {"choices": choices, "usage": usage}
            except ValueError as error:
                status, reply = 422, {"error": {"message": str(error)}}
            payload = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def lay_out(images, out):
    """Copies the images into `all` and `english`, named by a shuffle of their numbers."""
    for folder in ("all", "english"):
        (out / folder).mkdir(parents=True)
    names = random_for("names").sample(range(10 ** len(str(len(images)))), len(images))
    for (path, scene), name in zip(images, names):
        folder = "english" if len(training_languages(scene)) == 1 else "all"
        shutil.copy(path, out / folder / f"photo-{name}.png")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["serve", "lay-out"])
    parser.add_argument("data", type=Path, help="the demo world's folder")
    parser.add_argument("--images", type=int, help="only the first so many training images")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("-o", "--out", type=Path, help="where lay-out writes")
    args = parser.parse_args()
    images = read_scenes(args.data, args.images)
    if args.command == "lay-out":
        return lay_out(images, args.out)
    make_server(images, args.port).serve_forever()


if __name__ == "__main__":
    main()
