"""Which images are in a folder, and what is known of their objects."""

import hashlib
from unicodedata import category, normalize

from tqdm import tqdm

from annotation.prompts import Item
from vocabulary.files import read_json

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def find_images(folder, objects):
    """-> (items without a kind, refused [(name, reason)], number of other files).

    Reads nothing outside `folder`. A copy of an image counts as that image."""
    # Links may lead anywhere, so paths are compared as they really are.
    root, items, refused, num_others = folder.resolve(), [], [], 0
    first_name, names = {}, set()
    files = sorted(folder.rglob("*"))
    for path in tqdm(files, desc="images", unit="file", leave=False, disable=None):
        # One name, whichever way the disk composes its letters (see find_file).
        name, real = normalize("NFC", path.relative_to(folder).as_posix()), path.resolve()
        inside = real.is_relative_to(root)

        # A linked folder would be searched twice, or without end.
        if inside and real.is_dir():
            if path.is_symlink():
                refused.append((name, "a link to a folder; not followed"))
            continue
        if inside and not (path.suffix.lower() in ENDINGS and real.is_file()):
            num_others += 1
            continue

        try:
            sha = image_digest(name, real, inside)
            if name in names:
                raise ValueError("two files have this name, their letters composed differently")
            names.add(name)
        except (OSError, ValueError) as error:
            refused.append((name, getattr(error, "strerror", None) or str(error)))
            continue
        # The same bytes are asked about once.
        if first_name.setdefault(sha, name) == name:
            items.append(Item(name, real, sha, objects=tuple(objects.get(name, ()))))
        else:
            refused.append((name, f"the same image as {first_name[sha]}"))
    return items, refused, num_others


def image_digest(name, real, inside):
    """A hash of the file's bytes. ValueError or OSError with the reason if it can't be used."""
    if not inside:
        raise ValueError("leads out of the folder")
    # Bytes that are not UTF-8 arrive as surrogates.
    if not all(c.isprintable() or category(c) == "Zs" for c in name):  # Zs: any kind of space
        raise ValueError("the file's name can't be written to JSON")
    return hashlib.sha256(real.read_bytes()).hexdigest()[:32]


def read_objects(path):
    """{image name: names of its main objects} from a JSON file. ValueError if it is something else.

    The names are in English, or in several languages."""
    table = read_json(path)
    if not isinstance(table, dict) or not all(map(is_list_of_names, table.values())):
        raise ValueError(
            f'{path}: must be {{"image.jpg": ["cat", "sofa"], …}}, each name a short text'
        )
    return {normalize("NFC", name): names for name, names in table.items()}


def is_list_of_names(names):
    """Whether it is a list of short, printable texts."""
    if not isinstance(names, list):
        return False
    return all(isinstance(n, str) and 0 < len(n) <= 60 and n.isprintable() for n in names)
