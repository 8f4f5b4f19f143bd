from pathlib import Path

import pytest
import yaml

from fracture.config import Config, Section, flatten, load_config
from fracture.errors import UsageError

CONFIGS = Path(__file__).parents[1] / "fracture" / "configs"


def test_default_yaml_is_what_no_config_gives():
    assert load_config(CONFIGS / "default.yaml") == Config()


@pytest.mark.parametrize("name", [p.name for p in CONFIGS.glob("*.yaml")])
def test_every_shipped_config_is_valid(name: str):
    load_config(CONFIGS / name)


def test_seed_yaml_is_the_reference_recipe():
    config = load_config(CONFIGS / "seed.yaml")
    assert config.model.filters == (64, 128, 256, 512)
    assert config.model.block == "conv-bn-relu-pool"
    assert config.model.head == "flatten"
    assert (config.training.learning_rate, config.training.weight_decay) == (1e-4, 0)
    assert (config.training.batch_size, config.training.epochs, config.training.patience) == (32, 50, 5)


def test_assignments_win_over_the_file_and_each_other(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("training: {epochs: 7, patience: 2}\n")
    config = load_config(file, ["training.epochs=3", "training.epochs=4", "model.name=cnn"])
    assert (config.training.epochs, config.training.patience) == (4, 2)


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "+1.0e-5", ".00001", "0.00001"])
def test_a_number_in_any_notation_is_a_number(tmp_path: Path, text: str):
    assert load_config(None, [f"training.learning_rate={text}"]).training.learning_rate == 1e-5
    (tmp_path / "mine.yaml").write_text(f"training: {{learning_rate: {text}}}\n")
    assert load_config(tmp_path / "mine.yaml").training.learning_rate == 1e-5


WORDS = ["no", "on", "Yes", "1", "007", "1e-3", "1.50", "true", "null", "~", "2026-01-02", "1:30"]


@pytest.mark.parametrize("word", WORDS)
def test_a_folder_may_have_any_name(tmp_path: Path, word: str):
    """YAML 1.1 would read these as booleans, numbers, dates or nothing."""
    assert load_config(None, [f"data.normal_labels=[{word}]"]).data.normal_labels == (word,)
    assert load_config(None, [f"data={{normal_labels: [{word}]}}"]).data.normal_labels == (word,)
    assert load_config(None, [f"data.group_pattern={word}"]).data.group_pattern == word
    (tmp_path / "mine.yaml").write_text(f"data:\n  normal_labels:\n  - {word}\n  - '{word}'\n")
    config = load_config(tmp_path / "mine.yaml")
    assert config.data.normal_labels == (word, word)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("[1]", ("1",)),
        ("1", ("1",)),
        ('"1"', ("1",)),
        ("'1'", ("1",)),
        ("['1']", ("1",)),
        ('["1", "a, b"]', ("1", "a, b")),
        ("[1, broken]", ("1", "broken")),
        ("broken, split", ("broken", "split")),
        (" broken ", ("broken",)),
        ('"a, b", no', ("a, b", "no")),
        ("not sure", ("not sure",)),
        ("", ()),
    ],
)
def test_a_list_is_typed_with_brackets_or_without(typed: str, words: tuple[str, ...]):
    assert load_config(None, [f"data.fracture_labels={typed}"]).data.fracture_labels == words


def test_a_list_of_numbers_is_typed_without_brackets_too():
    assert load_config(None, ["model.filters=8, 16", "model.dense=4"]).model.filters == (8, 16)


def test_a_list_that_a_shell_cut_at_its_space_shows_the_right_form():
    with pytest.raises(
        UsageError, match=r"'\[1,' is not readable as YAML. Write .* --set 'data.normal_labels=\[A, B\]'$"
    ):
        load_config(None, ["data.normal_labels=[1,"])


@pytest.mark.parametrize("value", ["1", "broken", "{a: b}"])
def test_a_list_in_a_file_has_brackets(tmp_path: Path, value: str):
    (tmp_path / "mine.yaml").write_text(f"data: {{normal_labels: {value}}}")
    with pytest.raises(UsageError, match=r"'data.normal_labels' = .* is a list; write it in brackets, \[A, B\]"):
        load_config(tmp_path / "mine.yaml")


