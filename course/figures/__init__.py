"""The figures of the lessons, one a file: NAME.py has ENDING and draw(run), where `run` is the
folder of a finished demo. A file whose name begins with "_" is a helper."""

from pathlib import Path

from vocabulary.files import claim_output, write_atomically
from vocabulary.png import claim_png, save_png

MAKER = "python -m course figures"


def save_figure(module, run, out):
    """Draws the figure of a module into a file: SVG or HTML text, or an image as PNG."""
    if Path(out).suffix != module.ENDING:
        raise ValueError(
            f"{out}: this figure is a {module.ENDING} file; give -o NAME{module.ENDING}"
        )
    mark = f"<!-- {MAKER} -->\n"
    if module.ENDING == ".png":
        claim_png(out, MAKER)
        save_png(module.draw(run), out, MAKER)
    else:
        claim_output(out, lambda path: path.read_text(encoding="utf-8").endswith(mark))
        content = f"{module.draw(run).rstrip()}\n{mark}".encode()
        write_atomically(out, lambda file: file.write(content))
    print(f"{out}: drawn from {run}")
