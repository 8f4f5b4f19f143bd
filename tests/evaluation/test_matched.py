import numpy as np
import pyarrow as pa
import pytest

from fracture.dataset.format import Dataset
from fracture.evaluation.matched import compute_matched_auc, match_radiographs
from fracture.evaluation.metrics import MatchedFigure, Metrics, as_json
from fracture.evaluation.operating_point import OperatingPoint
from fracture.evaluation.report import Report, evaluate_run, format_matched, write_report
from fracture.storage import storage_path

# 80 radiographs: of detector A 30 fractures and 10 normals, of B the other way round.
DETECTORS = np.array(["A"] * 40 + ["B"] * 40)
LABELS = np.array([1] * 30 + [0] * 10 + [1] * 10 + [0] * 30)
NUMBERS = np.arange(80)
BY_DETECTOR = np.where(DETECTORS == "A", 0.9, 0.1)  # what a model says that sees the detector alone
BY_ANATOMY = np.where(LABELS == 1, 0.6, 0.4) + 0.002 * (NUMBERS % 5)
ONE_FOLD = np.zeros(80)


def match(probabilities: np.ndarray, values: np.ndarray, folds: np.ndarray = ONE_FOLD) -> MatchedFigure:
    return compute_matched_auc(LABELS, probabilities, NUMBERS, values, folds)


def test_a_model_that_sees_the_detector_alone_is_chance_between_radiographs_of_one_detector():
    """Of 1600 pairs 900 are in order, 600 are ties, and 100 are the wrong way round."""
    figure = match(BY_DETECTOR, DETECTORS)
    assert (figure.plain, figure.all_pairs) == ((900 + 600 / 2) / 1600, 1600)
    assert (figure.value, figure.low, figure.high, figure.pairs) == (0.5, 0.5, 0.5, 2 * 30 * 10)


def test_a_model_that_sees_the_anatomy_stays_as_good():
    figure = match(BY_ANATOMY, DETECTORS)
    assert (figure.plain, figure.value, figure.high) == (1, 1, 1)
    assert figure.low == 0.025 ** (1 / 40), "of 40 groups with a fracture, 40 without"


@pytest.mark.parametrize("pixels", [(50_000, 90_000), (-1.5, -1.0)])
def test_radiographs_that_share_a_number_are_like_each_other_and_like_no_others(pixels: tuple[float, float]):
    """A quantile bin of 90,000 and more would hold the larger ones, too: each is larger by its own."""
    values = np.where(DETECTORS == "A", *reversed(pixels)).astype(float)
    assert match(BY_DETECTOR, values).value == 0.5
    values[:30:2] += 1 + NUMBERS[:30:2]
    figure = match(BY_DETECTOR + 0.001 * (values > max(pixels)), values)
    assert (figure.value, figure.pairs) == (0.5, 15 * 10 + 30 * 10)


