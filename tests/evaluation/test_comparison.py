import json
import re
from collections.abc import Callable
from functools import cache

import numpy as np
import pyarrow as pa
import pytest

from fracture.dataset.format import Manifest
from fracture.errors import UsageError
from fracture.evaluation.comparison import (
    Contender,
    compute_differences,
    compute_figures,
    format_comparison,
    format_table,
    measure_prediction_speeds,
    read_costs,
    write_comparison,
)
from fracture.evaluation.contenders import ContenderSettings, folder_name, read_contenders, select_contenders
from fracture.evaluation.folds import PooledFolds, pool_folds
from fracture.evaluation.plots import plot_rocs
from fracture.evaluation.scores import write_predictions
from fracture.storage import StoragePath, storage_path
from tests.conftest import write_shards

RESAMPLES = 300
SOURCES = ("east", "north", "south")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_shards(storage_path(tmp_path_factory.mktemp("shards")), {"fold-1": 8, "fold-2": 8, "fold-3": 8})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> StoragePath:
    return storage_path(tmp_path_factory.mktemp("runs") / "x")


@pytest.fixture(scope="module")
def trained(run: StoragePath, manifest: Manifest) -> Callable[..., PooledFolds]:
    """Three finished folds of a contender, whose test images are half fractures; it reverses those of `wrong`."""

    @cache
    def write(
        name: str,
        wrong: tuple[int, ...] = (),
        label: int | None = None,
        workers: int = 2,
        scale: float = 1,
        sources: bool = False,
    ) -> PooledFolds:
        for number in (1, 2, 3):
            fold, labels = run / name / f"fold-{number}", np.arange(8) % 2
            radiograph_ids = np.arange(10 * number, 10 * number + 8)
            table = {
                "row": np.arange(8),
                "split": ["test"] * 8,
                "radiograph_id": radiograph_ids,
                "group_id": radiograph_ids,
                "origin": ["x"] * 8,
                "label": labels if label is None else np.full(8, label),
                "probability": np.where(labels == (number not in wrong), 0.9, 0.1) * (scale if number == 3 else 1),
            }
            inside = table | {"split": ["val"] * 8, "group_id": radiograph_ids + 500, "label": np.arange(8) % 2}
            inside |= {"radiograph_id": inside["group_id"], "probability": np.where(np.arange(8) % 2, 0.9, 0.1)}
            write_predictions(fold, pa.concat_tables([pa.table(table), pa.table(inside)]))
            operating_point = {"temperature": 1.0, "offset": 0.0, "threshold": 0.5, "rule": "x"}
            trained_on = {"workers": workers, "precision": "float32"}
            config = {"evaluation": {"study_probability": "max"}}
            card = {"operating_point": operating_point, "run": trained_on, "config": config}
            (fold / "bundle/bundle.json").write_json(card)
            (fold / "bundle/weights.safetensors").write_bytes(bytes(2_000_000))
            epoch = {"seconds": 60.0, "memory_gb": 0.5 * number, "trained_parameters": 7}
            (fold / "metrics.jsonl").write_bytes(f"{json.dumps(epoch)}\n{json.dumps(epoch)}\n".encode())
        by_source = {"folds": list(SOURCES), "parameters": manifest.parameters | {"folds": "source"}}
        return pool_folds(run / name, manifest.model_copy(update=by_source) if sources else manifest)

    return write


def contender(
    title: str, pooled: PooledFolds, run: StoragePath, baseline: PooledFolds | None = None, base: str = "base"
) -> Contender:
    costs = read_costs(run / folder_name(title), 3, parameters=1234, images_per_second=50.4)
    found = {} if baseline is None else {base: compute_differences(pooled, baseline, pairs=2, resamples=RESAMPLES)}
    return Contender(title, folder_name(title), {"model.dropout": 0.1}, pooled, costs, compute_figures(pooled), found)


def test_differences_are_of_the_same_radiographs(trained):
    """A third of the fractures missed, a third of the normals called; of 48 pairs within folds 32 in order."""
    right, wrong = trained("right"), trained("wrong", wrong=(3,))
    assert compute_figures(wrong)["auc"].value == pytest.approx(32 / 48)
    found = compute_differences(right, wrong, pairs=1)
    assert {name: figure.value for name, figure in found.items()} == pytest.approx(
        dict.fromkeys(("auc", "recall", "specificity"), 1 / 3)
    )
    # Each of 12 fractures is in the fold that was missed with a probability of a third: √(⅓ · ⅔ / 12) = .136.
    recall = found["recall"]
    assert (recall.high - recall.low) / 2 == pytest.approx(1.96 * 0.136, rel=0.1)
    same = compute_differences(wrong, wrong, pairs=1, resamples=RESAMPLES)["auc"]
    assert (same.value, same.low, same.high) == (0, None, None), "without variation there is no interval"


