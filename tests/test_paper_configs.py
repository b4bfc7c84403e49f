"""configs/papers: every row is a valid run, and takes two steps on a tiny random model of its architecture."""

import gc
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers

from zoengine import config, methods
from zoengine.config import ConfigError
from zoengine.meta import config as meta
from zoengine.sweep import grid
from zoengine.tasks import catalog
from zoengine.trainer.build import load_model, read_splits, task_builder
from zoengine.trainer.run import build_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
PAPERS = ROOT / "configs" / "papers"
META = "zoft_t1_meta"
FILES = sorted(path.stem for path in PAPERS.glob("*.yaml") if path.stem != META)
# By the last part of model.path: what it is a tiny version of.
KINDS = {"opt": "opt", "llama": "llama", "meta-llama": "llama", "qwen": "qwen2", "roberta": "roberta",
         "distilbert": "distilbert", "gpt2": "gpt2", "cydonia": "mistral"}  # fmt: skip
LABEL_WORDS = (
    " terrible", " bad", " okay", " good", " great", " Yes", " No", " Maybe", " incorrect", " correct", " Description",
    " Entity", " Expression", " Human", " Location", " Number",
)  # fmt: skip
HELD = ["model.dtype=float32", "model.device=cpu", "task.max_length=96", "run.steps=2", "run.batch_size=2"]
SMALL = ["data.num_train=4", "data.num_eval=1", *HELD]


def path_of(name):
    return PAPERS / f"{name}.yaml"


def rows_of(name):
    """As the command line lists them."""
    with pytest.raises(ConfigError, match="--row NAME: ") as caught:
        config.read(path_of(name), [], config.Config)
    return str(caught.value).rpartition("NAME: ")[2].split(", ")


def comment(name):
    lines = path_of(name).read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#").strip() for line in lines if line.startswith("#")]


def tasks_of(name):
    """The tasks that the file's comment lists."""
    listed = re.search(r"Tasks: ([a-z0-9, ]+)[.;,]", " ".join(comment(name)))
    return listed[1].split(", ") if listed else []


UNTRAINED = "untrained"
ROWS = {name: [row for row in rows_of(name) if row != UNTRAINED] for name in FILES}
PLANS = {}


def plan_of(name, row):
    if (name, row) not in PLANS:
        PLANS[name, row] = grid.load(path_of(name), row=row)
    return PLANS[name, row]


def first_of(name, row):
    return plan_of(name, row).points[0].config


def kind_of(path):
    return next(KINDS[start] for start in KINDS if path.rpartition("/")[2].lower().startswith(start))


def different():
    """The rows that differ in more than figures: what makes no other run of two steps is run once."""
    figures = {"lr", "zo_eps", "weight_decay", "seed", "steps", "beta1", "beta2", "damping", "lr_full", "zoft_file"}
    found = {}
    for name in FILES:
        for row in ROWS[name]:
            c = first_of(name, row)
            method = tuple(sorted((k, str(v)) for k, v in c.method.items() if k not in figures))
            what = (kind_of(c.model.path), c.task.form, c.tuning.kind, c.run.lr_scheduler, method)
            found.setdefault(what, (name, row))
    return list(found.values())


def byte_level(folder, **tokens):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=list(dict.fromkeys(tokens.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator([f"a{word}" for word in LABEL_WORDS] * 50, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **tokens).save_pretrained(folder)


def tiny(kind, folder):
    """A model of this architecture with random weights, and a tokenizer, in the folder."""
    common = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    gated = {**common, "intermediate_size": 48, "num_key_value_heads": 2}
    made = {
        "opt": lambda: transformers.OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=32),
        "llama": lambda: transformers.LlamaConfig(**gated),
        "qwen2": lambda: transformers.Qwen2Config(**gated),
        "mistral": lambda: transformers.MistralConfig(**gated),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4),
        "roberta": lambda: transformers.RobertaConfig(
            **common, intermediate_size=48, pad_token_id=1, max_position_embeddings=200
        ),
        "distilbert": lambda: transformers.DistilBertConfig(
            vocab_size=512, dim=32, hidden_dim=48, n_layers=2, n_heads=4
        ),
    }[kind]()
    torch.manual_seed(0)
    encoder = kind in ("roberta", "distilbert")
    loader = transformers.AutoModelForMaskedLM if encoder else transformers.AutoModelForCausalLM
    loader.from_config(made).save_pretrained(folder)
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    of_encoders = {"pad_token": "<pad>", "mask_token": "<mask>", "sep_token": "</s>", "cls_token": "<s>"}
    byte_level(folder, **ends, **(of_encoders if encoder else {}))


