from pathlib import Path

import pytest
import yaml

from fracture.config import load_config
from fracture.dataset.format import Dataset
from fracture.errors import RunError, UsageError
from fracture.storage import StoragePath, storage_path
from fracture.tuning.space import (
    BEST,
    RESULTS,
    Result,
    check_space,
    check_trials,
    find_best_trial,
    read_results,
    sample_trials,
    table_lines,
    write_best,
    write_results,
)

RATE = {"training.learning_rate": 0.001}


def searching(*assignments: str, **space: object):
    """Settings that search `section__name`."""
    named = {key.replace("__", ".", 1): distribution for key, distribution in space.items()}
    return load_config(None, [f"tune.space={yaml.safe_dump(named, default_flow_style=True)}", *assignments])


def results(*losses: float | None) -> list[Result]:
    return [
        Result(n, RATE | {"model.dense": [8 * n]}, "ended" if loss else "diverged", 3 if loss else 0, 2, loss, loss)
        for n, loss in enumerate(losses, 1)
    ]


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        ({"normal": [0, 1]}, r"tune.space: model.dropout has normal; give one of uniform, loguniform, choice"),
        ({}, r"tune.space: model.dropout has nothing; give one of uniform"),
        ({"uniform": [0, 1], "choice": [0]}, r"tune.space: model.dropout has choice, uniform; give one of"),
        ({"choice": []}, r"model.dropout: a choice of nothing; list the values"),
        ({"uniform": [0.1]}, r"model.dropout: uniform of \[0.1\]; give the least and the most, two numbers"),
        ({"uniform": [0.1, "much"]}, r"uniform of \[0.1, 'much'\]; give the least and the most, two numbers"),
        ({"uniform": [0, True]}, r"uniform of \[0, True\]; give the least and the most, two numbers"),
        ({"uniform": [0.5, 0.2]}, r"uniform of \[0.5, 0.2\]; the least comes first, below the most"),
        ({"loguniform": [0, 0.2]}, r"loguniform of \[0, 0.2\]; the least comes first, below the most above 0"),
        ([0.1, 0.2], r"setting 'tune.space.model.dropout' = \[0.1, 0.2\] is not possible"),
    ],
)
def test_a_distribution_that_nothing_can_be_sampled_from(distribution: object, message: str):
    with pytest.raises(UsageError, match=message):
        searching(model__dropout=distribution)


@pytest.mark.parametrize(
    ("key", "distribution", "message"),
    [
        ("data__image_size", {"choice": [64]}, r"'data.image_size' cannot be searched; settings of model, training,"),
        ("model", {"choice": [64]}, r"'model' cannot be searched"),
        ("training__epochs", {"choice": [3]}, r"'training.epochs' cannot be searched: all trials train as long"),
        ("transfer__unfreeze", {"choice": [3]}, r"'transfer.unfreeze' cannot be searched: all trials train as long"),
        ("transfer__weights", {"choice": ["none"]}, r"'transfer.weights' cannot be searched: all trials begin alike"),
        ("quantum__backbone", {"choice": ["resnet50"]}, r"'quantum.backbone' cannot be searched: all trials begin al"),
        ("model__name", {"choice": ["qnn"]}, r"'model.name' cannot be searched: it is not tuned, but compared"),
        ("training__seed", {"choice": [3]}, r"'training.seed' cannot be searched: a lucky seed is no better"),
        ("training__sampling", {"choice": ["image"]}, r"'training.sampling' cannot be searched: it says what counts"),
        ("training__rate", {"choice": [3]}, r"tune.space: unknown setting 'training.rate' = 3. Allowed here: epochs"),
        (
            "model__dropout",
            {"uniform": [0.1, 1]},
            r"tune.space: setting 'model.dropout' = 1.0 is not possible: .* less",
        ),
        ("model__dense", {"choice": [[8], [0]]}, r"tune.space: setting 'model.dense.0' = 0 is not possible"),
        ("training__batch_size", {"uniform": [8, 64]}, r"'training.batch_size' = 8.0 is not possible: .*integer"),
    ],
)
def test_a_setting_that_cannot_be_searched_is_refused(key: str, distribution: object, message: str):
    with pytest.raises(UsageError, match=message):
        check_space(searching(**{key: distribution}))


