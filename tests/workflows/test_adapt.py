import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score

from fracture.arrays import save_arrays
from fracture.cli import main
from fracture.dataset.format import Dataset, images_of
from fracture.errors import UsageError
from fracture.evaluation.feature_space import are_unlike
from fracture.evaluation.operating_point import calibrate
from fracture.evaluation.scores import run_in_batches, score, score_range
from fracture.inference.adaptation import align, compute_cases
from fracture.inference.batch_prediction import find_inputs
from fracture.inference.bundle import WEIGHTS, Bundle, read_bundle
from fracture.preparation.decoding.decode import decode
from fracture.storage import storage_path
from fracture.workflows.adapt import AdaptArguments, AdaptResult, adapt
from fracture.workflows.evaluate import EvaluateArguments, evaluate, model_caveats
from tests.conftest import TINY, give_space, quick_bundle, write_shards

PRETRAINED = ("data.image_size=32", "model.name=mobilenetv2", "transfer.weights=none")
LOCAL = 7  # the byte that the local files' hashes consist of; those of training are of zeros


@pytest.fixture
def initial(tmp_path: Path) -> Bundle:
    return read_bundle(storage_path(quick_bundle(tmp_path / "made", *TINY)))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Through so many random layers little comes: the last one makes it as large as a trained network's features."""
    bundle = quick_bundle(tmp_path_factory.mktemp("pretrained"), *PRETRAINED)
    change_weights(bundle, "Conv_1_bn/gamma", 1e6)
    return read_bundle(storage_path(bundle))


def change_weights(bundle: Path, name: str, factor: float) -> None:
    arrays = load_file(bundle / WEIGHTS)
    save_arrays(bundle / WEIGHTS, arrays | {name: arrays[name] * np.float32(factor)})


def with_maps(bundle: Bundle) -> Bundle:
    """Make it a bundle whose Grad-CAM maps were compared with those of a random network."""
    card = Path(bundle.folder.path) / "bundle.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"map_similarity": [0.25]}))
    return read_bundle(bundle.folder)


def local_shards(tmp_path: Path, **rows: int) -> Dataset:
    folder = storage_path(tmp_path / "local")
    return Dataset(folder, write_shards(folder, rows, hash_byte=LOCAL))


def images_in(dataset: Dataset, split: str = "test") -> np.ndarray:
    return images_of(dataset.read(split, 0, dataset.rows(split)), dataset.image_size)


def run(initial: Bundle, tmp_path: Path, **arguments: object) -> AdaptResult:
    given = {"shards": str(tmp_path / "local"), "out": str(tmp_path / "out")} | arguments
    return adapt(AdaptArguments(bundle=str(initial.folder), **given), lambda line: None)


def test_calibration_and_threshold_of_a_new_bundle(initial: Bundle, tmp_path: Path):
    images = images_in(local_shards(tmp_path, test=70))
    result = run(with_maps(initial), tmp_path)
    new = read_bundle(result.bundle)
    assert new.adapted == result.adaptation
    assert (new.adapted.fractures, new.adapted.normals, new.adapted.images) == (35, 31, 70)  # five normals are copies
    assert new.adapted.bundle == initial.hash_weights() != new.hash_weights()
    assert list(new.adapted.figures) == ["unadapted", "calibrated"]
    assert new.evaluations == {"test": new.adapted.figures["calibrated"]}
    point = new.operating_point
    assert result.threshold == point.threshold
    assert point.rule.endswith("on the local cases")
    before, after = score(initial.build_model(), images), score(new.build_model(), images)
    assert after == pytest.approx(calibrate(before, point.temperature, point.offset), abs=1e-6)
    assert not np.allclose(before, after, atol=0.01)
    assert new.map_similarity == (0.25,)


def test_a_model_adapted_to_cases_knows_images_like_them(initial: Bundle, tmp_path: Path):
    images = images_in(local_shards(tmp_path, test=70))
    give_space(Path(initial.folder.path))
    before = read_bundle(initial.folder)
    after = read_bundle(run(before, tmp_path).bundle)
    for bundle, unlike in ((before, True), (after, False)):
        distances = bundle.build_measured_network().predict_on_batch(images)[:, 1]
        assert np.isfinite(distances).all()
        assert are_unlike(distances, bundle.load_feature_space()) is unlike


