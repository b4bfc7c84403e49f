"""Rows of data: embedded ones, a user's files, the Hugging Face Hub; and which of them are trained on.

>>> from zoengine.data import read
>>> table = read("movie-reviews", split="train")     # 1,500 short sentences
>>> table.rows[0]["text"], table.places[0]           # a row is a dict; messages name its place

Reading text files needs Python's standard library only; Parquet, saved data sets and the Hub need
``pip install 'zoengine[data]'``.
"""

from zoengine.data.sources import EMBEDDED, read
from zoengine.data.splits import FEW_SHOT_TEST_SEED, Splits, divide, draw, few_shot, permutation, split_hash
from zoengine.data.table import DataError, Places, Table, require

__all__ = [
    "EMBEDDED", "FEW_SHOT_TEST_SEED", "DataError", "Places", "Splits", "Table", "divide", "draw",
    "few_shot", "permutation", "read", "require", "split_hash",
]  # fmt: skip