def test_only_true_and_false_are_booleans(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("model: {batch_norm: false}\n")
    assert load_config(tmp_path / "mine.yaml").model.batch_norm is False
    assert load_config(None, ["model.batch_norm=True"]).model.batch_norm is True
    for word in ("no", "off", "yes", "0"):
        with pytest.raises(UsageError, match=r"'model.batch_norm' = .* is not possible: .* valid boolean"):
            load_config(None, [f"model.batch_norm={word}"])


@pytest.mark.parametrize("text", ["training: {epochs: 010}", "training: {epochs: 0x10}", "training: {epochs: 1_0}"])
def test_a_number_is_decimal(tmp_path: Path, text: str):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"'training.epochs' = '.*' is not possible: .* valid integer"):
        load_config(tmp_path / "mine.yaml")


@pytest.mark.parametrize("text", ["? [a]\n: 1", "&a {b: *a}", "data: &a {b: *a}"])
def test_a_tree_of_an_odd_shape_is_a_clear_error(tmp_path: Path, text: str):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"not readable as YAML|unknown setting"):
        load_config(tmp_path / "mine.yaml")


def test_the_recipe_holds_the_sections_that_make_a_model_what_it_is():
    sections = ["data", "model", "transfer", "quantum", "augment", "training", "evaluation"]
    assert list(Config().recipe()) == sections


def test_a_section_that_does_not_say_whether_it_changes_the_recipe_is_an_error():
    with pytest.raises(TypeError, match="changes_recipe"):

        class Forgotten(Section):
            pass


def test_an_empty_file_is_the_default(tmp_path: Path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == Config()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "training.epoch=3",
            r"unknown setting 'training.epoch' = 3. Did you mean 'training.epochs'\? Allowed here: epochs,",
        ),
        ("trainign.epochs=3", r"unknown setting 'trainign' = .* Did you mean 'training'\?"),
        ("training.epochs=many", r"'training.epochs' = 'many' is not possible: .* valid integer"),
        ("training.epochs=0", r"'training.epochs' = 0 is not possible: .* greater than or equal to 1"),
        ("model.head=round", r"'model.head' = 'round' is not possible: .* 'pooled' or 'flatten'"),
        ("model.name=vit", r"'model.name' = 'vit' is not possible: .* 'cnn'"),
        ("training=3", r"'training' = 3 is not possible: training is a section; it holds epochs, batch_size"),
        ("epochs=3", r"unknown setting 'epochs' = 3. Did you mean 'training.epochs'\?"),
        (
            "data.group_pattern=(",
            r"data.group_pattern: '\(' is not a regular expression: .*Correct it, or leave it out",
        ),
        ("data.folds=2", r"data.folds: 2 folds leave nothing to train on; use 3 or more"),
        ("epochs", r"--set 'epochs': must be KEY=VALUE, for example training.epochs=3"),
        ("training.epochs=[", r"--set 'training.epochs=\[': '\[' is not readable as YAML"),
        ("training.epochs=true", r"'training.epochs' = True is not possible: .* valid integer"),
        ("training.learning_rate=.inf", r"'training.learning_rate' = inf is not possible: .* finite"),
        ("training.seed=4294967296", r"'training.seed' = 4294967296 is not possible: .* less than 4294967296"),
        ("model.filters=[1.5]", r"'model.filters.0' = 1.5 is not possible"),
        ("1=2", r"unknown setting '1' = 2"),
        ("model.filters=[]", r"'model.filters' = \[\] is not possible: .* at least 1 item"),
        ("compute.workers=33", r"33 workers cannot share a global training.batch_size of 32"),
        ("data.image_size=20", r"'data.image_size' = 20 is not possible: .* greater than or equal to 32"),
    ],
)
def test_a_mistake_names_the_key_the_value_and_what_is_allowed(assignment: str, message: str):
    with pytest.raises(UsageError, match=message):
        load_config(None, [assignment])


def test_more_poolings_than_the_image_has_pixels():
    with pytest.raises(UsageError, match=r"6 poolings need data.image_size of at least 64"):
        load_config(None, ["data.image_size=32", "model.filters=[1,1,1,1,1,1]"])


def test_synchronised_batch_norm_without_batch_norm():
    with pytest.raises(UsageError, match=r"sync_batch_norm: needs model.batch_norm"):
        load_config(None, ["model.batch_norm=false", "model.sync_batch_norm=true"])


def test_xla_cannot_compile_sums_over_the_workers():
    with pytest.raises(UsageError, match=r"training.xla: always cannot compile model.sync_batch_norm, .*use auto"):
        load_config(None, ["training.xla=always", "model.sync_batch_norm=true"])
    assert not load_config(None, ["compute.gpu=true", "model.sync_batch_norm=true"]).uses_xla