def test_a_model_aligned_without_labels_still_says_what_is_unlike_its_training_images(
    pretrained: Bundle, tmp_path: Path
):
    """Nobody knows how it does on the local images."""
    folder = tmp_path / "initial"
    shutil.copytree(pretrained.folder.path, folder)
    give_space(folder)
    initial = read_bundle(storage_path(folder))
    shards = str(local_shards(tmp_path, test=100).folder)
    after = read_bundle(run(initial, tmp_path, shards=None, align=(shards,)).bundle)
    for name, array in initial.load_feature_space().arrays().items():
        np.testing.assert_array_equal(after.load_feature_space().arrays()[name], array, err_msg=name)


def test_the_old_bundle_stays_as_it_was(initial: Bundle, tmp_path: Path):
    local_shards(tmp_path, test=70)
    before = {file: file.read_bytes() for file in Path(initial.folder.path).rglob("*") if file.is_file()}
    run(initial, tmp_path)
    assert {file: file.read_bytes() for file in Path(initial.folder.path).rglob("*") if file.is_file()} == before


def test_a_ridge_head_becomes_the_last_layer(initial: Bundle, tmp_path: Path):
    """Fractures are brighter, and the model takes what is bright for normal."""
    images = images_in(local_shards(tmp_path, test=210))
    change_weights(Path(initial.folder.path), "logit/kernel", -1.0)
    result = run(with_maps(initial), tmp_path)
    new, labels = read_bundle(result.bundle), np.arange(210) % 2
    assert new.adapted.ridge
    assert new.map_similarity == (), "nobody has looked at the new layer's maps"
    own, ridge = (new.adapted.figures[name]["radiograph"]["auc"] for name in ("unadapted", "ridge"))
    assert own < 0.05 < 0.95 < ridge
    assert new.evaluations["test"] == new.adapted.figures["ridge"]
    called = score(new.build_model(), images) >= new.operating_point.threshold
    assert np.mean(called == labels) > 0.9
    again = read_bundle(run(initial, tmp_path, out=str(tmp_path / "again")).bundle)
    assert (again.hash_weights(), again.operating_point) == (new.hash_weights(), new.operating_point)
    for layer in new.build_model().layers:
        if layer.name != "logit":
            weights = initial.build_model().get_layer(layer.name).get_weights()
            assert all(map(np.array_equal, layer.get_weights(), weights)), layer.name


def test_the_scores_are_those_of_evaluation(initial: Bundle, tmp_path: Path):
    dataset = local_shards(tmp_path, test=150)
    chosen = np.arange(150) % 3 > 0
    rows, model = {"test": chosen}, initial.build_model()
    cases = compute_cases(model, initial, dataset, rows, lambda *progress: None)
    expected = score_range(model, dataset, "test", 0, 150, chosen)
    assert cases.rows.drop("probability").equals(expected.drop("probability"))
    assert cases.rows["probability"].to_numpy() == pytest.approx(expected["probability"].to_numpy(), abs=1e-6)
    assert cases.inputs.shape == (100, 8)


def test_the_folds_can_be_computed_again_from_what_is_left(initial: Bundle, tmp_path: Path):
    local_shards(tmp_path, test=70)
    result = run(initial, tmp_path)
    rows = pq.read_table(tmp_path / "out/predictions.parquet")
    called = rows["probability"].to_numpy() >= rows["threshold"].to_numpy()
    found = int((called & (rows["label"].to_numpy() == 1)).sum())
    assert found == result.adaptation.figures["calibrated"]["image"].true_positives
    assert len(rows) == 70


def test_what_it_was_adapted_to_cannot_test_it(initial: Bundle, tmp_path: Path):
    local_shards(tmp_path, test=70)
    new = run(initial, tmp_path).bundle
    assert read_bundle(new).read_trained_on() > initial.read_trained_on() | {bytes([LOCAL] * 32)}  # and of pixels
    arguments = {"shards": str(tmp_path / "local"), "out": str(tmp_path / "evaluated")}
    with pytest.raises(UsageError, match="the model was trained on every one of these 70 images"):
        evaluate(EvaluateArguments(bundles=(str(new),), **arguments), lambda line: None)


