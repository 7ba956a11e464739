"""The journal: what a server was asked and what it replied, on disk before anything else happens.

Pipeline: client.py appends to it; annotation/ and judge.py read from it what is known. A second run
asks only for what is missing. One line of JSON for each reply, or for a request that got none:

    {"key": …, "image": …, "time": …, "text": …, "fault": …, "tokens": [in, out], "max_tokens": …}
    {"key": …, "image": …, "time": …, "failed": the reason, "state": …}
"""

import json
import math
import os
import sys
import threading
from collections import defaultdict
from datetime import datetime, timezone

from vocabulary.files import claim_output, lock_file

NOT_ASKED = "not asked yet"
CUT_OFF = "cut off: --max-tokens or the server's context is too small"


class Journal:
    """All replies, one line each. One process at a time holds it; threads may share it."""

    def __init__(self, path):
        """Reads what earlier runs left. ValueError if another process has the journal."""
        claim_output(path, is_journal)
        self.path = path
        self.entries = defaultdict(list)  # key -> entries
        self.tokens = []  # (in, out) of each reply
        self.passed_over = 0  # lines that a crash cut off
        self.lock = threading.Lock()
        self.file = open(path, "a+b")
        lock_file(self.file, path)
        sync_folder(path.parent)

        self.file.seek(0)
        lines = self.file.read().split(b"\n")
        # The next line must not continue a cut one.
        if lines[-1]:
            self.file.write(b"\n")
        for line in filter(None, lines):
            try:
                self.remember(json.loads(line))
            except (ValueError, KeyError, TypeError):
                self.passed_over += 1

    def remember(self, entry):
        self.entries[entry["key"]].append(entry)
        if "text" in entry:
            self.tokens.append(tuple(entry["tokens"]))

    def append(self, request, **entry):
        """Writes an entry about a request. It is known only once it is on the disk."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        entry = {"key": request.key, "image": request.name, "time": now} | entry
        with self.lock:
            self.file.write(json_line(entry))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.remember(entry)

    def outcome(self, request, args):
        """What is known of a request: (state, value, number of unreadable replies).

        State "good": value is what `request.parse` returned. Else the state is "malformed", "no
        reply", or what an entry calls it, and the value is the reason."""
        state, reason, num_bad = "no reply", NOT_ASKED, 0
        for entry in self.entries.get(request.key, ()):
            # A later run may get the reply that this one did not.
            if "text" not in entry:
                state, reason = entry.get("state", "no reply"), entry["failed"]
                continue

            fault = entry["fault"]
            # With more tokens a reply that was cut off may come whole: it is worth another try.
            if fault == CUT_OFF and entry.get("max_tokens", math.inf) < args.max_tokens:
                reason = fault
                continue
            try:
                if fault:
                    raise ValueError(fault)
                return "good", request.parse(entry["text"]), num_bad
            except ValueError as error:
                num_bad, reason = num_bad + 1, str(error)

        if num_bad >= min(args.tries, request.max_unreadable):
            return "malformed", f"{reason} ({num_bad} replies)", num_bad
        return state, reason, num_bad

    def total_tokens(self):
        """(in, out): the tokens of all replies, earlier runs included."""
        return tuple(sum(tokens[i] for tokens in self.tokens) for i in (0, 1))


def is_journal(path):
    """Whether a file is a journal. Any of its lines may be one that a crash cut off."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return any(line.startswith(b'{"key": ') for line in lines)


def json_line(record):
    """A record as one line of JSON. Half a surrogate pair, which UTF-8 lacks, stays an escape."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def sync_folder(folder):
    """After a power loss a new file must have its name, too. Windows can't sync a folder."""
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
