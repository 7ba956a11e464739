"""Runs the programs that the course's pages print, on a run of the demo, and names those that fail.

python tests/run_pages.py out/quick
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Programs, and the lines of Python that write no file.
PROGRAMS = re.compile(
    r"```python\n(.*?)```|^python -c \"(import (?:os|torch)[^\"]*)\"", re.S | re.M
)

count = failed = 0
for page in sorted((ROOT / "course" / "lessons").glob("*.md")):
    for match in PROGRAMS.finditer(page.read_text(encoding="utf-8")):
        count += 1
        code = re.sub(r"out/(quick|demo)", sys.argv[1], match[1] or match[2])
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8"
        )
        if done.returncode or not done.stdout.strip():
            failed += 1
            print(f"{page}: a program of it fails\n{done.stderr or 'it prints nothing'}")
        else:
            print(f"{page.name}: {done.stdout.splitlines()[0]}", flush=True)
print(f"{count} programs, {failed} of them fail")
sys.exit(failed or not count)