def test_a_fold_whose_probabilities_are_all_lower_changes_no_auc(trained):
    """Pooled, its 4 fractures come after the 8 normals of the other folds: 32 of 144 pairs."""
    right, lower = trained("right"), trained("lower", scale=0.1)
    assert lower.whole["radiograph"]["auc"] == pytest.approx(112 / 144)
    assert compute_figures(lower)["auc"].value == 1
    assert compute_differences(lower, right, pairs=1, resamples=RESAMPLES)["auc"].value == 0


def test_intervals_of_several_contenders_hold_for_all_together(trained):
    """For ten pairs each has 99.5 %: in a normal distribution it is 2.81 / 1.96 times as wide."""
    right, wrong = trained("right"), trained("wrong", wrong=(3,))
    one, ten = (compute_differences(right, wrong, pairs)["recall"] for pairs in (1, 10))
    assert ten.low < one.low < one.value < one.high < ten.high
    assert (ten.high - ten.low) / (one.high - one.low) == pytest.approx(2.81 / 1.96, rel=0.15)


def test_costs_are_those_of_all_folds(trained, run):
    costs = contender("right", trained("right"), run).costs
    assert (costs.epochs, costs.training_seconds, costs.memory_gb) == (6, 360, 1.5)
    assert costs.trained_on == ("2 workers, float32",)
    assert (costs.parameters, costs.trained_parameters, costs.weights_bytes) == (1234, 7, 2_000_000)


def test_models_take_turns_when_predictions_are_timed():
    turns = []

    class Model:
        def __init__(self, name: str) -> None:
            self._name = name

        def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
            turns.append(self._name)
            return images[:, :1, 0, 0] / 256

    speeds = measure_prediction_speeds({"a": Model("a"), "b": Model("b")}, np.zeros((16, 4, 4, 1), np.uint8))
    assert turns == ["a", "b"] * 6, "the first round compiles"
    assert min(speeds.values()) > 0


def test_the_page_the_table_and_the_screen_say_which_is_better(trained, run, manifest):
    base, better, same = trained("base", wrong=(2, 3)), trained("b-better-b"), trained("same", wrong=(1, 2))
    contenders = [
        contender("base", base, run),
        contender("<b>better</b>", better, run, base),
        contender("same", same, run, base),
    ]
    contenders[2].differences["<b>better</b>"] = compute_differences(same, better, pairs=2, resamples=RESAMPLES)
    write_comparison(run, manifest, contenders, ["SYNTHETIC: x"])
    page = " ".join((run / "comparison.html").read_bytes().decode().split())
    assert "<b>&lt;b&gt;better&lt;/b&gt;</b> is better than base by AUC on these radiographs: AUC +0.667" in page
    assert "<b>same</b> is not distinguishable from base by AUC: AUC +0.000" in page
    assert "<b>same</b> is worse than &lt;b&gt;better&lt;/b&gt; by AUC on these radiographs: AUC -0.667" in page
    assert "The intervals are widened (Bonferroni) to hold for all 3 pairs together" in page
    assert '<a href="b-better-b/folds.html">' in page
    assert page.count("data:image/png;base64,") == 1
    assert "SYNTHETIC: x" in page
    screen = "\n".join(format_comparison(contenders))
    assert "better than base by AUC on these radiographs: AUC +0.667 [" in screen
    assert (
        "1,234 parameters, 6.0 min of training, 50 images/s predicted, 1.5 GB a worker (2 workers, float32)" in screen
    )
    assert (run / "comparison.md").read_bytes().decode().splitlines() == format_table(contenders)
    assert format_table(contenders)[2].startswith("| base | 0.333 [")
    assert format_table(contenders)[-1].startswith(
        "same is worse than <b>better</b> by AUC on these radiographs: AUC -0.667 ["
    )
    written = (run / "comparison.json").read_json()
    assert written["baseline"] == "base"
    assert written["contenders"]["same"]["differences"]["base"]["auc"]["value"] == 0
    assert written["contenders"]["same"]["costs"]["training_seconds"] == 360


def test_a_comparison_by_source_shows_each_contenders_fall(trained, run, manifest):
    """In order inside; of the three sources outside none is reversed, or one, so the AUC falls by 0 or by a third."""
    right, wrong = trained("right", sources=True), trained("wrong", wrong=(3,), sources=True)
    contenders = [contender("right", right, run), contender("wrong", wrong, run, right, "right")]
    write_comparison(run, manifest, contenders, [])
    table = format_table(contenders)
    assert table[0].startswith("| per radiograph | inside AUC | outside AUC | fall | AUC within sources, by pairs |")
    interval = r" \[[-+.\d]+, [-+.\d]+\]"
    row = rf"\| wrong \| 1\.000{interval} \| 0\.667{interval} \| \+0\.333{interval} \| 0\.667{interval} \|"
    assert re.match(row, table[3])
    line = (
        rf"           mean over sources: AUC 1\.000{interval} inside, 0\.667{interval} outside, fall \+0\.333{interval}"
    )
    assert any(re.fullmatch(line, shown) for shown in format_comparison(contenders))
    written = (run / "comparison.json").read_json()["contenders"]
    assert written["wrong"]["sources"]["south"]["fall"]["auc"]["value"] == 1
    assert written["right"]["mean_over_sources"]["fall"]["auc"]["value"] == 0
    page = (run / "comparison.html").read_bytes().decode()
    assert "From inside to outside" in page
    assert page.count("data:image/png;base64,") == 3, "the curves of each source"
    assert "The curves pool" not in page
    plain = [contender("right", trained("right"), run)]
    assert "inside" not in format_table(plain)[0]
    write_comparison(run, manifest, plain, [])
    assert not any(b in (run / "comparison.html").read_bytes() for b in (b"From inside", b"held out", b"outside"))
    assert "sources" not in (run / "comparison.json").read_json()["contenders"]["right"]


