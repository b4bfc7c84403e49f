"""``python -m bench.own_rows FOLDER``: rows for a multiple choice and a generation, as a user would bring them.

Small stories made of names, places and things. The question is where something is: to be written (generation), or to be
chosen among three places that the story names (choice). configs/own-*.yaml train on them.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

_NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jude", "Kim", "Lena", "Milo", "Nora")
_THINGS = ("key", "lamp", "book", "apple", "coat", "map", "cup", "radio", "letter", "ring", "shoe", "kite")
_PLACES = ("kitchen", "garden", "cellar", "attic", "garage", "office", "hall", "library", "barn", "bathroom")
_SIZES = {"train": 400, "test": 200}


def rows(count: int, seed: int) -> list[dict[str, str | int]]:
    """``count`` rows: story, question, answer, the choices first, second and third, and the label of the right one."""
    draw = random.Random(seed)
    found: list[dict[str, str | int]] = []
    for _ in range(count):
        names, things, places = draw.sample(_NAMES, 3), draw.sample(_THINGS, 3), draw.sample(_PLACES, 3)
        left = zip(names, things, places, strict=True)
        story = " ".join(f"{name} left the {thing} in the {place}." for name, thing, place in left)
        right = draw.randrange(3)
        offered = draw.sample(places, 3)
        found.append({
            "story": story, "question": f"Where is the {things[right]}?", "answer": f"in the {places[right]}",
            **dict(zip(("first", "second", "third"), (f"in the {place}" for place in offered), strict=True)),
            "label": offered.index(places[right]),
        })  # fmt: skip
    return found


def main() -> None:
    """Write own-train.jsonl and own-test.jsonl."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(_SIZES.items()):
        lines = "".join(json.dumps(row) + "\n" for row in rows(count, seed))
        (folder / f"own-{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