def test_a_search_of_nothing_and_one_whose_trials_are_shorter_than_their_grace():
    nothing = r"tune.space has nothing that has an effect on cnn: name settings and what to sample them from"
    with pytest.raises(UsageError, match=nothing):
        check_space(searching())
    with pytest.raises(UsageError, match=nothing):
        check_space(searching(quantum__qubits={"choice": [4, 6]}))
    with pytest.raises(
        UsageError, match=r"tune.grace_epochs = 9 is more than the 8 epochs of a training. Use fewer, or"
    ):
        check_space(load_config(None, ["tune.grace_epochs=9"]))


def test_settings_that_are_impossible_only_together_or_on_this_data(shard_folder):
    folder, manifest = shard_folder(train=40)
    apart = {"model__batch_norm": {"choice": [False, True]}, "model__sync_batch_norm": {"choice": [False]}}
    check_trials(searching("training.batch_size=8", **apart), Dataset(folder, manifest))
    together = apart | {"model__sync_batch_norm": {"choice": [True]}}
    with pytest.raises(
        UsageError, match=r"trial \d+ \(batch_norm False, sync_batch_norm True\): model.sync_batch_norm"
    ):
        check_trials(searching("training.batch_size=8", **together), Dataset(folder, manifest))
    with pytest.raises(UsageError, match=r"trial \d+ \(batch_size 64\): training.batch_size = 64 is more than the 40"):
        check_trials(
            searching("training.batch_size=8", training__batch_size={"choice": [8, 64]}), Dataset(folder, manifest)
        )


def test_a_number_in_scientific_notation_is_a_number():
    assert searching(a={"loguniform": ["1e-4", "1e-2"]}).tune.space == {"a": {"loguniform": [0.0001, 0.01]}}
    assert searching(a={"choice": ["1e-4", "cosine"]}).tune.space == {"a": {"choice": [0.0001, "cosine"]}}


def test_the_first_trial_is_the_recipe_and_the_others_follow_from_the_seed():
    config = load_config(None, ["tune.trials=200"])
    check_space(config)
    first, *drawn = sample_trials(config)
    assert first["training.learning_rate"] == 0.001
    assert first["model.dense"] == [256]
    assert drawn == sample_trials(config)[1:]
    assert drawn != sample_trials(load_config(None, ["tune.trials=200", "training.seed=1"]))[1:]
    rates = [trial["training.learning_rate"] for trial in drawn]
    assert 0.0003 <= min(rates) < 0.0004
    assert 0.008 < max(rates) <= 0.01
    below = sum(rate < 0.0017 for rate in rates)  # half of them, on a logarithmic scale: 0.0003 × 5.8, × 5.8
    assert 70 < below < 130
    assert {tuple(trial["model.dense"]) for trial in drawn} == {(128,), (256,)}


def test_what_has_no_effect_on_the_model_is_not_drawn():
    first, second = sample_trials(load_config(None, ["tune.trials=2", "model.name=mobilenetv2"]))
    assert list(first) == list(second) == ["model.dropout", "training.learning_rate", "training.weight_decay"]


def test_more_trials_begin_with_the_same():
    assert sample_trials(load_config(None, ["tune.trials=9"]))[:4] == sample_trials(
        load_config(None, ["tune.trials=4"])
    )


def test_results_are_of_the_best_epoch():
    history = [{"epoch": n, "val_loss": loss, "val_auc": n / 10} for n, loss in enumerate((0.6, 0.4, 0.5), 1)]
    assert Result.from_history(2, RATE, "ended", history) == Result(2, RATE, "ended", 3, 2, 0.4, 0.2)
    assert Result.from_history(2, RATE, "diverged", []) == Result(2, RATE, "diverged", 0)


