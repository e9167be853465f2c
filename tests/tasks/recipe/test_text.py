"""What is wrong in a recipe is told with its place, the value, and the nearest right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from cost.errors import UserError
from tasks.recipe.load import load_recipe, recipe_from_json


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layerz=4", "model.num_layerz = 4: no such key; did you mean model.num_layers?"),
        ("num_layers=4", "num_layers = 4: no such key; did you mean model.num_layers?"),
        ("nods.max=4", "nods = {'max': 4}: no such key; did you mean nodes?"),
        ("offers.zzz=4", "offers.zzz = 4: no such key; offers has clouds, gpus, spot."),
        ("model.num_layers=four", "model.num_layers = 'four': should be a valid integer"),
        ("model.num_layers=true", "model.num_layers = true: should not be true or false"),
        ("model.num_layers=0", "model.num_layers = 0: should be greater than 0"),
        ("model.rope_base=.inf", "model.rope_base = inf: should be greater than 0"),
        ("model.num_heads=6", "model.num_heads = 6: does not divide model.width="),
        ("model.num_heads=160", "makes heads of size 1; rotary positions need an even size"),
        ("model.num_kv_heads=3", "model.num_kv_heads = 3: does not divide model.num_heads=4"),
        (
            "model.vocab_size=70000",
            "model.vocab_size = 70000: should be 257 (all bytes and the special tokens) to 65536",
        ),
        ("model.vocab_size=256", "model.vocab_size = 256: should be 257"),
        ("precision=bf61", "precision = 'bf61': should be 'bf16', 'fp32' or 'auto'; did you mean bf16?"),
        ("backend=loco", "backend = 'loco': should be 'local' or 'sky'; did you mean local?"),
        ("optimizer.name=adam", "optimizer.name = 'adam': should be 'muon' or 'adamw'; did you mean adamw?"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate = 0: should be greater than 0"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate = nan: should be greater than 0"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay = -1: should not be negative"),
        ("optimizer.decay_fraction=1.5", "optimizer.decay_fraction = 1.5: should be between 0 and 1"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas = [0.9, 1.0]: should each be at least 0 and below 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas = [0.9]: has too few values"),
        ("training.num_steps=0", "training.num_steps = 0: should be greater than 0"),
        ("training.num_steps=null", "training: has none; give exactly one of num_steps, num_tokens, tokens_per_param"),
        (
            "training.micro_batch_size=64",
            "training.micro_batch_size = 64: is larger than training.global_batch_size=32",
        ),
        ("nodes.min=3", "nodes.min = 3: is larger than nodes.max=2"),
        ("nodes.max=33", "nodes.max = 33: leaves nodes without work: global_batch_size=32"),
        ("data.heldout_fraction=0.6", "data.heldout_fraction = 0.6: should be less than or equal to 0.5"),
        ("data.weights.txt=0.5", "is no source of this corpus, which has text, code; did you mean text?"),
        ("data.weights.text=heavy", "data.weights.text = 'heavy': should be a valid number"),
        ("data.corpus=[]", "data.corpus = []: should be a path, a list of paths, or a mapping"),
        ("data.corpus=3", "data.corpus = 3: should be a path, a list of paths, or a mapping"),
        ("data.corpus={a-b: x}", "source name 'a-b' should be letters, digits and _ only"),
        ("data.special_tokens=[a]", "data.special_tokens = ['a']: should hold <|endoftext|>"),
        (
            "local.market=trase:x",
            "local.market = 'trase:x': should be calm, hazard:PER_HOUR or trace:FILE; did you mean",
        ),
        ("local.market=hazard:often", "should be calm, hazard:PER_HOUR or trace:FILE"),
        ("local.market=trace", "should be calm, hazard:PER_HOUR or trace:FILE"),
        ("budget_usd=-3", "budget_usd = -3: should be greater than 0"),
        ("name=a b", "name = 'a b': string should match pattern"),
        ("seed=-1", "seed = -1: should be greater than or equal to 0"),
        ("model=3", "model = 3: should be a dictionary"),
    ],
)
def test_a_wrong_override_is_named_with_the_nearest_right_one(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("demo", [override])
    assert f"--set {override}: " in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nonsense", "--set nonsense: should be KEY=VALUE"),
        ("=4", "--set =4: should be KEY=VALUE"),
        ("seed.x=1", "--set seed.x=1: seed is 0, which has no keys"),
        ("seed=[1", "--set seed=[1: '[1' is not YAML"),
    ],
)
def test_an_override_that_cannot_be_read_says_so(override: str, message: str) -> None:
    with pytest.raises(UserError, match=r"--set"):
        load_recipe("demo", [override])
    with pytest.raises(UserError) as caught:
        load_recipe("demo", [override])
    assert str(caught.value).startswith(message)


def test_two_lengths_are_one_too_many() -> None:
    with pytest.raises(UserError, match=r"training: has num_steps and num_tokens; give exactly one"):
        load_recipe("demo", ["training.num_tokens=1e6", "training.num_steps=3"])


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("training:\n  num_steps: 5\n  micro_bach_size: 4\n", 3, "micro_bach_size = 4: no such key; did you mean"),
        ("name: x\ntraining: {num_steps: five}\n", 2, "training.num_steps = 'five': should be a valid integer"),
        ("training:\n  num_steps: 5\nmodel:\n  width: 100\n  num_heads: 3\n  num_kv_heads: 3\n", 5, "does not divide"),
        ("training:\n  num_steps: 5\n  num_steps: 6\n", 3, "training.num_steps is given twice; the first is in line 2"),
        ("training:\n  num_steps: 5\n  bad: [1\n", 4, "not YAML: "),
        ("training:\n  eval_sequences: 5\n", 1, "training: has none; give exactly one of"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: x\n")
    with pytest.raises(UserError, match=r"mine\.yaml: training: is missing"):
        load_recipe(path)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: {num_steps: 5}\nsede: 4\nprecision: fp16\n")
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert str(caught.value).splitlines() == [
        f"{path}:3: precision = 'fp16': should be 'bf16', 'fp32' or 'auto'; did you mean bf16?",
        f"{path}:2: sede = 4: no such key; did you mean seed?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "should be a mapping of recipe fields, but is nothing"), ("- a\n- b\n", "but is ['a', 'b']")],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert message in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read the recipe .* it is not UTF-8 text"):
        load_recipe(path)


def test_an_unknown_name_lists_what_exists_and_names_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("dmeo")
    assert str(caught.value).startswith(
        "no recipe is called 'dmeo'; did you mean demo? There are 1.5b, 350m, 3b, demo,"
    )


def test_a_path_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recipe file .*gone\.yaml; `slm recipes` lists"):
        load_recipe(tmp_path / "gone.yaml")
    with pytest.raises(UserError, match=r"is a folder; a recipe is a YAML file"):
        load_recipe(tmp_path)


def test_json_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    with pytest.raises(UserError, match=r"cannot read the recipe .*: No such file"):
        recipe_from_json(path)
    path.write_text('{"name": "x", "training": {"num_steps": "five"}}')
    with pytest.raises(UserError, match=r"is no recipe that this version can use \(training.num_steps"):
        recipe_from_json(path)
