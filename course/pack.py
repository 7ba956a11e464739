"""The stick: all that a class without a network needs, in one folder.

    stick/
      READ-ME.txt     what to type on a laptop
      project/        this project, with the course and the quick demo's models in out/quick
      wheels/         what pip installs, for each system

pip takes conditions such as `sys_platform == "linux"` for the system that it runs on, not for the
one that it loads for: on Linux it would add 3 GB of CUDA to the wheels for Windows. So pip may not
follow dependencies here, and all that they need is named below.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from course.copies import SKIPPED, copy_project
from course.exercise import COURSE, ROOT
from vocabulary.files import entries, write_json

# System -> (pip's names of its platforms, packages that only it needs).
SYSTEMS = {
    "windows": (["win_amd64"], ["colorama"]),
    "linux": (["manylinux_2_28_x86_64", "manylinux2014_x86_64", "linux_x86_64"], []),
    "mac": ([f"macosx_{version}_0_arm64" for version in (14, 13, 12, 11)], []),
}
OF_TORCH = ["filelock", "typing-extensions", "setuptools", "sympy", "mpmath<1.4", "networkx"]
OF_TORCH += ["jinja2", "markupsafe", "fsspec"]
OF_PYTEST = ["iniconfig", "packaging", "pluggy<2", "pygments"]
OF_OLD_PYTHON = ["exceptiongroup", "tomli"]  # pytest needs them on Python 3.10
# Only for Linux: torch without CUDA, and so without triton; lesson 10 goes without. The usual
# index has it for Windows and macOS.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NOTES = "course-pack.json"

README = """\
A class without a network. Copy this folder to the laptop. Open a terminal in it, and type:

Windows (PowerShell):
    python -m venv project\\.venv
    project\\.venv\\Scripts\\python -m pip install --no-index --find-links wheels -r needed.txt
    cd project
    .venv\\Scripts\\activate
If that says that running scripts is disabled, type before it:
    Set-ExecutionPolicy -Scope Process RemoteSigned
If torch says that a DLL is missing: Microsoft's vc_redist.x64.exe, from the network.

macOS and Linux:
    python3 -m venv project/.venv
    project/.venv/bin/python -m pip install --no-index --find-links wheels -r needed.txt
    cd project
    source .venv/bin/activate

Then begin: python -m course start 01 -o mine
The lessons are in project/course/lessons.
"""
MISSING = """\
Not all wheels for these could be loaded: {lost}.
There pip needs the network: leave out --no-index.
"""


def needed() -> list[str]:
    """The lines of requirements.txt, without triton."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    return [line for line in lines if line and not line.startswith(("#", "triton"))]


def packages(system: str, version: str) -> list[str]:
    """All that one system and Python need, beside torch."""
    others = [line for line in needed() if not line.startswith("torch")]
    old = OF_OLD_PYTHON if version == "3.10" else []
    return others + OF_TORCH + OF_PYTEST + SYSTEMS[system][1] + old


def download(folder: Path, system: str, version: str, index: str) -> bool:
    """Put the wheels for one system and one Python into a folder. False if one isn't to be had."""
    command = [sys.executable, "-m", "pip", "download", "--dest", str(folder), "--no-deps"]
    command += ["--only-binary", ":all:", "--retries", "1", "--python-version", version]
    for platform in SYSTEMS[system][0]:
        command += ["--platform", platform]
    torch = next(line for line in needed() if line.startswith("torch"))
    if system == "linux":
        first = [f"{torch}+cpu", "--index-url", index]
    else:
        first = [torch]
    print(f"wheels for {system}, Python {version}", flush=True)
    return all(
        subprocess.run(command + words, check=False).returncode == 0
        for words in (first, packages(system, version))
    )


def copy_run(run: Path, out: Path) -> None:
    """Copy a finished demo without what only continuing it needs."""
    skipped = shutil.ignore_patterns("checkpoints", "*.tmp")
    shutil.copytree(run, out, ignore=skipped, dirs_exist_ok=True)


def pack(out: Path, run: Path, systems: list[str], versions: list[str], index: str) -> None:
    """Make the folder for a stick. Wheels that are there are not loaded again."""
    if out.is_file() or entries(out) and not (out / NOTES).is_file():
        raise ValueError(f"{out}: is there, and was not written by `pack`; give another -o")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / NOTES, {"systems": systems, "python": versions})
    found, lost = [], []
    for system in systems:
        for version in versions:
            is_there = download(out / "wheels", system, version, index)
            (found if is_there else lost).append(f"{system}, Python {version}")

    # The project is copied anew: it may have changed.
    shutil.rmtree(out / "project", ignore_errors=True)
    copy_project(out / "project")
    shutil.copytree(COURSE, out / "project" / "course", ignore=SKIPPED)
    copy_run(run, out / "project" / "out" / "quick")
    (out / "needed.txt").write_text("\n".join(needed()) + "\n", encoding="utf-8")
    text = README
    if found:
        text += f"The wheels are for {'; '.join(found)}.\n"
    if lost:
        text += MISSING.format(lost="; ".join(lost))
    (out / "READ-ME.txt").write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 2**20:,.0f} MiB; READ-ME.txt says what to type")
    if lost:
        where = f"--index {index} is asked for Linux" if "linux" in " ".join(lost) else "network?"
        raise ValueError(f"{out}: no wheels for {'; '.join(lost)}: pip says why above; {where}")