@pytest.mark.parametrize(
    ("assignments", "used"),
    [
        ([], False),
        (["compute.gpu=true"], True),
        (["compute.gpu=true", "training.xla=never"], False),
        (["training.xla=always"], True),
        (["training.xla=true"], False),  # of earlier versions, whose bundles are read
        (["training.xla=true", "compute.gpu=true", "model.sync_batch_norm=true"], False),
        (["training.xla=false", "compute.gpu=true"], False),
    ],
)
def test_xla_is_for_gpus_unless_it_is_set(assignments: list[str], used: bool):
    assert load_config(None, assignments).uses_xla is used


def test_a_missing_file_names_those_beside_it():
    with pytest.raises(UsageError, match=r"quik.yaml: no such file. There are: .*quick.yaml"):
        load_config(CONFIGS / "quik.yaml")


@pytest.mark.parametrize(("text", "message"), [("[1, 2]", "must hold settings"), ("a: [", "not readable as YAML")])
def test_a_file_that_holds_no_settings(tmp_path: Path, text: str, message: str):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[" * 3000, "nested too deeply"),
        ("9" * 5000, r"Exceeds the limit \(4300 digits\) for integer string conversion: value has 5000 digits"),
    ],
    ids=["brackets", "digits"],
)
def test_a_value_that_python_cannot_hold(tmp_path: Path, value: str, message: str):
    (tmp_path / "bad.yaml").write_text(f"training:\n  epochs: {value}")
    with pytest.raises(UsageError, match=rf"bad.yaml: not readable as YAML: {message}$"):
        load_config(tmp_path / "bad.yaml")
    with pytest.raises(UsageError, match=r"--set 'training.epochs=.*: .* is not readable as YAML$") as raised:
        load_config(None, [f"training.epochs={value}"])
    assert len(str(raised.value)) < 500


PROGRAMS = [
    "!!python/object/apply:os.system ['touch {ran}']",
    "!!python/object/apply:subprocess.check_output [[touch, {ran}]]",
    "!!python/object/new:os.system ['touch {ran}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "training: !!python/object/apply:os.system ['touch {ran}']",
]


@pytest.mark.parametrize("text", PROGRAMS)
def test_a_file_that_would_run_a_program_is_refused(tmp_path: Path, text: str):
    (tmp_path / "bad.yaml").write_text(text.format(ran=tmp_path / "ran"))
    with pytest.raises(UsageError, match=r"bad.yaml: not readable as YAML: could not determine a constructor"):
        load_config(tmp_path / "bad.yaml")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", PROGRAMS)
def test_an_assignment_that_would_run_a_program_is_refused(tmp_path: Path, text: str):
    with pytest.raises(UsageError, match=r"is not readable as YAML|unknown setting"):
        load_config(None, [f"training.epochs={text.format(ran=tmp_path / 'ran')}"])
    assert not (tmp_path / "ran").exists()


def test_layers_that_no_memory_holds():
    with pytest.raises(UsageError, match=r"model.filters: 16384 filters at 224 pixels take 3.1 GB for one image, over"):
        load_config(None, ["model.filters=[16384]"])


def test_settings_survive_a_round_trip_through_yaml(tmp_path: Path):
    config = load_config(None, ["training.epochs=3", "model.dense=[8,4]"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(file) == config


def test_flatten_names_each_leaf():
    assert dict(flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3})) == {"a.b": 1, "a.c.d": 2, "e": 3}


@pytest.mark.parametrize(
    ("assignments", "idle", "active"),
    [
        ([], {"transfer.weights", "quantum.qubits"}, {"model.dense", "augment.zoom", "training.epochs"}),
        (
            ["model.name=qnn"],
            {"model.dense", "quantum.backbone", "transfer.weights"},
            {"model.filters", "quantum.qubits"},
        ),
        (
            ["model.name=resnet50"],
            {"model.filters", "training.epochs", "augment.zoom", "transfer.learning_rate", "quantum.qubits"},
            {"model.dropout", "transfer.head_epochs", "augment.horizontal_flip"},
        ),
        (["model.name=resnet50", "transfer.features=augmented"], {"training.epochs"}, {"augment.zoom"}),
        (["model.name=resnet50", "transfer.unfreeze=3"], set(), {"training.epochs", "augment.zoom"}),
        (
            ["model.name=qnn_transfer", "transfer.weights=none"],
            {"transfer.unfreeze"},
            {"quantum.backbone", "transfer.pooling", "transfer.pixel_scaling"},
        ),
    ],
)
def test_settings_that_a_model_does_not_ask_for(assignments: list[str], idle: set[str], active: set[str]):
    without_effect = load_config(None, assignments).without_effect
    assert idle <= without_effect
    assert not active & without_effect
