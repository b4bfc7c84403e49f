"""Single sentences: sentiment, acceptability, kind of question.

Prompts of SST-2 are those of Malladi et al. 2023 (MeZO, https://arxiv.org/abs/2305.17333) and their reference code;
masked prompts and their words are those of Gao et al. 2021 (LM-BFF, https://arxiv.org/abs/2012.15723), which MeZO took
over. Neither gives SST-5, CoLA and TREC a prompt for causal language models: those here are ours, in the same manner.
"""

from __future__ import annotations

from zoengine.tasks.catalog.build import classification
from zoengine.tasks.catalog.fields import Row, text
from zoengine.tasks.entry import Hub, Masked

# Under these names the GLUE data load without code from the repository, and with label -1 in their test splits.
GLUE = "nyu-mll/glue"

_FIVE = ("terrible", "bad", "okay", "good", "great")


def _it_was(column: str):
    def prompt(row: Row) -> str:
        return f"{text(row, column).strip()} It was"

    return prompt


SST2 = classification(
    "sst2", prompt=_it_was("sentence"), options=(" terrible", " great"),
    columns=("sentence",), labels=("negative", "positive"), hub=Hub(GLUE, "sst2"),
    masked=Masked("{0} It was{mask}.", (" terrible", " great")), num_test=872,
)  # fmt: skip

SST5 = classification(
    "sst5", prompt=_it_was("text"), options=tuple(f" {word}" for word in _FIVE),
    columns=("text",), labels=("very negative", "negative", "neutral", "positive", "very positive"),
    hub=Hub("SetFit/sst5", test="test"),
    masked=Masked("{0} It was{mask}.", tuple(f" {word}" for word in _FIVE), first_limit=110),
)  # fmt: skip

MOVIE_REVIEWS = classification(
    "movie-reviews", prompt=_it_was("text"), options=(" terrible", " great"),
    columns=("text",), labels=("negative", "positive"),
    masked=Masked("{0} It was{mask}.", (" terrible", " great")), num_train=None, num_eval=None, num_test=None,
)  # fmt: skip

COLA = classification(
    "cola", prompt="{sentence} This is", options=(" incorrect", " correct"),
    columns=("sentence",), labels=("unacceptable", "acceptable"), hub=Hub(GLUE, "cola"),
    masked=Masked("{0} This is{mask}.", (" incorrect", " correct")),
)  # fmt: skip

# The data set's first home, CogComp/trec, is a loading script, which `datasets` no longer runs. This copy numbers the
# classes in an order of its own, so they are read by their codes.
TREC = classification(
    "trec",
    prompt="{text}\nDoes this question ask for an abbreviation, entity, description, human, location, or number?\n",
    options=("Abbreviation", "Entity", "Description", "Human", "Location", "Number"),
    columns=("text",), label="label_coarse_original", values=("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
    labels=("abbreviation", "entity", "description", "human", "location", "number"),
    hub=Hub("SetFit/TREC-QC", test="test"),
    masked=Masked(
        "{mask}: {0}", (" Expression", " Entity", " Description", " Human", " Location", " Number"), first_limit=110
    ),
    num_test=500,
)  # fmt: skip

ENTRIES = (SST2, SST5, COLA, TREC, MOVIE_REVIEWS)