def test_the_worse_and_the_undefined_are_called_so(trained, run, manifest):
    right, bad = trained("right"), trained("base", wrong=(2, 3))
    verdict = contender("base", bad, run, right, "right").verdict("right")
    assert verdict == "is worse than right by AUC on these radiographs"
    alone = trained("alone", label=1)
    one_class = contender("alone", alone, run, alone, "alone")
    assert one_class.differences["alone"]["specificity"].value is None
    assert one_class.verdict("alone") == "cannot be compared with alone: test has one class only"
    assert "AUC undefined, sensitivity +0.000" in format_comparison([one_class])[2]
    write_comparison(run, manifest, [contender("alone", alone, run), one_class], [])
    assert b"undefined" in (run / "comparison.html").read_bytes()


def test_the_page_warns_where_trainings_differ(trained, run, manifest):
    right, other = trained("right"), trained("other", wrong=(3,), workers=1)
    for pooled, title, expected in ((right, "right", False), (other, "other", True)):
        contenders = [contender("right", right, run), contender(title, pooled, run, right)]
        write_comparison(run, manifest, contenders, [])
        page = (run / "comparison.html").read_bytes()
        assert (b"Not all folds were trained on the same number of workers, or" in page) == expected


def test_every_model_has_its_curve():
    labels, probabilities = np.arange(8) % 2, np.linspace(0, 1, 8)
    models = {str(number): np.roll(probabilities, number) for number in range(9)}
    without_last = {name: models[name] if name != "8" else models["7"] for name in models}
    assert plot_rocs(labels, models, "") != plot_rocs(labels, without_last, "")


def test_contenders_are_read_in_the_order_of_their_file(tmp_path):
    file = tmp_path / "models.yaml"
    file.write_text(
        "cnn: {}\n'wide, no dropout': {model: {filters: [8, 16], dropout: 0.0}}\nwide: {against: 'wide, no dropout'}\n"
    )
    found = read_contenders(file)
    wide = {"model.filters": [8, 16], "model.dropout": 0.0}
    assert found == {
        "cnn": ContenderSettings({}, None),
        "wide, no dropout": ContenderSettings(wide, None),
        "wide": ContenderSettings({}, "wide, no dropout"),
    }
    assert folder_name("MobileNetV2, ImageNet") == "mobilenetv2-imagenet"
    assert list(select_contenders(found, ["wide, no dropout"])) == ["wide, no dropout"]
    with pytest.raises(UsageError, match=r"--only 'deep': there is no such contender. There are: 'cnn', 'wide, no dro"):
        select_contenders(found, ["deep"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"--models .* names no contender. Add one, such as the line 'cnn: \{\}'"),
        ("- cnn", r"--models .*: must hold settings such as"),
        ("cnn: resnet50", r"contender 'cnn' must hold settings such as .*, or \{\} for none; it holds 'resnet50'"),
        ("cnn:", r"contender 'cnn' must hold settings .*; it holds None"),
        (
            "cnn: {data: {image_size: 96}}",
            r"contender 'cnn' sets data.image_size = 96, but all .* same shards. Set it for all of them: --set data.im",
        ),
        ("a b: {}\nA-B: {}", r"the titles 'a b' and 'A-B' would both get the folder name 'a-b'. Change a word of one"),
        ("'+': {}", r"the title '\+' has no letter a-z and no digit. Add one"),
        ("Fold 1: {}", r"the title 'Fold 1' would get the folder name 'fold-1', which a fold has"),
        ('"a\\nb": {}', r"the title 'a\\nb' has a line break or a \$, or begins with _. Remove it"),
        (
            "a: {}\nb: {against: c}\nd: {}",
            r"'b' has against: 'c'. All contenders .* all but the first may also name one of these: 'd'",
        ),
        ("a: {against: b}\nb: {}", r"contender 'a' has against: 'b'. All contenders are compared with the first"),
        ("a: {}\nb: {against: a}", r"contender 'b' has against: 'a'. All contenders are compared with the first"),
        ("_cnn: {}", r"the title '_cnn' has a line break"),
        ("5 $: {}", r"the title '5 \$' has a line break"),
    ],
)
def test_contenders_that_cannot_be_compared_are_refused(tmp_path, text: str, message: str):
    file = tmp_path / "models.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_contenders(file)
    with pytest.raises(UsageError, match=r"--models .*nowhere.yaml: no such file. There are: .*models.yaml"):
        read_contenders(tmp_path / "nowhere.yaml")