def test_of_shards_with_a_split_test_is_left_for_evaluation(initial: Bundle, tmp_path: Path):
    local_shards(tmp_path, train=60, val=20, test=30)
    adaptation = run(initial, tmp_path).adaptation
    assert adaptation.images == 80


def test_pages_and_screens_say_what_it_was_adapted_to(initial: Bundle, tmp_path: Path):
    local_shards(tmp_path, test=70)
    new = read_bundle(run(initial, tmp_path).bundle)
    text = "calibration and threshold from 66 local radiographs (35 fractures)"
    assert model_caveats([new])[-1] == f"ADAPTED MODEL: {text}. Its own test is that by folds of those cases."
    assert model_caveats([initial, new])[-1].startswith(f"ADAPTED MODEL: {new.folder}: {text}")
    folder = storage_path(tmp_path / "others")
    write_shards(folder, {"test": 30}, hash_byte=9)
    arguments = {"shards": str(folder), "out": str(tmp_path / "evaluated")}
    evaluated = evaluate(EvaluateArguments(bundles=(str(new.folder),), **arguments), lambda line: None)
    assert evaluated.own == new.evaluations["test"]
    assert text in (tmp_path / "evaluated/report.html").read_text()


OF_TRAINING = [
    "SHORTCUTS: in this data, size (AUC 0.91) alone predicts the class; a model may use it too.",
    "labels of abnormality, not of fractures",
]
OF_ITS_TEST = ["LEAKAGE: 1 of 9 test images ...", "NOT TESTED: source 'east' ....", "FEW: the test has groups of ..."]


def test_a_new_bundle_has_the_caveats_of_training_and_of_the_local_cases(initial: Bundle, tmp_path: Path):
    """Those about the test of the initial model are not about the new one, which was tested on the local cases."""
    card = initial.folder / "bundle.json"
    card.write_json(card.read_json() | {"caveats": [*OF_TRAINING, *OF_ITS_TEST]})
    dataset = local_shards(tmp_path, train=60, val=20, test=8)
    groups = {split: {"fracture": 1, "normal": 1} for split in dataset.splits}
    facts = {"synthetic": False, "shortcuts": {"sharpness": 0.8}, "notes": OF_TRAINING[1:], "groups": groups}
    manifest = dataset.manifest.model_copy(update=facts)
    (dataset.folder / "dataset.json").write_json(manifest.model_dump(mode="json"))
    result = run(read_bundle(initial.folder), tmp_path)
    local = (
        "LOCAL CASES, SHORTCUTS: in this data, sharpness (AUC 0.80) alone predicts the class; a model may use it too."
    )
    assert read_bundle(result.bundle).caveats == (*OF_TRAINING, local), "there are many local cases"
    assert result.caveats[-3:] == [*OF_TRAINING, local]


def test_the_command_shows_the_figures_and_where_the_bundle_is(initial: Bundle, tmp_path: Path, capsys):
    local_shards(tmp_path, test=100)
    change_hashes(tmp_path / "local", np.arange(80, 100))
    out, given = str(tmp_path / "out"), ["--shards", str(tmp_path / "local")]
    assert main(["adapt", "--bundle", str(initial.folder), *given, "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "left out   20 images that the model was trained on, or that share a radiograph" in printed
    assert "unadapted  76 radiographs: AUC " in printed
    assert "calibrated 76 radiographs, by folds: AUC " in printed
    assert "adapted    calibration and threshold from 76 local radiographs (40 fractures)" in printed
    assert f"bundle     {out}/bundle (threshold 0." in printed
    assert main(["adapt", "--bundle", str(initial.folder), *given, "--out", out]) == 2
    assert "error: --out" in capsys.readouterr().err


def change_hashes(folder: Path, seen: np.ndarray) -> None:
    """Make the files of some groups those that the model was trained on."""
    file = storage_path(folder / "files.parquet")
    table = file.read_parquet()
    hashes = [bytes([0 if group in seen else LOCAL] * 32) for group in table["group_id"].to_pylist()]
    file.write_parquet(table.set_column(0, "sha256", pa.array(hashes, pa.binary(32))))


def test_cases_that_the_model_was_trained_on_are_left_out(initial: Bundle, tmp_path: Path):
    local_shards(tmp_path, test=100)
    change_hashes(tmp_path / "local", np.arange(80, 100))
    result = run(initial, tmp_path)
    assert result.left_out == 20
    assert result.adaptation.images == 80


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (50, r"46 radiographs \(and 50 images that the model was trained on, which do not count\) are too few"),
        (100, "the model was trained on every one of these 100 images.*there is nothing local to adapt to"),
    ],
)
def test_too_few_cases_are_new_to_the_model(initial: Bundle, tmp_path: Path, seen: int, message: str):
    local_shards(tmp_path, test=100)
    change_hashes(tmp_path / "local", np.arange(100 - seen, 100))
    with pytest.raises(UsageError, match=message):
        run(initial, tmp_path)
    assert not (tmp_path / "out").exists()


