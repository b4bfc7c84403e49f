"""What a run leaves behind: a folder that other tools load, its model card, and its place on the Hub (mocked)."""

import json
import re
import shutil
from typing import ClassVar

import pytest
import torch
import yaml

pytest.importorskip("transformers")
pytest.importorskip("peft")

import huggingface_hub
import peft
import transformers

from zoengine.methods import create
from zoengine.models import ModelError, create_repo, hub_id, load, model_card, save, upload, write_card

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])


@pytest.fixture(scope="module")
def base(tiny_run, tmp_path_factory):
    """The tiny Llama, whose configuration has no pad token, with a tokenizer that has one."""
    folder = tmp_path_factory.mktemp("publishing") / "model"
    shutil.copytree(tiny_run["model"]["path"], folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token = "."
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def facts(**fields):
    return {
        "zoengine": "0.1.0", "noise_version": 1, "packages": {"torch": "2.13.0", "peft": "0.21"}, "device": "a CPU",
        "dtype": "float32", "backend": "cpp", "trainable_parameters": 12345,
        "splits": {"eval": {"n": 8, "hash": "abc123"}, "test": {"n": 9, "hash": "def456"}}, **fields,
    }  # fmt: skip


def card(base, tuning="lora", head="lm", **fields):
    values = {
        "config": {
            "model": {"path": str(base), "dtype": "float32"}, "data": {"train": "/home/me/secret/train.jsonl"},
            "tuning": {"kind": tuning}, "method": {"name": "mezo", "lr": 1e-6}, "task": {"name": "sst2"},
            "run": {"output_dir": "/home/me/secret/run", "seed": 3, "steps": 10},
        },
        "head": head, "facts": facts(), "steps": 10, "forward_passes": 20, "backward_passes": 0, "seconds": 12.3,
        "scores": [
            {"kind": "eval", "split": "eval", "step": 0, "forward_passes": 0, "accuracy": 0.5, "loss": 0.7, "n": 8},
            {"kind": "eval", "split": "test", "step": 0, "forward_passes": 0, "accuracy": 0.25, "loss": 0.8, "n": 9},
            {"kind": "eval", "split": "eval", "step": 5, "forward_passes": 10, "accuracy": 0.6, "loss": 0.6, "n": 8},
            {"kind": "eval", "split": "eval", "step": 10, "forward_passes": 20, "accuracy": 0.875, "loss": 0.5, "n": 8},
            {"kind": "eval", "split": "test", "step": 10, "forward_passes": 20, "accuracy": 0.75, "loss": 0.4, "n": 9},
        ],
        "command": "zoengine train my.yaml", "name": "my-run", "location": "me/my-run",
    }  # fmt: skip
    return model_card(**{**values, **fields})


# --- a saved folder, in other tools -----------------------------------------------------------------------------------

LOADERS = {
    "lm": transformers.AutoModelForCausalLM,
    2: transformers.AutoModelForSequenceClassification,
    "none": transformers.AutoModel,
}


@pytest.mark.parametrize("tuning", ["full", "subset", "lora", "prefix"])
@pytest.mark.parametrize("head", ["lm", 2, "none"])
def test_a_trained_folder_loads_in_plain_transformers_and_peft(base, tuning, head, tmp_path):
    """After steps in the arena. What loads it knows nothing of zoengine. Masked models: tests/test_tuning.py."""
    how = {"tuning": tuning, "parameters": "mlp", "dtype": "float32", "head": head}
    model, tokenizer = load(base, **how)
    pad = tokenizer.pad_token_id
    optimizer = create("mezo", model, lr=1e-2, zo_eps=1e-2)

    def output(outputs):
        return outputs.last_hidden_state if head == "none" else outputs.logits

    for _ in range(3):
        optimizer.step(lambda: output(model(input_ids=IDS)).square().mean())
    out = save(model, tokenizer, tmp_path / "model")
    write_card(out, card(base, tuning, head))
    settings = {"num_labels": head} if isinstance(head, int) else {}
    if tuning in ("lora", "prefix"):
        assert not list(out.glob("model*.safetensors"))
        plain = LOADERS[head].from_pretrained(base, dtype=torch.float32, **settings)
        plain.config.pad_token_id = pad
        untouched = output(plain.eval()(input_ids=IDS))
        again = peft.PeftModel.from_pretrained(plain, out)
        assert not torch.equal(output(again.eval()(input_ids=IDS)), untouched)
    else:
        again = LOADERS[head].from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        found, expected = (output(m.eval()(input_ids=IDS)) for m in (again, model))
    torch.testing.assert_close(found, expected)
    assert transformers.AutoTokenizer.from_pretrained(out)("film")["input_ids"]
    assert "# my-run" in (out / "README.md").read_text()


@pytest.mark.parametrize("tuning", ["full", "lora", "prefix"])
def test_lm_eval_scores_a_saved_run(base, tuning, tmp_path):
    """Log-likelihoods of lm-eval's own Hugging Face model are ours. Under an adapter it cuts a vocabulary that is
    longer than the tokenizer's, so here it is not."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    plain, tokenizer = load(base, dtype="float32")
    plain.resize_token_embeddings(len(tokenizer))
    base = str(save(plain, tokenizer, tmp_path / "base"))
    model, _ = load(base, tuning=tuning, dtype="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    out = save(model, tokenizer, tmp_path / "model")
    where = {"pretrained": str(out)} if tuning == "full" else {"pretrained": base, "peft": str(out)}
    scorer = HFLM(**where, tokenizer=str(out), device="cpu", dtype="float32", batch_size=1)
    pairs = [("a fine film", " it was good"), ("it was", " bad")]
    found = scorer.loglikelihood([Instance("loglikelihood", {}, pair, k) for k, pair in enumerate(pairs)])
    for (context, continuation), (score, _) in zip(pairs, found, strict=True):
        ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
        start = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            logp = model(input_ids=ids).logits.log_softmax(-1)
        expected = sum(logp[0, k - 1, ids[0, k]].item() for k in range(start, ids.shape[1]))
        assert score == pytest.approx(expected, abs=1e-4)


# --- the card ---------------------------------------------------------------------------------------------------------


def parts(text):
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_front_matter(base):
    """The keys the Hub reads, of the types it takes; no license is made up, no folder given for a name."""
    front, _ = parts(card("facebook/opt-125m"))
    assert front == {
        "base_model": "facebook/opt-125m", "base_model_relation": "adapter", "library_name": "peft",
        "pipeline_tag": "text-generation", "tags": ["zoengine", "zeroth-order", "mezo", "lora"],
    }  # fmt: skip
    local, _ = parts(card(base, "full", "masked-lm"))
    assert local == {
        "library_name": "transformers", "pipeline_tag": "fill-mask",
        "tags": ["zoengine", "zeroth-order", "mezo", "full"],
    }  # fmt: skip
    first, body = parts(card("minilm-l6", "subset", 3, backward_passes=20))
    assert first["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert first["pipeline_tag"] == "text-classification" and "zeroth-order" not in first["tags"]
    assert "with backpropagation" in body and "20 forward passes and 20 backward passes" in body
    parsed = huggingface_hub.ModelCard(card("facebook/opt-125m"))
    assert parsed.data.base_model == "facebook/opt-125m" and parsed.data.license is None


def test_what_the_card_says(base):
    _, body = parts(card(base))
    for line in (
        "# my-run",
        "| eval | 8 | abc123 | accuracy | 0.5000 | 0.8750 |",
        "| eval | 8 | abc123 | loss | 0.7000 | 0.5000 |",
        "| test | 9 | def456 | accuracy | 0.2500 | 0.7500 |",
        "| method | mezo |",
        "| tuning | lora, 12,345 trained parameters |",
        "| steps | 10, 20 forward passes, 12 s |",
        "| seed | 3 |",
        "| versions | zoengine 0.1.0, torch 2.13.0, peft 0.21 |",
        "zoengine train my.yaml",
        "  lr: 1.0e-06",
    ):
        assert line in body.splitlines(), line
    assert "secret" not in body and "/home" not in body and str(base) not in body, "nothing of this machine's folders"
    assert body.count("```") % 2 == 0


def test_nothing_measured_and_no_command(base):
    _, body = parts(card(base, scores=[], command=""))
    assert "Nothing was measured." in body and "Its settings:" in body and "started with" not in body


def test_text_cannot_leave_its_block(base):
    _, body = parts(card(base, command="zoengine train a.yaml task.prompt='```x``` | y'"))
    assert "\n````bash\nzoengine train a.yaml task.prompt='```x``` | y'\n````\n" in body
    _, body = parts(card(base, facts=facts(device="odd | name")))
    assert "| device | odd \\| name, kernels: cpp |" in body


@pytest.mark.parametrize("tuning", ["full", "lora", "prefix"])
@pytest.mark.parametrize("head", ["lm", 2])
def test_the_code_on_the_card_runs(base, tuning, head, tmp_path):
    model, tokenizer = load(base, tuning=tuning, head=head, dtype="float32")
    out = save(model, tokenizer, tmp_path / "model")
    _, body = parts(card(base, tuning, head, location=str(out)))
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)[1].replace('"model"', f'"{base}"')
    found = {}
    exec(code, found)
    torch.testing.assert_close(logits(found["model"].eval()), logits(model))
    assert found["tokenizer"]("film")["input_ids"] == tokenizer("film")["input_ids"]


# --- the Hub ----------------------------------------------------------------------------------------------------------


class Api:
    """Stands for huggingface_hub.HfApi: remembers what is asked of it, and the files of an upload."""

    calls: ClassVar[list] = []
    fails: ClassVar[Exception | None] = None

    def create_repo(self, repo_id, **fields):
        if self.fails:
            raise self.fails
        self.calls.append(("create", repo_id, fields))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else 'me/' + repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **fields):
        if self.fails:
            raise self.fails
        files = {p.name: p.read_bytes() for p in sorted(folder_path.iterdir())}
        self.calls.append(("upload", repo_id, files))
        return f"https://huggingface.co/{repo_id}/commit/1"


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr("zoengine.models.hub.HfApi", Api)
    monkeypatch.setattr(Api, "calls", [])
    monkeypatch.setattr(Api, "fails", None)
    return Api


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_upload(api, base, tuning, tmp_path):
    """All files and the card in one commit; an adapter names its base as the Hub does, the folder stays as it was."""
    assert create_repo("my-run") == "me/my-run"
    out = save(*load(base, tuning=tuning, dtype="float32"), tmp_path / "model")
    write_card(out, card("smollm2-135m", tuning))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert upload(out, "me/my-run", base_model="smollm2-135m").endswith("/me/my-run/commit/1")
    (_, name, asked), (_, repo, files) = api.calls
    assert (name, asked) == ("my-run", {"private": None, "exist_ok": True}) and repo == "me/my-run"
    assert files.keys() == before.keys() and files["README.md"].startswith(b"---\n")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    if tuning == "lora":
        published, here = (json.loads(f["adapter_config.json"]) for f in (files, before))
        assert published.pop("base_model_name_or_path") == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert here.pop("base_model_name_or_path") == base and published == here
        assert json.loads(uploaded_base(api, out, base))["base_model_name_or_path"] == "model"
    else:
        assert files == before


def uploaded_base(api, out, base):
    upload(out, "me/my-run", base_model=base)
    return api.calls[-1][2]["adapter_config.json"]


def test_the_hub_says_no(api, base, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "fails", huggingface_hub.errors.LocalTokenNotFoundError("Token is required\nmore"))
    with pytest.raises(ModelError, match=r"cannot make 'me/x' on the Hub \(Token is required\); log in with `hf auth"):
        create_repo("me/x")
    out = save(*load(base, dtype="float32"), tmp_path / "model")
    with pytest.raises(ModelError, match=f"the model is whole in {out}, upload it with: hf upload me/x {out}"):
        upload(out, "me/x")


def test_a_name_the_hub_does_not_take():
    """Found out here, by huggingface_hub itself, without a connection."""
    with pytest.raises(ModelError, match="cannot make 'a/b/c'"):
        create_repo("a/b/c")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("facebook/opt-125m", "facebook/opt-125m"), ("gpt2", "gpt2"), ("./here", None), ("a/b/c", None), ("../x", None),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("~/models/x", None), ("/abs", None),
    ],
)  # fmt: skip
def test_names_on_the_hub(given, expected):
    assert hub_id(given) == expected


def test_a_folder_of_a_name_is_the_folder(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_id("gpt2") is None