def test_results_are_kept_for_the_same_search_alone(shard_folder, tmp_path: Path):
    shards, manifest = shard_folder()
    run, config = storage_path(tmp_path / "x"), load_config()
    assert read_results(run, config, manifest) == {}
    kept = {result.trial: result for result in results(0.5, None)}
    write_results(run, config, manifest, kept)
    assert read_results(run, config, manifest) == kept
    assert read_results(run, load_config(None, ["tune.trials=99", "tune.concurrent=1"]), manifest) == kept
    for changed, message in (
        ("training.seed=1", r"search 'x' was started with other settings: training.seed 0 -> 1. Give the same"),
        ("tune.grace_epochs=1", r"started with other settings: tune.grace_epochs 2 -> 1"),
        ("tune.space={model.dropout: {uniform: [0, 0.5]}}", r"tune.space.model.dropout.uniform \[0.2, 0.6\] -> \[0.0"),
    ):
        with pytest.raises(UsageError, match=message):
            read_results(run, load_config(None, [changed]), manifest)
    saved = (run / RESULTS).read_json()
    del saved["settings"]["evaluation"]["min_specificity"]  # as an earlier version wrote it
    (run / RESULTS).write_json(saved)
    assert read_results(run, config, manifest) == kept
    with pytest.raises(UsageError, match=r"search 'x' was started with other data. Give another --run name"):
        read_results(run, config, manifest.model_copy(update={"fingerprint": "other"}))
    with pytest.raises(UsageError, match=r"shards holds other things than a search. Give another --run name"):
        read_results(shards, config, manifest)


def settings_in(file: StoragePath) -> object:
    return load_config(file.path)


def test_the_best_settings_are_a_file_that_gives_them_again(tmp_path: Path):
    run = storage_path(tmp_path)
    write_best(run, load_config(), results(0.5, 0.3, None))
    text = (tmp_path / BEST).read_text()
    assert text.startswith(
        f"# Trial 2 of the search {run.name}: validation loss 0.3000 after epoch 2.\n"
        "# Chosen among 3 trials by that very loss, which is therefore optimistic.\n"
    )
    assert yaml.safe_load(text) == {"model": {"dense": [16]}, "training": {"learning_rate": 0.001}}
    assert settings_in(run / BEST) == load_config(None, ["model.dense=[16]"])
    write_best(run, load_config(None, ["data.image_size=64", "compute.workers=1"]), results(0.5))
    assert settings_in(run / BEST) == load_config(None, ["data.image_size=64", "model.dense=[8]"]), "as it was searched"


def test_no_trial_is_best_where_all_diverged():
    with pytest.raises(RunError, match=r"the loss of every trial diverged. Lower the learning rates in tune.space"):
        find_best_trial(results(None, None))


def test_a_trial_that_diverged_in_the_end_is_not_the_best():
    ended, diverged = Result(1, RATE, "ended", 8, 7, 0.5, 0.8), Result(2, RATE, "diverged", 4, 4, 0.3, 0.9)
    assert find_best_trial([ended, diverged]) == ended
    assert [line.count("*") for line in table_lines([ended, diverged])] == [0, 1, 0]


def test_the_table_marks_the_lowest_loss():
    shown = [*results(0.5, 0.3, None), Result(4, RATE | {"model.dense": [8]}, "stopped early", 1, 1, 0.9, 0.4)]
    assert table_lines(shown) == [
        "trial  epochs  val loss     val AUC  dense  learning_rate",
        "    1       3     0.500       0.500    [8]          0.001",
        "    2       3     0.300  *    0.300   [16]          0.001",
        "    3       0         –           –   [24]          0.001       diverged",
        "    4       1     0.900       0.400    [8]          0.001  stopped early",
    ]