def test_ten_local_cases(initial: Bundle, tmp_path: Path):
    local_shards(tmp_path, test=10)
    with pytest.raises(UsageError, match="6 radiographs are too few to adapt to: a threshold chosen on fewer than 50"):
        run(initial, tmp_path)


def test_shards_of_another_image_size(initial: Bundle, tmp_path: Path):
    write_shards(storage_path(tmp_path / "local"), {"test": 70}, image_size=48)
    with pytest.raises(UsageError, match="the model needs a test split of images of 32 pixels; these shards have"):
        run(initial, tmp_path)


def test_a_bundle_is_never_replaced(initial: Bundle, tmp_path: Path):
    with pytest.raises(UsageError, match=r"--out .* holds a bundle, which is never changed. Name another folder"):
        run(initial, tmp_path, out=str(initial.folder.parent))
    with pytest.raises(UsageError, match=r"--out .* is a run or a bundle, whose files would be replaced"):
        run(initial, tmp_path, shards=None, align=("images",), out=str(initial.folder))


def test_an_adapted_model_is_not_adapted_again(initial: Bundle, tmp_path: Path):
    local_shards(tmp_path, test=70)
    new = read_bundle(run(initial, tmp_path).bundle)
    with pytest.raises(UsageError, match="is adapted already: calibration and threshold from 66 local radiographs"):
        run(new, tmp_path, out=str(tmp_path / "again"))


def test_something_local_is_needed():
    with pytest.raises(UsageError, match="give --data or --shards, local cases with labels, or --align"):
        AdaptArguments(bundle="a", out="b")
    with pytest.raises(UsageError, match="give either --data or --shards"):
        AdaptArguments(bundle="a", out="b", align=("c",), labels="d")


def test_aligned_features_have_the_mean_and_variance_of_the_local_images(pretrained: Bundle, image_folder, tmp_path):
    folder = image_folder(*(f"unlabelled/{number}.png" for number in range(101)))
    (folder / "unlabelled/5.png").write_bytes(b"no image")
    model, inputs = pretrained.build_model(), find_inputs([storage_path(folder)], 32)
    assert align(model, inputs, 32, lambda *progress: None) == 100
    before, after = pretrained.build_model(), model
    layer = after.get_layer("standardise")
    network = keras.Model(after.input, layer.output)
    files = [file for number in range(101) if (file := folder / f"unlabelled/{number}.png") and number != 5]
    images = np.stack([decode(file.read_bytes(), 32).pixels for file in files])[..., None]
    features = network.predict_on_batch(images)
    mean, variance = layer.get_weights()
    assert mean.max() > 0.01
    assert features.mean(0) == pytest.approx(np.zeros_like(mean), abs=1e-3)
    assert features.var(0) == pytest.approx(variance / (variance + layer.epsilon), rel=1e-2, abs=1e-4)
    assert features.var(0).max() > 0.1
    changed = [
        one.name
        for one, other in zip(after.layers, before.layers, strict=True)
        if not all(map(np.array_equal, one.get_weights(), other.get_weights()))
    ]
    assert changed == ["standardise"]


