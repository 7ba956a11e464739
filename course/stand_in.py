"""A judge for a class without a network, whose taste is known: it answers as a server does.

    python -m course.stand_in first -o judge.json       # the answer shown first is better
    python -m course.stand_in longer -o judge.json      # the longer answer
    python -m course.stand_in reference -o judge.json   # the one equal to the reference

It starts a server on this computer, and lets `python -m evaluation judge` compare a finished demo
with the image and without it. What does the judge's report tell about each taste?
"""

import json
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from vocabulary import flags
from vocabulary.command import Parser, run_main
from vocabulary.scripts import normalise

TASTES = ("first", "longer", "reference")


def judge(taste: str, request: str) -> str:
    """The reply to a request of evaluation/judge.py."""
    first, second = re.findall("<<<(.*?)>>>", request, re.DOTALL)
    if taste == "first":
        values = 1, 0
    elif taste == "longer":
        values = len(first), len(second)
    else:
        # The second line is "Reference answer: …", in the language of the question.
        truth = re.split("[:：]", request.splitlines()[1], maxsplit=1)[1]
        values = [normalise(answer) == normalise(truth) for answer in (first, second)]
    better = "TIE"
    if values[0] != values[1]:
        better = "1" if values[0] > values[1] else "2"
    return f"That is my taste.\nVERDICT: {better}"


class Handler(BaseHTTPRequestHandler):
    """Answers a chat-completions request."""

    def __init__(self, taste, *args):
        self.taste = taste
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        if not isinstance(content, str):  # a text, and an image
            content = next(part["text"] for part in content if part["type"] == "text")
        message = {"role": "assistant", "content": judge(self.taste, content)}
        reply = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)


def main():
    parser = Parser(prog="python -m course.stand_in", description=__doc__)
    add = parser.add_argument
    add("taste", choices=TASTES, help="of the judge")
    add("--run", type=flags.folder, default="out/quick", metavar="FOLDER", help="a finished demo")
    add("--limit", type=flags.count, default=60, metavar="N", help="questions")
    add("-o", "--out", type=flags.text, required=True, metavar="FILE", help="the report")
    args = parser.parse_args()
    answers = Path(args.run) / "eval.json"
    if not answers.is_file():
        raise ValueError(f"{answers}: no such file; python -m demo --quick makes it")

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, args.taste))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    command = ["-m", "evaluation", "judge", "pairwise", str(answers), f"{answers}:blind"]
    command += ["--base-url", url, "--model", args.taste, "--limit", str(args.limit)]
    raise SystemExit(subprocess.run([sys.executable, *command, "-o", args.out]).returncode)


if __name__ == "__main__":
    run_main(main, "python -m course.stand_in")
