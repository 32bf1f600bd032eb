"""Recipes: found, changed, checked and identified."""

from __future__ import annotations

import pytest
import yaml
from omegaconf import OmegaConf

import zoo.runs.config as subject
from zoo.errors import ZooError
from zoo.resources import folder
from zoo.runs.config import contents, identify, load, recipes, run_id
from zoo.runs.records import read
from zoo.runs.schema import accelerator


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe with changes by dotted key; None leaves a key out."""

    def write(**changes):
        content = contents(load("mqar"))
        del content["description"]
        tree = OmegaConf.create(content)
        for key, value in changes.items():
            section, _, last = key.replace("__", ".").rpartition(".")
            if value is None:
                del (OmegaConf.select(tree, section) if section else tree)[last]
            else:
                OmegaConf.update(tree, key.replace("__", "."), value, force_add=True)
        path = tmp_path / "own.yaml"
        path.write_text(OmegaConf.to_yaml(tree))
        return path

    return write


def test_names_are_unique_and_say_what_the_files_say():
    assert len(set(recipes())) == len(recipes())
    assert {"mqar", "bytes", "digits"} <= set(recipes())
    assert all(load(name).name == name for name in recipes())


def test_a_recipe_is_found_by_name_by_folder_and_by_path():
    by_path = load(subject.folder("recipes") / "language" / "mqar.yaml")
    assert load("mqar") == load("language/mqar") == by_path
    assert load(str(subject.folder("recipes") / "language" / "mqar.yaml")) == by_path


def test_what_comes_out_holds_every_option_of_data_and_model():
    config = load("digits_fewshot")
    assert config.data.name == "digits"  # the registered one, with the options of the YAML file
    assert config.data.few_shot == 100
    assert config.data.num_workers == 0
    assert "seed" not in config.data
    assert config.model.drop_path == 0.0
    assert not {"image_shape", "num_classes", "attention"} & set(config.model)
    assert load("mqar").model.max_len is None


def test_the_resolved_recipe_is_a_recipe_for_the_same_run(tmp_path):
    for name in ("mqar", "digits_fewshot", "bytes"):
        config = load(name, ["seed=3", "lr=1e-4"])
        path = tmp_path / "config.yaml"
        path.write_text(OmegaConf.to_yaml(config))
        assert load(path) == config
        assert identify(load(path)) == identify(config)


def test_overrides_change_values_by_full_and_by_short_name():
    config = load(
        "mqar",
        [
            *("attention=sliding_window(window=16)+rope", "seed=7", "lr=1e-3", "steps=50"),
            *("batch=8", "model.dim=48", "optim.clip=null", "optim.betas=[0.8, 0.9]"),
            *("data.test_sizes=[[48, 6]]", "model.layers.first=mha"),
        ],
    )
    assert config.attention == "sliding_window(window=16)+rope"
    assert (config.seed, config.optim.lr, config.trainer.max_steps) == (7, 1e-3, 50)
    assert (config.data.batch_size, config.model.dim, config.optim.clip) == (8, 48, None)
    assert config.optim.betas == [0.8, 0.9]
    assert config.data.test_sizes == [[48, 6]]
    assert config.model.layers == {"first": "mha"}
    small = load("mqar", ["data.name=mqar_small"]).data
    assert (small.name, small.seq_len, small.pairs, small.vocab_size) == ("mqar", 32, 4, 128)


def test_the_attention_is_brought_into_its_canonical_form():
    spellings = ["softmax+rope(base=10000.0)", "mha + rope", "rope"]
    assert len({load("mqar", [f"attention={text}"]).attention for text in spellings}) == 1
    assert len({run_id("mqar", [f"attention={text}"]) for text in spellings}) == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lrr=1"], "unknown override 'lrr'; did you mean 'lr'"),
        (["optim.lrr=1"], "unknown override 'optim.lrr'; did you mean 'optim.lr'"),
        (["model.dims=1"], "unknown override 'model.dims'; did you mean 'model.dim'"),
        (["data.pair=1"], "unknown override 'data.pair'; did you mean 'data.pairs'"),
        (["data.seed=1"], "unknown override 'data.seed'"),
        (["model.vocab_size=9"], "unknown override 'model.vocab_size'"),
        (["seeds=3"], "unknown override 'seeds'; did you mean 'seed'"),
        (["seed.x=1"], "unknown override 'seed.x'"),
        (["steps"], "must be written key=value"),
        (["=3"], "must be written key=value"),
        (["lr=1", "optim.lr=2"], "'optim.lr' is given twice"),
        (["optim.betas=[0.9"], "cannot read the value"),
        (["lr=fast"], "override: optim.lr: Value 'fast'"),
        (["steps=1.5"], "override: trainer.max_steps: Value '1.5'"),
        (["seed=null"], "override: seed:"),
        (["model.dim=wide"], "override: model.dim: Value 'wide'"),
        (["optim=3"], "unknown override 'optim'; did you mean 'optim.lr'"),
        (["lr=0"], r"optim.lr=0.0 must be a number above 0"),
        (["lr=-1"], "optim.lr"),
        (["lr=.nan"], "optim.lr=nan"),
        (["steps=0"], "trainer.max_steps=0 must be a whole number of at least 1"),
        (["trainer.eval_every=0"], "trainer.eval_every=0"),
        (["trainer.checkpoint_every=0"], "trainer.checkpoint_every=0"),
        (["trainer.max_minutes=0"], "trainer.max_minutes=0.0"),
        (["trainer.devices=0"], "trainer.devices=0"),
        (["trainer.accelerator=gpu"], "unknown trainer.accelerator 'gpu'"),
        (["trainer.precision=16"], "unknown trainer.precision '16'; did you mean"),
        (["trainer.strategy=dpp"], "unknown trainer.strategy 'dpp'; did you mean 'ddp'"),
        (["optim.schedule=cos"], "did you mean 'cosine'"),
        (["seed=-1"], "seed=-1 must be a whole number of at least 0"),
        (["seed=4294967296"], "seed=4294967296"),
        (["metrics.select=val/accurac"], "did you mean 'val/accuracy'"),
        (["metrics.select=test/accuracy"], "unknown metrics.select 'test/accuracy'"),
        (["metrics.report=test_sparse/accuracy"], "unknown metrics.report"),
        (["metrics.mode=best"], "unknown metrics.mode 'best'"),
        (["budget.seeds=0"], "budget.seeds=0"),
        (["budget.lrs=[0]"], "budget.lrs"),
        (["track=My Track"], "track='My Track' must be snake_case"),
        (["name=../mqar"], "name='../mqar' must be snake_case"),
        (["task=language"], "task='language' does not fit the data set 'mqar'"),
        (["data.name=mqra"], "unknown data set 'mqra'; did you mean 'mqar'"),
        (["model.name=decoder"], "unknown model 'decoder'; did you mean 'decoder_lm'"),
        (["data.pairs=100"], "pairs=100 must be at most"),
        (["batch=many"], "batch_size='many' must be a whole number"),
        (["attention=mhaa"], "did you mean 'mha'"),
        (["attention="], "is empty"),
        (["attention=rope+alibi"], "both fill the socket 'position'"),
        (["attention=sliding_window(windw=3)"], "did you mean 'window'"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest_that_is_right(overrides, said):
    with pytest.raises(ZooError) as caught:
        load("mqar", overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_required_option_that_is_missing_is_named(monkeypatch, tmp_path):
    real = subject.folder
    monkeypatch.setattr(subject, "folder", lambda n: tmp_path if n == "data" else real(n))
    with pytest.raises(ZooError, match=r"data.paths is missing; it has no default"):
        load("bytes", ["data={name: text_files}"])


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ZooError, match="unknown recipe 'mqra'; did you mean 'mqar'"):
        load("mqra")
    with pytest.raises(ZooError, match=r"recipe file nowhere.yaml does not exist"):
        load("nowhere.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"colour": 1}, "unknown key in recipe own.yaml 'colour'"),
        ({"optim__lrr": 1}, "unknown key in recipe own.yaml 'optim.lrr'; did you mean 'optim.lr'"),
        ({"trainer__max_steps": None}, "recipe own.yaml: trainer.max_steps is missing"),
        ({"optim__lr": None}, "recipe own.yaml: optim.lr is missing"),
        ({"optim": None}, "recipe own.yaml: optim is missing"),
        ({"track": None}, "recipe own.yaml: track is missing"),
        ({"budget": None}, "recipe own.yaml: budget.lrs is missing"),
        ({"metrics__report": None}, "recipe own.yaml: metrics.report is missing"),
        ({"data": 3}, "recipe own.yaml: data must be a mapping with a name"),
        ({"model__name": None}, "recipe own.yaml: model must be a mapping with a name"),
        ({"seed": "one"}, "recipe own.yaml: seed: Value 'one'"),
        ({"seed": "${nowhere}"}, "recipe own.yaml: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_wrong_recipe_is_named_by_its_file(recipe, changes, said):
    with pytest.raises(ZooError) as caught:
        load(recipe(**changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "just text", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ZooError, match=r"own\.yaml"):
        load(path)


def test_a_comment_on_a_run_does_not_change_it_and_everything_else_does():
    base = identify(load("mqar"))
    for change in ("budget.seeds=9", "description=other"):
        assert identify(load("mqar", [change])) == base
    different = [
        *("seed=1", "lr=5e-4", "attention=rope", "steps=10", "model.dim=16", "data.pairs=2"),
        *(
            "model.conv=0",
            "trainer.eval_every=7",
            "metrics.solved=0.5",
            "trainer.precision=64-true",
        ),
    ]
    ids = {run_id("mqar", [change]) for change in different}
    assert len(ids) == len(different)
    assert base.id not in ids


def test_what_two_runs_of_one_table_share():
    group = identify(load("mqar")).group
    same = ["seed=1", "lr=5e-4", "attention=rope", "trainer.checkpoint_every=5"]
    same += ["data.num_workers=1", "data.eval_batch_size=8"]
    for change in same:
        assert identify(load("mqar", [change])).group == group
    for change in ("steps=10", "model.conv=0", "data.pairs=2", "optim.clip=null", "batch=16"):
        assert identify(load("mqar", [change])).group != group


def test_options_that_came_later_leave_the_published_records_their_ids():
    found = [read(path) for path in sorted((folder("data") / "runs").glob("*.json"))]
    assert len(found) > 50
    for record in found:
        now = [f"attention={record.attention}", f"seed={record.seed}", f"lr={record.lr}"]
        now += [f"steps={record.config['trainer']['max_steps']}"]
        assert identify(load(record.recipe, now)).id == record.id
    bytes_ = run_id("bytes")
    assert run_id("bytes", ["model.head_dim=null", "data.test_lengths=[]"]) == bytes_
    assert run_id("bytes", ["model.head_dim=8"]) != bytes_
    assert run_id("bytes", ["data.test_lengths=[64]"]) != bytes_


def test_a_run_is_named_by_recipe_attention_seed_and_hash():
    name = run_id("mqar", ["attention=sliding_window(window=16)+rope(base=500)", "seed=4"])
    assert name.startswith("mqar-sliding_window-window-16-rope-base-500-s4-")
    assert name.endswith(
        identify(
            load("mqar", ["seed=4", "attention=rope(base=500) + sliding_window(window=16)"])
        ).config_hash[:8]
    )
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-")


def test_the_hash_does_not_depend_on_the_spelling_of_numbers(recipe):
    assert (
        run_id("mqar", ["lr=0.001"]) == run_id("mqar", ["lr=1.0e-3"]) == run_id("mqar", ["lr=1e-3"])
    )
    assert run_id("mqar", ["model.mlp=2"]) == run_id("mqar", ["model.mlp=2.0"])


def test_data_files_are_checked(tmp_path, monkeypatch):
    (tmp_path / "some").mkdir()
    content = {"name": "mqar", "options": {"pairz": 3}}
    (tmp_path / "some" / "wrong.yaml").write_text(yaml.safe_dump(content))
    real = subject.folder
    monkeypatch.setattr(subject, "folder", lambda n: tmp_path if n == "data" else real(n))
    with pytest.raises(ZooError, match=r"option in wrong.yaml 'pairz'; did you mean 'pairs'"):
        load("mqar", ["data.name=wrong"])


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert accelerator("auto") == accelerator("cpu") == "cpu"
    with pytest.raises(ZooError, match=r"accelerator='cuda': this machine has none; it has cpu"):
        accelerator("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert accelerator("auto") == accelerator("cuda") == "cuda"


def test_a_file_that_was_read_is_read_again_once_it_changes(tmp_path):
    path = tmp_path / "mine.yaml"
    text = (subject.folder("recipes") / "language" / "mqar.yaml").read_text(encoding="utf-8")
    path.write_text(text)
    first = load(path)
    first.model.dim = 7  # what was handed out is the caller's own
    again = load(path)
    assert again.model.dim != 7
    path.write_text(text.replace("seed: 0", "seed: 9"))
    assert load(path).seed == 9
    path.unlink()
    with pytest.raises(ZooError, match="does not exist"):
        load(path)
