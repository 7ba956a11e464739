"""Fails unless a run of the demo has begun to see: it names things better than it does blind.

python tests/began_to_see.py out/quick/eval.json
"""

import json
import sys
from pathlib import Path

MARGIN = 0.15  # three standard errors of a difference of two shares of 200 questions

rows = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["rows"]
share = {
    row["model"]: row["accuracy"]
    for row in rows
    if (row["split"], row["language"], row["kind"]) == ("unseen_images", "all", "object.what")
}
print("what a thing is: " + ", ".join(f"{name} {value:.1%}" for name, value in share.items()))
if share["full"] < max(share["blind"], share["chance"]) + MARGIN:
    sys.exit(f"the model has not begun to see: it must be {MARGIN:.0%} above blind and chance")
