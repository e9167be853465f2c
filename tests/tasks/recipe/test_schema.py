"""Recipes load, count their parameters as the trainer allocates them, and name themselves by content."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cost.errors import UserError
from tasks.data.corpus import fingerprint
from tasks.recipe.load import RECIPE_FOLDER, RecipeSummary, list_recipes, load_recipe, recipe_from_json
from tasks.recipe.schema import Recipe

NAMES = sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_named_like_its_file_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert 20 < len(recipe.description) < 110


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_counted_as_the_trainer_allocates_them(name: str) -> None:
    torch = pytest.importorskip("torch")
    from trainer.model.transformer import Transformer

    recipe = load_recipe(name)
    with torch.device("meta"):
        model = Transformer(recipe.model)
    assert recipe.num_params() == sum(parameter.numel() for parameter in model.parameters())


def test_tinyllama_has_the_published_number_of_parameters() -> None:
    assert load_recipe("tinyllama-1.1b").num_params() == 1_100_048_384


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("gpt2-124m", 118e6, 130e6), ("350m", 335e6, 365e6), ("1.5b", 1.45e9, 1.6e9), ("3b", 2.9e9, 3.2e9)],
)
def test_a_recipe_has_the_size_in_its_name(name: str, least: float, most: float) -> None:
    assert least < load_recipe(name).num_params() < most


def test_the_demo_stays_on_this_machine() -> None:
    demo = load_recipe("demo")
    assert demo.backend == "local"
    assert demo.data.corpus == "stdlib"
    assert demo.data.weights == {"text": 0.7, "code": 0.3}


def test_recipes_are_listed_smallest_first_with_their_numbers() -> None:
    lines = list_recipes()
    assert [line.name for line in lines] == ["demo", "gpt2-124m", "350m", "tinyllama-1.1b", "1.5b", "3b"]
    demo = load_recipe("demo")
    assert lines[0] == RecipeSummary("demo", demo.description, demo.num_params(), demo.num_tokens())


def test_steps_times_batch_times_sequence_is_the_number_of_tokens() -> None:
    recipe = load_recipe("demo", ["training.num_steps=10", "training.global_batch_size=32"])
    assert recipe.num_steps() == 10
    assert recipe.num_tokens() == 10 * 32 * 128
    assert recipe.workload().num_tokens == 10 * 32 * 128
    assert recipe.workload().num_params == recipe.num_params()


def test_a_number_of_tokens_is_rounded_up_to_whole_steps() -> None:
    assert load_recipe("demo", [f"training.num_tokens={4096 * 3}"]).num_steps() == 3
    assert load_recipe("demo", [f"training.num_tokens={4096 * 3 + 1}"]).num_steps() == 4


def test_tokens_per_param_times_parameters_is_the_number_of_tokens() -> None:
    recipe = load_recipe("demo", ["training.tokens_per_param=2"])
    assert 0 <= recipe.num_tokens() - 2 * recipe.num_params() < 4096


def test_an_override_of_the_length_replaces_the_length_of_the_file() -> None:
    recipe = load_recipe("tinyllama-1.1b", ["training.num_steps=7"])
    assert recipe.training.tokens_per_param is None
    assert recipe.num_steps() == 7


def test_overrides_are_yaml() -> None:
    recipe = load_recipe(
        "demo",
        [
            "model.num_layers=2",
            "optimizer.learning_rate=3e-4",
            "training.num_tokens=1e6",
            "optimizer.betas=[0.8, 0.99]",
            "offers.clouds=[aws, gcp]",
            "offers.spot=true",
            "checkpoint.interval_seconds=null",
            "data.weights.text=0.5",
            "local.market=hazard:0.5",
            "backend=null",
            "description=a = b",
            "budget_usd=12.34",
        ],
    )
    assert recipe.model.num_layers == 2
    assert recipe.optimizer.learning_rate == 3e-4
    assert recipe.training.num_tokens == 1_000_000
    assert recipe.optimizer.betas == (0.8, 0.99)
    assert recipe.offers.clouds == ("aws", "gcp")
    assert recipe.offers.spot is True
    assert recipe.checkpoint.interval_seconds is None
    assert recipe.data.weights == {"text": 0.5, "code": 0.3}
    assert recipe.local.market == "hazard:0.5"
    assert recipe.backend is None
    assert str(recipe.budget_usd) == "12.34"


def test_the_train_config_says_what_the_recipe_says() -> None:
    recipe = load_recipe("demo", ["training.num_steps=10", "precision=fp32", "seed=5", "checkpoint.every_steps=4"])
    config = recipe.train_config()
    assert config.model == recipe.model
    assert config.optimizer == recipe.optimizer
    assert (config.num_steps, config.precision, config.seed) == (10, "fp32", 5)
    assert (config.checkpoint.every_steps, config.checkpoint.keep_last) == (4, 3)
    assert config.checkpoint.milestone_every_steps is None
    kept = load_recipe("demo", ["precision=bf16", "checkpoint.milestone_every_steps=50"]).train_config().checkpoint
    assert kept.milestone_every_steps == 50
    assert (config.batch.global_batch_size, config.batch.micro_batch_size) == (32, recipe.training.micro_batch_size)


def test_the_recipes_checkpoint_interval_comes_before_the_planned_one() -> None:
    fixed = load_recipe("demo", ["precision=bf16", "checkpoint.interval_seconds=7"])
    planned = load_recipe("demo", ["precision=bf16", "checkpoint.interval_seconds=null"])
    assert fixed.train_config(99.0).checkpoint.interval_seconds == 7
    assert planned.train_config(99.0).checkpoint.interval_seconds == 99


def test_a_recipe_survives_json_and_keeps_its_digest(tmp_path: Path) -> None:
    recipe = load_recipe("tinyllama-1.1b")
    path = tmp_path / "recipe.json"
    path.write_text(recipe.canonical_json())
    again = recipe_from_json(path)
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert Recipe.model_validate(again.model_dump()) == recipe


def test_the_digest_tells_recipes_apart() -> None:
    assert load_recipe("demo").digest() == load_recipe("demo").digest()
    assert load_recipe("demo").digest() != load_recipe("demo", ["seed=1"]).digest()


def test_a_path_is_a_recipe_and_names_it_where_it_names_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: {num_steps: 5}\n")
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.num_steps() == 5


def test_relative_corpus_paths_count_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo", ["data.corpus=texts"]).data.corpus == str(tmp_path / "texts")
    assert load_recipe("demo", ["data.corpus=[a, /b]"]).data.corpus == (str(tmp_path / "a"), "/b")
    mapping = load_recipe("demo", ["data.corpus={text: a, code: [b]}"]).data.corpus
    assert mapping == {"text": (str(tmp_path / "a"),), "code": (str(tmp_path / "b"),)}
    assert load_recipe("demo", ["data.corpus=s3://bucket/a"]).data.corpus == "s3://bucket/a"


def test_what_does_not_change_the_shards_does_not_change_their_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n")
    corpus = f"data.corpus={tmp_path}"
    plain = fingerprint(load_recipe("demo", [corpus, "data.weights=null"]))
    assert plain == fingerprint(load_recipe("demo", [corpus, "data.weights=null", "seed=9", "model.width=64"]))
    for change in ("model.vocab_size=300", "data.heldout_fraction=0.3", "data.max_bytes=500"):
        assert plain != fingerprint(load_recipe("demo", [corpus, "data.weights=null", change]))


def test_a_changed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    import os

    path = tmp_path / "a.txt"
    path.write_text("some text\n")
    recipe = load_recipe("demo", [f"data.corpus={tmp_path}", "data.weights=null"])
    before = fingerprint(recipe)
    path.write_text("SOME TEXT\n")
    os.utime(path, ns=(0, 0))
    assert fingerprint(recipe) != before


def test_reading_recipes_loads_no_numpy_torch_or_ray() -> None:
    script = (
        "import sys; from tasks.data.corpus import fingerprint; from tasks.recipe.load import load_recipe; "
        "import tasks.spec; "
        "fingerprint(load_recipe('demo')); "
        "print(sorted({'numpy', 'torch', 'ray', 'lightning', 'tiktoken', 'pyarrow'} & set(sys.modules)))"
    )
    folder = RECIPE_FOLDER.parent.parent
    ran = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_a_precision_that_is_left_open_is_never_trained() -> None:
    auto = load_recipe("demo", ["precision=auto"])
    with pytest.raises(UserError, match="recipe demo leaves precision auto to the planner, so it cannot be trained"):
        auto.train_config()
    settled = auto.in_precision("fp32")
    assert settled.train_config().precision == "fp32"
    assert settled == load_recipe("demo", ["precision=fp32"])
    assert settled.digest() != auto.digest()
    assert auto.workload() == load_recipe("demo", ["precision=bf16"]).workload()


def test_the_local_backend_leaves_its_precision_open_unless_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: {num_steps: 10}\n")
    assert load_recipe(path).precision == "bf16"
    assert load_recipe(path, ["backend=local"]).precision == "auto"
    assert load_recipe(path, ["backend=local", "precision=fp32"]).precision == "fp32"
    assert load_recipe("demo").precision == "auto"


def test_a_preset_and_a_shape_become_plain_fields(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {preset: speedrun, shape: 124m, vocab_size: 50304}\ntraining: {num_steps: 10}\n")
    recipe = load_recipe(path)
    assert (recipe.model.mlp, recipe.model.hidden_size, recipe.model.logit_softcap) == ("relu2", 3072, 15.0)
    assert load_recipe(path, ["model.preset=llama"]).model.hidden_size == 2048
    assert load_recipe(path, ["model.mlp=swiglu"]).model.mlp == "swiglu"


def test_a_wrong_preset_is_said_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: {num_steps: 10}\nmodel:\n  preset: lama\n")
    with pytest.raises(UserError, match=r"mine\.yaml:3: model\.preset = 'lama': there is no such preset"):
        load_recipe(path)
    with pytest.raises(UserError, match=r"--set model\.shape=7b: model\.shape = '7b'"):
        load_recipe("demo", ["model.shape=7b"])


def test_a_market_may_say_how_many_losses_are_announced() -> None:
    market = "hazard:30,notice=0.5,notice_seconds=15"
    assert load_recipe("demo", [f"local.market={market}"]).local.market == market