def test_numbers_are_alike_in_bins_of_equally_many():
    """100 of each class by turns make 10 bins of 20, 20 of each class 5 bins of 8."""
    for count, bins in ((100, 10), (70, 7), (20, 5)):
        labels, values = np.arange(2 * count) % 2, np.arange(2 * count) + 0.5
        figure = compute_matched_auc(labels, values / (2 * count), np.arange(2 * count), values, np.zeros(2 * count))
        assert figure.pairs == bins * (count // bins) ** 2
        assert figure.plain == pytest.approx(0.5, abs=0.05)


def test_what_is_unknown_is_like_nothing():
    values = np.where(NUMBERS % 2 == 0, DETECTORS, "")
    assert (match(BY_ANATOMY, values).pairs, match(BY_ANATOMY, values).all_pairs) == (2 * 15 * 5, 20 * 20)
    sizes = np.where(values == "", np.nan, np.where(DETECTORS == "A", 9.0, 7.0))
    assert match(BY_ANATOMY, sizes) == match(BY_ANATOMY, values)
    nothing = match(BY_ANATOMY, np.full(80, np.nan))
    assert nothing == MatchedFigure(value=None, pairs=0, all_pairs=0, plain=None)


def test_too_few_patients_give_no_figure():
    """The 10 normals of A are one patient's; with 8 of B they are 9 patients, with 9 of B they are 10."""
    groups = np.where((DETECTORS == "A") & (LABELS == 0), -1, NUMBERS)
    few, enough = (
        compute_matched_auc(LABELS[:n], BY_ANATOMY[:n], groups[:n], DETECTORS[:n], ONE_FOLD[:n]) for n in (58, 59)
    )
    assert (few.value, few.low, few.plain, few.pairs) == (None, None, 1, 30 * 10 + 10 * 8)
    assert (enough.value, enough.low) == (1, 0.025 ** (1 / 10))


def test_pairs_are_of_one_fold():
    """In the second fold the model says .05 more, whatever it sees."""
    folds = np.where(NUMBERS % 2 == 0, "first", "second")
    figure = match(BY_DETECTOR + 0.05 * (NUMBERS % 2), DETECTORS, folds)
    assert (figure.value, figure.pairs, figure.all_pairs) == (0.5, 4 * 15 * 5, 2 * 20 * 20)


def test_the_interval_is_the_same_every_time_and_copies_do_not_make_it_narrower():
    generator = np.random.default_rng(0)
    probabilities = np.clip(0.2 * LABELS + generator.normal(0.4, 0.2, 80), 0, 1)
    figure = match(probabilities, DETECTORS)
    assert figure.low < figure.value < figure.high
    assert match(probabilities, DETECTORS) == figure
    copies = np.repeat(NUMBERS, 4)
    copied = compute_matched_auc(LABELS[copies], probabilities[copies], copies, DETECTORS[copies], ONE_FOLD[copies])
    assert (copied.low, copied.high) == pytest.approx((figure.low, figure.high))


def prepare(data: Dataset, **columns: pa.Array) -> Dataset:
    """A test of two images each of the 80 radiographs, whose files were of the given columns."""
    paths = pa.array([f"{number}.png" for number in range(160)])
    (data.folder / "files.parquet").write_parquet(
        pa.table({"path": paths.take(pa.array(range(159, -1, -1)))} | columns)
    )
    shortcuts = {"file size": 0.9, "manufacturer": 0.7}
    return Dataset(data.folder, data.manifest.model_copy(update={"shortcuts": shortcuts}))


def score_images() -> pa.Table:
    numbers = np.repeat(NUMBERS, 2)
    columns = dict.fromkeys(("radiograph_id", "group_id"), numbers)
    columns |= {"row": np.arange(160), "split": ["test"] * 160, "origin": [""] * 160}
    columns |= {"source": [f"{number}.png" for number in range(160)], "label": LABELS[numbers].astype(np.uint8)}
    return pa.table(columns | {"probability": BY_DETECTOR[numbers].astype(np.float32)})


def reverse(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.array(values[::-1].tolist(), kind)


def test_the_figures_of_a_test_are_those_of_its_shortcuts_and_of_size_and_sharpness(dataset):
    """Sides are known by path, not by row. Bytes differ between the images of a radiograph, and not their mean."""
    side = np.repeat(np.where(DETECTORS == "A", 300, 200), 2)
    traits = [[("manufacturer", name), ("view", "AP")] for name in np.repeat(DETECTORS, 2)]
    data = prepare(
        dataset(),
        width=reverse(side, pa.int32()),
        height=reverse(side, pa.int32()),
        bytes=reverse(1000 + 10 * side + np.tile([-7, 7], 80), pa.int64()),
        traits=pa.array(traits[::-1], pa.map_(pa.string(), pa.string())),
    )
    found = evaluate_run(score_images(), data, 0.5)["test"]["radiograph"]
    assert list(found.matched) == ["file size", "manufacturer", "size"], "sharpness is not in this table"
    assert {figure.value for figure in found.matched.values()} == {0.5}
    assert {figure.plain for figure in found.matched.values()} == {0.75}
    assert format_matched(found)[2] == (
        "  radiographs alike in size: AUC 0.500 [0.500, 0.500] (0.750 among all), 600 of 1,600 pairs"
    )
    card = as_json({"test": {"radiograph": found}})["test"]["radiograph"]
    assert card["matched"]["size"] == {
        "value": 0.5,
        "low": 0.5,
        "high": 0.5,
        "pairs": 600,
        "all_pairs": 1600,
        "plain": 0.75,
    }
    assert Metrics.model_validate(card) == found
    earlier = {name: value for name, value in card.items() if name != "matched"}
    assert Metrics.model_validate(earlier).matched == {}, "of an earlier version"


@pytest.mark.parametrize("is_known", [True, False])
def test_the_report_shows_them_where_they_are_known(dataset, tmp_path, is_known: bool):
    side = reverse(np.repeat(np.where(DETECTORS == "A", 300, 200), 2), pa.int32())
    data, scores = prepare(dataset(test=160), width=side, height=side), score_images()
    if not is_known:
        (data.folder / "files.parquet").delete()
    evaluations = evaluate_run(scores, data, 0.5)
    point = OperatingPoint(temperature=1.0, offset=0.0, threshold=0.5, rule="given: 0.5")
    write_report(storage_path(tmp_path), Report("x", data, point, evaluations, [], 0, {}, []), scores)
    page = (tmp_path / "report.html").read_text()
    assert ("AUC among pairs alike in" in page, "600 of 1,600" in page) == (is_known, is_known)


def test_folds_are_matched_within_each(dataset):
    side = reverse(np.repeat(np.where(DETECTORS == "A", 300, 200), 2), pa.int32())
    scores = score_images().append_column("fold", pa.array(["a", "a", "b", "b"] * 40))
    assert match_radiographs(scores, prepare(dataset(), width=side, height=side))["size"].pairs == 4 * 15 * 5


def test_shards_without_their_table_of_files_have_no_matched_figures(dataset):
    side = reverse(np.full(160, 200), pa.int32())
    data = prepare(dataset(), width=side, height=side)
    assert match_radiographs(score_images(), data)["size"].value == 0.75, "all are of one size"
    other = Dataset(data.folder, data.manifest.model_copy(update={"files_sha256": "0" * 64}))
    assert match_radiographs(score_images(), other) == {}, "a table of another writing"
    (data.folder / "files.parquet").delete()
    assert match_radiographs(score_images(), data) == {}
