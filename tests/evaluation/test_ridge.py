import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import Ridge
from sklearn.metrics import log_loss, roc_auc_score

from fracture.evaluation.ridge import assign_folds, fit_ridge

EACH_ALONE = np.arange(240)


def draw(count: int, width: int, signal: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Draw standardised features, of which the first tells the class, and labels: a third are fractures."""
    generator = np.random.default_rng(0)
    labels = (np.arange(count) % 3 == 0).astype(np.uint8)
    features = generator.normal(size=(count, width))
    features[:, 0] += signal * labels
    return ((features - features.mean(0)) / features.std(0)).astype(np.float32), labels


@pytest.mark.parametrize("width", [20, 500], ids=["more rows than features", "more features than rows"])
def test_the_kernel_points_where_scikit_learns_ridge_does(width: int):
    features, labels = draw(240, width)
    weights = np.where(np.arange(240) < 100, 1.0, 0.5)
    sums = [weights[labels == label].sum() for label in (0, 1)]
    balanced = weights / np.array(sums)[labels] * weights.sum() / 2
    expected = Ridge(0.3 * width).fit(features, np.where(labels, 1.0, -1.0), balanced)
    found = fit_ridge(features, labels, weights, EACH_ALONE, [0.3])
    assert found.penalty == 0.3
    slope = np.linalg.norm(found.kernel) / np.linalg.norm(expected.coef_)  # of scores as logits
    assert found.kernel / slope == pytest.approx(expected.coef_, rel=1e-4, abs=1e-6)


def test_two_features_by_hand():
    """Sums of x·t of 16 and 48, of x² of 32 and 288, and 16 · 2 as penalty: 16 / (32 + 32) to 48 / (288 + 32)."""
    labels = np.tile([1, 1, 1, 1, 0, 0, 0, 0], 4)
    first, second = [1, 1, 1, -1, -1, -1, -1, 1], [3, 3, -3, 3, -3, -3, 3, -3]
    features = np.stack([np.tile(first, 4), np.tile(second, 4)], axis=1)
    found = fit_ridge(features, labels, np.ones(32), np.arange(32), [16.0])
    assert found.kernel[0] / found.kernel[1] == pytest.approx(0.25 / 0.15)
    assert found.kernel[0] > 0


def test_the_scores_are_logits():
    """They need no slope and no offset: a third are fractures, though both classes weigh the same in the fit."""
    features, labels = draw(3000, 5)
    found = fit_ridge(features, labels, np.ones(3000), np.arange(3000))
    logits = features @ found.kernel + found.bias
    assert expit(logits).mean() == pytest.approx(1 / 3, abs=0.01)
    losses = {slope: log_loss(labels, expit(slope * logits)) for slope in (0.8, 1.0, 1.25)}
    assert min(losses, key=losses.__getitem__) == 1.0
    assert found.logits == pytest.approx(logits, abs=0.2)  # out of fold, of nearly the same head
    assert not np.array_equal(found.logits, logits)


def test_the_penalty_is_chosen_by_what_the_folds_have_not_seen():
    """Of 400 features in 60 rows one says something: on the rows fitted on, every penalty ranks perfectly."""
    features, labels = draw(60, 400, signal=1.5)
    found = fit_ridge(features, labels, np.ones(60), np.arange(60))
    assert roc_auc_score(labels, features @ found.kernel) == 1
    assert found.aucs[found.penalty] == max(found.aucs.values()) < 0.9
    assert roc_auc_score(labels, found.logits) < 0.9


def test_of_penalties_as_good_the_strongest_is_taken():
    """With one feature, every penalty ranks alike."""
    features, labels = draw(240, 1)
    found = fit_ridge(features, labels, np.ones(240), EACH_ALONE, [1.0, 10.0, 0.1])
    assert len(set(found.aucs.values())) == 1
    assert found.penalty == 10


def test_copies_of_a_group_do_not_count_double():
    features, labels = draw(120, 30)
    alone = fit_ridge(features, labels, np.ones(120), np.arange(120))
    copied = np.r_[np.zeros(50, int), 0:120]
    weights = np.r_[np.full(50, 1 / 51), 1 / 51, np.ones(119)]
    again = fit_ridge(features[copied], labels[copied], weights, copied, [alone.penalty])
    # Other folds choose the scale, not the direction.
    assert again.kernel / np.linalg.norm(again.kernel) == pytest.approx(alone.kernel / np.linalg.norm(alone.kernel))


def test_a_group_is_in_one_fold_and_each_fold_has_both_classes():
    groups = np.repeat(np.arange(50), 4)
    labels = (groups % 3 == 0).astype(np.uint8)
    folds = assign_folds(labels, groups)
    assert all(len(np.unique(folds[groups == group])) == 1 for group in range(50))
    assert [sorted({*labels[folds == fold].tolist()}) for fold in range(5)] == [[0, 1]] * 5
    assert assign_folds(labels, groups).tolist() == folds.tolist()


def test_there_are_no_more_folds_than_groups_of_the_rarer_class():
    groups = np.arange(20)
    assert set(assign_folds((groups < 3).astype(np.uint8), groups).tolist()) == {0, 1, 2}