@pytest.fixture(scope="module", autouse=True)
def imported_for_good():
    """accelerate collects garbage before every run: let it not go through all that has been imported each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def of(path):
        kind = kind_of(path)
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny(kind, made[kind])
        return str(made[kind])

    return of


def two_steps(settings, values, folder):
    """Train as `settings` say, with other `values`; returns the trainer."""
    small = config.check(config.config_files.overridden(settings.model_dump(), values))
    splits = read_splits(small)
    model, tokenizer = load_model(small, "cpu")
    task = task_builder(small)(tokenizer, model)
    encoded = {part: task.dataset(examples) for part, examples in splits.items()}
    trainer = build_trainer(small, folder, model, tokenizer, task, encoded)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    assert trainer.train().global_step == 2
    after = [p for p in model.parameters() if p.requires_grad]
    return trainer, any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def tiny_values(settings, models, task=None):
    """Overrides that make a run of a paper one on a tiny model and the rows of the tests."""
    name = task or settings.task.name
    few = [f"data.k_shot={1 if name in ('trec', 'sst5') else 2}"] if settings.data.k_shot else []
    source = Path(__file__).parent / "rows" / f"{name}.jsonl"
    networks = ["method.zoft_file=''"] if settings.method["name"] == "zo-finetuner" else []
    schedule = ["method.steps=2"] if "steps" in settings.method else []
    schedule += ["method.rank=4"] if settings.method.get("rank", 0) > 4 else []
    return [f"model.path={models(settings.model.path)}", f"task.name={name}", f"data.train={source}",
            *few, *networks, *schedule, *SMALL, "run.eval_every=0", "run.save_every=0"]  # fmt: skip


@pytest.mark.parametrize(("name", "row"), different())
def test_a_row_takes_two_steps(name, row, models, tmp_path):
    settings = first_of(name, row)
    trainer, moved = two_steps(settings, tiny_values(settings, models), tmp_path)
    assert moved and math.isfinite(trainer.zo.last_loss)
    assert isinstance(trainer.zo, methods.get(settings.method["name"]))


@pytest.mark.parametrize("name", FILES)
def test_every_point_of_every_row_is_a_run_of_its_own(name):
    folders = []
    for row in ROWS[name]:
        plan = plan_of(name, row)
        assert all(point.config.method["name"] == plan.points[0].config.method["name"] for point in plan.points)
        folders += [point.config.run.output_dir for point in plan.points]
        assert folders[-1].startswith(f"runs/papers/{re.sub('_(roberta|opt)$', '', name)}/") or name == "mezo_opt"
    assert len(set(folders)) == len(folders) and not any("{" in folder for folder in folders)


def listed_tasks():
    found = {}
    for name in FILES:
        for task in tasks_of(name):
            found.setdefault((first_of(name, ROWS[name][0]).task.form, task), (name, ROWS[name][0]))
    return [(task, *place) for (_, task), place in sorted(found.items())]


@pytest.mark.parametrize(("task", "name", "row"), listed_tasks())
def test_the_tasks_that_the_comments_list(task, name, row, models, tmp_path):
    settings = first_of(name, row)
    trainer, moved = two_steps(settings, tiny_values(settings, models, task), tmp_path)
    assert moved and trainer.zo.forward_passes > 0
    assert task in catalog.names()


@pytest.mark.parametrize("name", [name for name in FILES if UNTRAINED in rows_of(name)])
def test_the_untrained_model_is_measured_and_never_swept(name):
    assert config.load(path_of(name), row=UNTRAINED).method["lr"] == 0.0
    with pytest.raises(ConfigError, match="has no sweep"):
        grid.load(path_of(name), row=UNTRAINED)


@pytest.mark.parametrize("name", [*FILES, META])
def test_the_commands_in_the_comments(name):
    commands = [shlex.split(line) for line in comment(name) if line.startswith("zoengine ")]
    assert commands, "one line that does it"
    for _, command, path, *rest in commands:
        row = rest[rest.index("--row") + 1] if "--row" in rest else None
        values = [part for part in rest if "=" in part]
        if command == "meta-train":
            assert meta.load(ROOT / path, values).model.path
        elif command == "sweep":
            assert grid.load(ROOT / path, values, row).points
        else:
            assert (command, config.load(ROOT / path, values, row).run.seed) == ("eval", 0)


def test_settings_that_the_papers_state():
    """A few of each table, written out a second time."""
    gv = plan_of("gv_t1", "gv-lora").points
    assert {(p.config.method["lr"], p.config.method["gv_m"]) for p in gv} == {
        (lr, m) for lr in (3e-5, 5e-5, 1e-4) for m in (4, 8, 12)
    }
    assert {(p.config.run.steps, p.config.run.batch_size, p.config.method["zo_eps"]) for p in gv} == {(10000, 16, 0.01)}
    cone = plan_of("con_t1", "conmezo").points
    assert [p.config.run.seed for p in cone] == [13, 21, 42, 87, 100]
    fields = cone[0].config.method
    assert (fields["lr"], fields["cone_theta"], fields["cone_beta"], fields["steps"]) == (1e-6, 1.35, 0.99, 10000)
    assert cone[0].config.data.k_shot == 512 and cone[0].config.run.batch_size == 64
    loren = {name: first_of(name, "loren") for name in FILES if name.startswith("loren")}
    assert {name: (c.method["lr"], c.method["damping"], c.run.steps) for name, c in loren.items()} == {
        "loren_t2": (1e-5, 0.01, 24000), "loren_t2_roberta": (5e-6, 0.1, 20000), "loren_t3a": (1e-5, 0.1, 8000),
        "loren_t3a_opt": (5e-7, 0.1, 8000), "loren_t3b": (5e-7, 0.1, 4000),
    }  # fmt: skip
    assert {c.method["n_queries"] for c in loren.values()} == {6}
    for name in loren:
        for row in ("mezo", "mezo-adam", "lozo"):
            used = dict(first_of(name, row).method)
            kind = methods.get(used.pop("name"))
            assert kind.forwards_per_step(kind.Fields(**used)) == 6
    prefix = first_of("mezo_opt", "mezo-prefix")
    assert (prefix.tuning.kind, prefix.tuning.prefix_tokens, prefix.method["zo_eps"]) == ("prefix", 5, 0.1)
    assert [p.values["method.lr"] for p in plan_of("mezo_opt", "mezo").points] == [1e-6, 1e-7]
    lora = first_of("mezo_rob", "mezo-lora")
    assert (lora.method["weight_decay"], lora.tuning.lora_target_modules) == (0.1, ["query", "value"])
    zoft = plan_of("zoft_t1", "zo-finetuner").points
    assert [p.config.method["lr"] for p in zoft] == [1e-6, 1e-7, 1e-8]
    learnt = meta.load(path_of(META)).run.output_dir
    assert zoft[0].config.method["zoft_file"] == f"{learnt}/networks.safetensors"
    assert learnt == "runs/papers/zoft_t1/networks/Llama-3.2-1B"
    rozo = plan_of("rozo_t1", "rozo-m").points
    assert {p.config.run.seed for p in rozo} == {13, 21, 42} and rozo[0].config.method["beta1"] == 0.9
