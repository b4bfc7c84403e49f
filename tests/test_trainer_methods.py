"""Every method as a run: checkpoints hold all of its state without pickle; resumed, it ends with the same bits."""

import copy
import shutil

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file

from zoengine import config, methods
from zoengine.trainer import run as runs

# What a method needs beyond its learning rate, with intervals that a run of six steps crosses.
FIELDS = {
    "mezo-svrg": {"lr_full": 1e-3, "svrg_q": 4},
    "mezo-adam": {"moments": "recomputed"},
    "zo-adamu": {"adamu_schedule": "anneal"},
    "lozo": {"step_interval": 2},
    "lozo-m": {"step_interval": 2},
    "subzero": {"rank": 4, "update_interval": 4},
    "subzero-gv": {"rank": 4},
    "subzero-greedy": {"rank": 4},
    "sparse-mezo": {"mask_interval": 4},
    "hizoo": {"hessian_smooth": 1e-3},
    "mezo-gv": {"gv_history": True},
    "rozo-m": {"step_interval": 2},
}


@pytest.mark.parametrize("name", methods.available())
@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_ends_with_the_same_bits(name, tiny_run, tmp_path):
    values = copy.deepcopy(tiny_run)
    values["method"] = {"name": name, "lr": 1e-2, **FIELDS.get(name, {})}
    values["tuning"] = {"kind": "lora", "lora_r": 4} if name.startswith("rozo") else {"kind": "full"}
    values["run"] |= {"output_dir": str(tmp_path / "run"), "steps": 6, "save_every": 3}
    settings = config.check(values)
    whole = runs.train(settings)
    final = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    (tmp_path / "run" / "result.json").unlink()
    again = runs.train(settings, resume=True)
    assert again.forward_passes == whole.forward_passes
    resumed = weights(tmp_path / "run")
    assert final.keys() == resumed.keys()
    assert all(torch.equal(final[key], resumed[key]) for key in final)
    assert any(not torch.equal(final[key], value) for key, value in weights(tmp_path / "run", 3).items())
    assert not list((tmp_path / "run").rglob("*.pt")) + list((tmp_path / "run").rglob("*.bin"))


def weights(folder, checkpoint=6):
    (file,) = (folder / f"checkpoint-{checkpoint}").glob("*model.safetensors")
    return load_file(file)
