"""Serves a page to ask a model on, and OpenAI's chat-completions endpoint: docs/chat.md.

    python -m chat out/demo/instruct
    python -m chat out/demo/instruct --export page.html     # one file with the model, no server

The page also offers the other stages of the run: the model folders beside the given one. Without
--token it is for this machine alone.
"""

import argparse
import ipaddress
import os
import re
import socket
import sys
import webbrowser

from chat.answers import Answerer
from chat.export import export_page
from chat.server import Server
from kernels.device import DEVICES
from vocabulary import flags
from vocabulary.command import Parser, run_main


def address(given):
    """An argparse type: an address of this machine."""
    try:
        return ipaddress.ip_address(given)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given}: must be one such as 127.0.0.1") from None


def token(given):
    """An argparse type: a secret that fits into a header and into a URL."""
    if not re.fullmatch(r"[\w.~-]{8,}", given, re.ASCII):
        raise argparse.ArgumentTypeError("must be 8 or more letters, digits, and . _ ~ -")
    return given


def parse_args():
    parser = Parser(prog="python -m chat", description=__doc__)
    add = parser.add_argument
    add("model", type=flags.folder, metavar="MODEL", help="the model folder")
    about = "0.0.0.0 lets other machines in, with --token"
    add("--host", type=address, metavar="ADDRESS", default="127.0.0.1", help=about)
    add("--port", type=flags.at_least(1, most=65535), default=8000, help="of the address")
    add("--token", type=token, help="a secret that clients must know")
    add("--device", choices=DEVICES, default="auto", help="auto: a CUDA GPU, else the CPU")
    add("--export", type=flags.text, metavar="FILE", help="write an HTML file, and serve nothing")
    about = "of the run, for --export; also instruct/step-00002400"
    add("--stages", nargs="+", type=flags.text, default=[], metavar="STAGE", help=about)
    args = parser.parse_args()
    if args.stages and not args.export:
        parser.error("--stages is for --export FILE")
    if not args.token and not args.host.is_loopback:
        parser.error(f"--host {args.host} lets other machines in: give a --token")
    return args


def main():
    args = parse_args()
    if args.export:
        return export_page(args.model, args.export, args.stages)

    answerer = Answerer(args.model, args.device)
    try:
        server = Server(answerer, str(args.host), args.port, args.token)
    except OSError as error:
        raise ValueError(f"{args.host} port {args.port}: {error.strerror}; try --port") from None

    host = f"[{args.host}]" if args.host.version == 6 else args.host
    host = socket.gethostname() if args.host.is_unspecified else host
    url = f"http://{host}:{args.port}/"
    page = f"{url}#{args.token}" if args.token else url
    print(f"{page}  the page\n{url}v1  for programs", flush=True)
    # Without a screen, a browser could open inside the terminal.
    has_screen = os.name == "nt" or sys.platform == "darwin" or os.environ.get("DISPLAY")
    if sys.stdout.isatty() and has_screen:
        webbrowser.open(page)
    with server:
        server.serve_forever()


if __name__ == "__main__":
    run_main(main, "chat")
