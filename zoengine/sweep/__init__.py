"""A run for every combination of some values: ``zoengine sweep``. Needs the extra ``hf``.

The folders of the runs are all the state there is. A library that keeps trials in a database (Optuna and its like) was
not taken: a grid proposes nothing, and what has to be robust, resuming inside a run, is in its checkpoints already; a
database beside them could only disagree with them.
"""