def test_images_without_labels_give_a_bundle_without_a_test(pretrained: Bundle, tmp_path: Path):
    shards = str(local_shards(tmp_path, test=100).folder)
    folder = storage_path(shutil.copytree(pretrained.folder.path, tmp_path / "pretrained"))
    (folder / "bundle.json").write_json((folder / "bundle.json").read_json() | {"caveats": OF_TRAINING + OF_ITS_TEST})
    result = run(read_bundle(folder), tmp_path, shards=None, align=(shards,))
    new = read_bundle(result.bundle)
    assert new.adapted == result.adaptation
    assert new.caveats == tuple(OF_TRAINING)
    assert new.adapted.describe() == "features standardised by 100 local images"
    assert model_caveats([new])[-1].endswith("standardised by 100 local images. It has no test of its own.")
    assert new.evaluations["test"]["radiograph"].count == 0
    assert new.evaluations["test"]["radiograph"]["auc"] is None
    assert result.threshold == new.operating_point.threshold == pretrained.operating_point.threshold
    assert new.read_trained_on() == pretrained.read_trained_on(), "no label of theirs was used"
    write_shards(storage_path(tmp_path / "others"), {"test": 30}, hash_byte=9)
    arguments = {"shards": str(tmp_path / "others"), "out": str(tmp_path / "evaluated")}
    assert evaluate(EvaluateArguments(bundles=(str(new.folder),), **arguments), lambda line: None).own is None


def test_evaluation_shows_what_alignment_would_gain(pretrained: Bundle, tmp_path: Path):
    """The first five rows of label 0 are one radiograph, of which the first counts: all names are of one length."""
    dataset = local_shards(tmp_path, test=110)
    images, labels = images_in(dataset), np.arange(110) % 2
    alone = np.r_[0, np.setdiff1d(np.arange(110), np.arange(10)[::2])]
    model, out = pretrained.build_model(), tmp_path / "out"
    arguments = EvaluateArguments(bundles=(str(pretrained.folder),), shards=str(dataset.folder), out=str(out))
    trial = evaluate(arguments, lambda line: None).alignment
    assert trial.radiographs == len(alone) == 106
    assert trial.plain.value == pytest.approx(roc_auc_score(labels[alone], score(model, images)[alone]), abs=1e-6)
    network = keras.Model(model.input, model.get_layer("standardise").input)
    features = run_in_batches(network, images)[alone]
    model.get_layer("standardise").set_weights([features.mean(0), features.var(0)])
    assert trial.aligned.value == pytest.approx(roc_auc_score(labels[alone], score(model, images)[alone]), abs=1e-3)
    assert trial.aligned != trial.plain
    assert json.loads((out / "metrics.json").read_text())["aligned"] == trial.model_dump()
    assert f"Aligned: AUC {trial.aligned.value:.3f} [" in (out / "report.html").read_text()


def test_labels_show_what_alignment_does(pretrained: Bundle, tmp_path: Path):
    dataset = local_shards(tmp_path, test=110)
    result = run(pretrained, tmp_path, align=(str(dataset.folder),))
    assert list(result.adaptation.figures) == ["unadapted", "aligned", "calibrated"]
    unadapted, aligned, _ = (one["radiograph"]["loss"] for one in result.adaptation.figures.values())
    assert unadapted != aligned
    assert result.adaptation.describe() == (
        "features standardised by 110 local images; calibration and threshold from 106 local radiographs (55 fractures)"
    )


def test_fewer_than_a_hundred_images_are_not_aligned_to(pretrained: Bundle, image_folder, tmp_path: Path):
    message = "--align: 99 images that can be read are too few.*fewer than 100 are chance. Name more local images"
    folder = image_folder(*(f"{number}.png" for number in range(99)))
    with pytest.raises(UsageError, match=message):
        run(pretrained, tmp_path, shards=None, align=(str(folder),))
    (folder / "damaged.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=message):
        run(pretrained, tmp_path, shards=None, align=(str(folder),))
    assert not (tmp_path / "out").exists()


def test_a_network_without_standardised_features_is_not_aligned(initial: Bundle, tmp_path: Path):
    dataset = local_shards(tmp_path, test=100)
    with pytest.raises(UsageError, match="--align: the network cnn has no standardised features to align"):
        run(initial, tmp_path, shards=None, align=(str(dataset.folder),))


def test_the_new_bundle_is_not_written_into_the_images(pretrained: Bundle, image_folder, tmp_path: Path):
    folder = image_folder(*(f"{number}.png" for number in range(100)))
    with pytest.raises(UsageError, match=r"--out .*: is inside the data, .*, which is never written to"):
        run(pretrained, tmp_path, shards=None, align=(str(folder),), out=str(folder / "new"))
