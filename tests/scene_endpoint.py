"""A chat-completions server that "sees" pictures of the demo world: it finds the picture it is sent among those that scenes.py drew, and words the answers
from what is known to be in it. With it annotate.py's whole way can be walked without a vision model, and the set it makes be compared with scenes.py's own.

    python tests/scene_endpoint.py lay-out out/demo/data -o out/annotate --pictures 640      # copies of training pictures, under names that say nothing
    python tests/scene_endpoint.py serve out/demo/data --pictures 640 --port 8123 &
    python annotate.py out/annotate/all -o out/annotate/all.json --base-url http://127.0.0.1:8123/v1 --model scenes
    python annotate.py out/annotate/english -o out/annotate/english.json --languages en --base-url http://127.0.0.1:8123/v1 --model scenes
    python data.py check out/annotate/all.json out/annotate/english.json --model out/demo/align

Pictures with a thing of an English-only kind lie in a folder of their own: they are annotated in English alone, as scenes.py's own set speaks of them."""

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

import annotation.annotate as annotate  # noqa: E402
from scenes import ENGLISH_ONLY, LANGUAGES, WORDS, Scene, Thing, ask, ask_yes_no, chat, random_for  # noqa: E402

ASKED = {  # as scenes.py's own set does: the skill, about which thing, and what the question calls it by
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
    """[(picture's path, Scene)] of the training split."""
    rows = [
        row
        for row in json.loads((Path(folder) / "scenes.json").read_text())
        if row["image"].startswith("pictures/train/")
    ][:count]
    return [
        (
            Path(folder) / row["image"],
            Scene(tuple(Thing(**thing) for thing in row["things"]), row["background"]),
        )
        for row in rows
    ]


def thumbnail(picture):
    return np.asarray(
        picture.convert("RGB").resize((32, 32), Image.Resampling.BOX), dtype=np.float32
    ).ravel()


class Eye:
    """Finds the scene of a picture by its look at 32 × 32 pixels: sent pictures are encoded anew, so that no byte of the file is left."""

    def __init__(self, pictures):
        self.scenes, looks = [scene for _, scene in pictures], []
        for path, _ in pictures:
            with Image.open(path) as picture:
                looks.append(thumbnail(picture))
        self.looks = np.stack(looks)
        self.norms, self.found, self.lock = (
            (self.looks**2).sum(1),
            lru_cache(64)(self.find),
            threading.Lock(),
        )

    def __call__(self, jpeg):
        with self.lock:  # a picture's kinds are asked about at the same time: it is looked for once
            return self.found(jpeg)

    def find(self, jpeg):
        """The index of the scene. Raises ValueError unless one picture is like it, and by far more than the next."""
        look = thumbnail(Image.open(io.BytesIO(jpeg)))
        distance = np.sqrt(
            np.maximum(0, self.norms - 2 * self.looks @ look + look @ look) / look.size
        )  # root mean square, of 255
        first, second = np.argsort(distance)[:2] if len(distance) > 1 else (0, 0)
        if distance[first] > 6 or (len(distance) > 1 and distance[second] < 2 * distance[first]):
            raise ValueError(
                f"no picture is like it: distances {distance[first]:.1f} and {distance[second]:.1f}"
            )
        return int(first)


def unlike(turns):
    """No Korean or Chinese turn may name an English-only kind, as in scenes.py's own set."""
    names = [WORDS[language]["kind"][kind] for language in ("ko", "zh") for kind in ENGLISH_ONLY]
    return not any(
        name in part
        for language in ("ko", "zh")
        for turn in turns[language]
        for part in turn
        for name in names
    )


def talk(scene, index, kind):
    """{language: [(question, answer), …]} of one kind. The same draws in every language make the same questions."""

    def each(
        make, *names
    ):  # scenes.py draws from tables of one length in every language: with the same generator it asks the same
        return {
            language: make(language, random_for("endpoint", index, kind, *names))
            for language in LANGUAGES
        }

    if kind == "conversation":  # without its yes/no, whose draws depend on the language
        for attempt in range(1000):
            turns = each(lambda language, rng: chat(scene, language, rng, 4 + index % 3), attempt)
            if not any(answer in ("yes", "no") for _, answer in turns["en"]):
                break
    else:
        found = []
        for n, (skill, nth, by) in enumerate(ASKED[kind]):
            thing = scene.things[(index + nth) % len(scene.things)]
            found.append(each(lambda language, rng: ask(scene, skill, language, rng, thing, by), n))
        turns = {
            language: list(dict.fromkeys(turn[language] for turn in found if turn[language]))[:4]
            for language in LANGUAGES
        }
    types = {
        "object": ("pair", "kind", "colour", "size"),
        "location": ("place",),
        "atmosphere": (),
        "conversation": ("pair", "place"),
    }[kind]
    if types:  # one question whose answer is yes in half of the pictures
        type, yes = types[index // 2 % len(types)], index % 2 == 0
        for attempt in range(1000):
            more = each(
                lambda language, rng: [ask_yes_no(scene, type, yes, language, rng, text_only=True)],
                "yes or no",
                attempt,
            )
            if unlike(more) or any(thing.kind in ENGLISH_ONLY for thing in scene.things):
                break
        turns = {language: turns[language] + more[language] for language in LANGUAGES}
    return turns


def answer(body, eye, pictures):
    """The text of the reply to an annotate.py request."""
    system, (text, image) = body["messages"][0]["content"], body["messages"][1]["content"]
    index = eye(base64.b64decode(image["image_url"]["url"].split(",", 1)[1]))
    number = int(pictures[index][0].stem)
    kind = next(
        (kind for kind, prompt in annotate.KINDS.items() if text["text"].startswith(prompt)), None
    )
    if kind is None:  # to verify: what it would have said itself is right
        pairs, truth = (
            json.loads(text["text"]),
            [talk(eye.scenes[index], number, kind) for kind in annotate.KINDS],
        )
        good = lambda pair: any(
            all((pair[l]["question"], pair[l]["answer"]) in said[l] for l in pair if l != "pair")
            for said in truth
        )
        return json.dumps(
            {"pairs": [{"pair": pair["pair"], "confirmed": good(pair)} for pair in pairs]}
        )
    turns = talk(eye.scenes[index], number, kind)
    return json.dumps(
        {
            l: [{"question": q, "answer": a} for q, a in turns[l]]
            for l in LANGUAGES
            if f"({l})" in system
        },
        ensure_ascii=False,
    )


def make_server(pictures, port=0):
    eye = Eye(pictures)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                message = {"role": "assistant", "content": answer(body, eye, pictures)}
                status, reply = (
                    200,
                    {
                        "choices": [{"message": message, "finish_reason": "stop"}],
                        "usage": {"prompt_tokens": 1000, "completion_tokens": 500},
                    },
                )
            except ValueError as error:
                status, reply = 422, {"error": {"message": str(error)}}
            payload = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def lay_out(pictures, out):
    """Copies the pictures into `all` and `english`, named by a shuffle of their numbers."""
    for folder in ("all", "english"):
        (out / folder).mkdir(parents=True)
    names = random_for("names").sample(range(10 ** len(str(len(pictures)))), len(pictures))
    for (path, scene), name in zip(pictures, names):
        shutil.copy(
            path, out / ("english" if len(scene.languages()) == 1 else "all") / f"photo-{name}.png"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["serve", "lay-out"])
    parser.add_argument("data", type=Path, help="the demo world's folder")
    parser.add_argument("--pictures", type=int, help="only the first so many training pictures")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("-o", "--out", type=Path, help="where lay-out writes")
    args = parser.parse_args()
    pictures = read_scenes(args.data, args.pictures)
    if args.command == "lay-out":
        return lay_out(pictures, args.out)
    make_server(pictures, args.port).serve_forever()


if __name__ == "__main__":
    main()
