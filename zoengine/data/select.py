"""How movie_reviews.tsv was made from its origin (NOTICE.md): `python -m zoengine.data.select SOURCE OUT`.

SOURCE has one review sentence a line, tab-separated: id, mean rating (-4 .. +4), sentence, with a header or without.
The rule, applied in this order, has no random part:

1. keep a sentence of 4 to 12 words (split at white space), all ASCII (the others carry broken encodings);
2. keep |mean rating| > 0.5; label 1 when the rating is positive, else 0;
3. of sentences with the same letters and digits, ignoring case and everything else, keep the first;
4. order each label's sentences by the SHA-256 of those letters and digits;
5. take, from each label alike, the first 250 for test, the next 150 for dev and the next 750 for train, and
   interleave the two labels.
"""

import hashlib
import re
import sys
from pathlib import Path

WORDS = range(4, 13)
PER_LABEL = {"test": 250, "dev": 150, "train": 750}


def normalised(sentence: str) -> str:
    """Letters and digits only, lower case, words separated by one space: what two duplicates have in common."""
    return " ".join(re.findall(r"[a-z0-9]+", sentence.lower()))


def select(lines: list[str]) -> list[tuple[str, str, int, str, str]]:
    """Rows (id, split, label, mean rating, sentence) chosen from `lines` by the rule in the module's docstring."""
    candidates: dict[int, list[tuple[str, str, str, str]]] = {0: [], 1: []}
    seen: set[str] = set()
    for line in lines:
        identifier, rating, sentence = (field.strip() for field in line.rstrip("\n").split("\t"))
        if not identifier.isdigit() or len(sentence.split()) not in WORDS or not sentence.isascii():
            continue
        key = normalised(sentence)
        if abs(float(rating)) <= 0.5 or key in seen:
            continue
        seen.add(key)
        digest = hashlib.sha256(key.encode()).hexdigest()
        candidates[int(float(rating) > 0)].append((digest, identifier, rating, sentence))
    rows, start = [], 0
    negative, positive = sorted(candidates[0]), sorted(candidates[1])
    for split, count in PER_LABEL.items():
        for pair in zip(negative[start : start + count], positive[start : start + count], strict=True):
            rows += [(i, split, label, rating, text) for label, (_, i, rating, text) in enumerate(pair)]
        start += count
    return rows


if __name__ == "__main__":
    source, out = sys.argv[1:]
    chosen = select(Path(source).read_text(encoding="utf-8").splitlines())
    body = "".join("\t".join(map(str, row)) + "\n" for row in chosen)
    Path(out).write_text("id\tsplit\tlabel\tmean_rating\ttext\n" + body, encoding="utf-8")
