"""Publishing what a run saved on the Hugging Face Hub."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from zoengine.models import minilm, smollm2
from zoengine.models.errors import ModelError

_SHIPPED = {smollm2.NAME: smollm2.HUB_ID, minilm.NAME: minilm.HUB_ID}
# The base is that of the HTTP library's own errors, whichever library this release of huggingface_hub uses.
_FAILURES = (HfHubHTTPError.__base__, HFValidationError, OSError)


def hub_id(name_or_path: str | Path) -> str | None:
    """The Hub's name of a model as :func:`zoengine.models.load` takes it; None for a folder."""
    name = str(name_or_path)
    if name in _SHIPPED:
        return _SHIPPED[name]
    part = r"[A-Za-z0-9][\w.-]*"
    return None if Path(name).exists() or not re.fullmatch(f"{part}(/{part})?", name) else name


def create_repo(repo_id: str, *, private: bool | None = None) -> str:
    """Make the repository unless it is there, before hours of training, and return its full name, owner/name.

    Args:
        repo_id: "owner/name", or "name" in the account that is logged in.
        private: of a repository that is made now; None leaves it to the account's own setting.

    Raises:
        ModelError: nobody is logged in, the name cannot be used, or the Hub cannot be reached.
    """
    try:
        return HfApi().create_repo(repo_id, private=private, exist_ok=True).repo_id
    except _FAILURES as error:
        raise ModelError(
            f"cannot make {repo_id!r} on the Hub ({_line(error)}); log in with `hf auth login` and give a name that "
            "you may write to, or leave push_to_hub out"
        ) from error


def upload(folder: str | Path, repo_id: str, *, base_model: str | None = None) -> str:
    """Upload what :func:`zoengine.models.save` wrote, in one commit, and return the commit's address.

    Args:
        base_model: as ``load`` took it. An adapter's configuration names its base by this name on the Hub, not by the
            folder it was read from here.

    Raises:
        ModelError: the upload failed; the message has the command to try again.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            place = folder if base_model is None else _portable(folder, base_model, Path(scratch) / "model")
            return str(HfApi().upload_folder(repo_id=repo_id, folder_path=place, commit_message="End of training"))
        except _FAILURES as error:
            raise ModelError(
                f"the upload to {repo_id!r} failed ({_line(error)}); the model is whole in {folder}, upload it with: "
                f"hf upload {repo_id} {folder}"
            ) from error


def _portable(folder: Path, base_model: str, scratch: Path) -> Path:
    """``folder``, or a copy of an adapter's, which is small, whose configuration names no folder of this machine."""
    settings = folder / "adapter_config.json"
    if not settings.is_file():
        return folder
    values = json.loads(settings.read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = hub_id(base_model) or Path(base_model).name
    shutil.copytree(folder, scratch)
    (scratch / settings.name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return scratch


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
