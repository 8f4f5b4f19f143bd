import io
from collections import Counter, defaultdict
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fracture.config import DataConfig, SampleConfig
from fracture.errors import UsageError
from fracture.preparation.decoding.decode import decode
from fracture.preparation.decoding.dicom import read_header
from fracture.preparation.identity import PatientKey
from fracture.preparation.sample import draw_sample, make_sample
from fracture.preparation.source import find_source
from fracture.storage import storage_path


def test_each_split_has_as_many_of_both_classes(sample_images):
    counts = Counter(path.rsplit("/", 1)[0] for path in sample_images)
    assert len(sample_images) == 120
    assert all(counts[f"{split}/fracture"] == counts[f"{split}/normal"] > 0 for split in ("train", "val", "test"))


def test_no_patient_is_in_two_splits(sample_images):
    splits = defaultdict(set)
    for path in sample_images:
        splits[path.rsplit("/", 1)[1].split("-")[0]].add(path.split("/")[0])
    assert {len(s) for s in splits.values()} == {1}
    assert len(splits) == 40  # three views each


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(sample_images):
    again = draw_sample(SampleConfig(images=120))
    assert [next(again) for _ in range(6)] == list(sample_images.items())[:6]
    assert next(draw_sample(SampleConfig(images=240, seed=1)))[1] != next(iter(sample_images.values()))


def test_images_differ_in_size_and_exposure(sample_images):
    sizes, means = zip(
        *((image.size, np.asarray(image).mean()) for image in map(opened, sample_images.values())), strict=True
    )
    assert len(set(sizes)) > 100
    assert np.ptp(means) > 60


@pytest.mark.long
def test_size_and_brightness_alone_do_not_predict_a_fracture():
    features, labels, patients = [], [], []
    for path, data in draw_sample(SampleConfig(images=600)):
        pixels = np.asarray(opened(data))
        features.append([*pixels.shape, pixels.mean(), pixels.std()])
        labels.append("/fracture/" in path)
        patients.append(path.rsplit("/", 1)[1].split("-")[0])
    model = make_pipeline(StandardScaler(), LogisticRegression())
    scores = cross_val_predict(model, features, labels, groups=patients, cv=GroupKFold(5), method="predict_proba")
    assert 0.4 < roc_auc_score(labels, scores[:, 1]) < 0.6


def test_a_sample_folder_is_a_source_marked_synthetic_and_made_once(tmp_path):
    folder, config = storage_path(tmp_path / "sample"), SampleConfig(images=60)
    progress = []
    make_sample(folder, config, progress.append)
    source = find_source([folder], DataConfig())
    assert source.synthetic
    assert len(source.files) == 60
    assert progress == list(range(1, 61))
    make_sample(folder, config, progress.append)
    assert len(progress) == 60
    assert find_source([folder], DataConfig()).hash_listing() == source.hash_listing()


def test_a_sample_in_dicom_shows_the_same_pictures_in_sixteen_encodings(sample_images, tmp_path):
    dicom = dict(islice(draw_sample(SampleConfig(images=60, format="dicom")), 16))
    decoded = {path: decode(data, 64) for path, data in dicom.items()}
    assert len({read_header(data).transfer_syntax for data in dicom.values()}) == 4
    assert {image.mode for image in decoded.values()} == {
        f"MONOCHROME{number} {bits} bit" for number in (1, 2) for bits in (12, 16)
    }
    plain = list(draw_sample(SampleConfig(images=60)))[:16]
    for image, (path, data) in zip(decoded.values(), plain, strict=True):
        if path.endswith(".png"):  # the others are compressed with loss
            assert np.abs(image.pixels.astype(int) - decode(data, 64).pixels).max() <= 1


def test_a_sample_in_dicom_has_patients_and_studies_under_a_key(tmp_path):
    folder, config = storage_path(tmp_path / "sample"), SampleConfig(images=60, format="dicom")
    make_sample(folder, config)
    source = find_source([folder], DataConfig(), key=PatientKey(tmp_path / "patients.key"))
    assert (source.is_private, source.synthetic, source.split_fault) == (True, True, "")
    assert {len(file.patients) for file in source.files} == {1}
    assert len({file.study for file in source.files}) == 20
    assert not any("patient" in file.path for file in source.files)
    some = source.files[0]
    assert source.locate(some.path).read_bytes()[128:132] == b"DICM"
    with pytest.raises(UsageError, match="written only as HMACs under a secret key"):
        find_source([folder], DataConfig())


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))
