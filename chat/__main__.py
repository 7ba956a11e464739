"""Serves a page to ask a model on, and OpenAI's chat-completions endpoint.

    python -m chat out/demo/instruct

The page also offers the other stages of the run: the model folders beside the given one. Without
--token it is for this machine alone. How to use both: docs/chat.md.
"""

import argparse
import ipaddress
import os
import re
import sys
import webbrowser

from chat.answers import Answerer
from chat.server import make_server
from training.device import DEVICES
from vocabulary import flags
from vocabulary.command import Parser, run_main


def address(given):
    """An argparse type: an address of this machine, or its name."""
    if not re.fullmatch(r"[\w.:-]+", given, re.ASCII):
        raise argparse.ArgumentTypeError(f"{given}: must be an address such as 127.0.0.1")
    return given


def token(given):
    """An argparse type: a secret that fits into a header and into an address."""
    if not re.fullmatch(r"[\w.~-]{8,}", given, re.ASCII):
        raise argparse.ArgumentTypeError("must be 8 or more letters, digits, and . _ ~ -")
    return given


def is_loopback(host):
    """Whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def has_browser():
    """Whether a window can open. Elsewhere a browser might start inside the terminal."""
    has_screen = os.name == "nt" or sys.platform == "darwin"
    has_screen = has_screen or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return sys.stdout.isatty() and bool(has_screen)


def parse_args():
    parser = Parser(prog="python -m chat", description=__doc__)
    add = parser.add_argument
    add("model", type=flags.folder, metavar="MODEL", help="the model folder")
    add("--host", type=address, default="127.0.0.1", help="others than this machine need --token")
    add("--port", type=flags.at_least(1, most=65535), default=8000, help="of the address")
    add("--token", type=token, help="a secret that clients must know")
    add("--device", choices=DEVICES, default="auto", help="auto: a CUDA GPU, else the CPU")
    args = parser.parse_args()
    if not args.token and not is_loopback(args.host):
        parser.error(f"--host {args.host} lets others in: give a --token, which they must know")
    return args


def main():
    args = parse_args()
    answerer = Answerer(args.model, args.device)
    try:
        server = make_server(answerer, args.host, args.port, args.token)
    except OSError as error:
        raise ValueError(f"{args.host} port {args.port}: {error.strerror}; try --port") from None

    host = f"[{args.host}]" if ":" in args.host else args.host
    url = f"http://{host}:{server.server_address[1]}/"
    page = f"{url}#{args.token}" if args.token else url
    print(f"{page}   the page\n{url}v1   for programs; stages: {', '.join(answerer.stages)}")
    sys.stdout.flush()
    if has_browser():
        webbrowser.open(page)
    with server:
        server.serve_forever()


if __name__ == "__main__":
    run_main(main, "chat")
