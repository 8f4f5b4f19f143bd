from collections import Counter

import numpy as np
import pytest

from fracture.config import DataConfig
from fracture.errors import UsageError
from fracture.labels import SPLITS
from fracture.preparation.split import RETIRED, Assignment, assign_by_source, assign_groups, compute_shares

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def families(sizes: list[int], first: int = 0) -> tuple[np.ndarray, list[str]]:
    groups = np.repeat(np.arange(first, first + len(sizes)), sizes)
    return groups, [f"{g:04d}-{i:05d}" for i, g in enumerate(groups)]


def splits_of(groups: np.ndarray, splits: np.ndarray) -> dict[int, str]:
    assert all(len(set(splits[groups == g])) == 1 for g in np.unique(groups)), "no group straddles"
    return {int(g): str(splits[groups == g][0]) for g in np.unique(groups)}


def test_each_split_gets_its_share_of_both_classes_and_of_the_large_families():
    sizes = [100] * 10 + [10] * 20 + [1] * 70
    groups, hashes = families(sizes * 2)
    labels = (groups >= 100).astype(int)
    split_of = splits_of(groups, assign_groups(groups, labels, hashes, SHARES, seed=0).splits)
    for label in (0, 1):
        of_class = [split_of[g] for g in range(100 * label, 100 * label + 100)]
        assert Counter(of_class) == {"train": 70, "val": 15, "test": 15}
        large = Counter(of_class[:10])
        assert large["train"] == 7
        assert sorted([large["val"], large["test"]]) == [1, 2]


def test_contents_and_seed_decide_not_the_order():
    groups, hashes = families([3] * 40)
    labels = groups % 2
    one = assign_groups(groups, labels, hashes, SHARES, seed=0).splits
    shuffled = np.random.default_rng(0).permutation(len(groups))
    other = assign_groups(
        groups[shuffled] + 1000, labels[shuffled], [hashes[i] for i in shuffled], SHARES, seed=0
    ).splits
    assert other.tolist() == one[shuffled].tolist()
    assert assign_groups(groups, labels, hashes, SHARES, seed=1).splits.tolist() != one.tolist()


def test_assigned_groups_stay_when_more_are_added():
    groups, hashes = families([2] * 40)
    before = assign_groups(groups, groups % 2, hashes, SHARES, seed=0).splits
    previous = dict(zip(hashes, before.tolist(), strict=True))
    more, more_hashes = families([2] * 90)
    more_hashes = [h if i < 80 else f"new{h}" for i, h in enumerate(more_hashes)]
    after = assign_groups(more, more % 2, more_hashes, SHARES, seed=0, previous=previous)
    assert after.splits[:80].tolist() == before.tolist()
    assert after.moved == []
    counts = Counter(after.splits[::2].tolist())
    assert counts["train"] in (62, 63, 64), "0.7 of 90"
    assert counts["val"] in (13, 14)


@pytest.mark.parametrize("other", ["train", "val"])
def test_a_test_group_that_new_images_join_to_another_split_is_retired_for_good(other: str):
    groups, hashes = families([1] * 40)
    before = assign_groups(groups, groups % 2, hashes, SHARES, seed=0).splits
    test, rest = (int(np.flatnonzero((before == split) & (groups % 2 == 0))[0]) for split in ("test", other))
    joined = groups.copy()
    joined[rest] = joined[test]
    for _ in range(2):
        previous = dict(zip(hashes, before.tolist(), strict=True))
        after = assign_groups(joined, groups % 2, hashes, SHARES, 0, previous)
        assert after.splits[[test, rest]].tolist() == [RETIRED, other]
        others = np.setdiff1d(np.arange(40), [test, rest])
        assert after.splits[others].tolist() == before[others].tolist()
        before = after.splits
    first = assign_groups(joined, groups % 2, hashes, SHARES, 0, previous | {hashes[test]: "test"})
    assert first.moved == [f"{min(hashes[test], hashes[rest])[:12]}: {', '.join(sorted(['test', other]))}"]


def test_a_validation_group_that_new_images_join_to_training_trains():
    groups, hashes = families([1] * 40)
    before = assign_groups(groups, groups % 2, hashes, SHARES, seed=0).splits
    train, val = (int(np.flatnonzero((before == split) & (groups % 2 == 0))[0]) for split in ("train", "val"))
    joined = groups.copy()
    joined[val] = joined[train]
    after = assign_groups(joined, groups % 2, hashes, SHARES, 0, dict(zip(hashes, before.tolist(), strict=True)))
    assert after.splits[[train, val]].tolist() == ["train", "train"]


def test_a_new_image_of_a_retired_group_trains():
    groups, hashes = families([1] * 40)
    joined = groups.copy()
    joined[1] = joined[0]
    after = assign_groups(joined, groups % 2, hashes, SHARES, 0, {hashes[0]: RETIRED})
    assert after.splits[:2].tolist() == [RETIRED, "train"]


def test_three_groups_of_a_class_are_enough_for_three_splits():
    groups, hashes = families([5, 5, 5, 1, 1, 1])
    labels = (groups >= 3).astype(int)
    split_of = splits_of(groups, assign_groups(groups, labels, hashes, SHARES, seed=0).splits)
    assert {split_of[g] for g in (0, 1, 2)} == {split_of[g] for g in (3, 4, 5)} == set(SPLITS)


@pytest.mark.parametrize("sizes", [[50, 50], [1, 1], [400]])
def test_too_few_groups_of_a_class(sizes):
    groups, hashes = families([1] * 30 + sizes)
    labels = (groups >= 30).astype(int)
    message = rf"class 'fracture' has {len(sizes)} separate radiographs or patients, and split .* gets none of them"
    with pytest.raises(UsageError, match=message):
        assign_groups(groups, labels, hashes, SHARES, seed=0)


def test_folds_are_alike():
    groups, hashes = families([30] * 10 + [1] * 90)
    labels = groups % 2
    shares = compute_shares(DataConfig(folds=5))
    assert tuple(shares) == ("fold-1", "fold-2", "fold-3", "fold-4", "fold-5")
    split_of = splits_of(groups, assign_groups(groups, labels, hashes, shares, seed=0).splits)
    for label in (0, 1):
        assert set(Counter(split_of[g] for g in split_of if g % 2 == label).values()) == {10}
    assert set(Counter(split_of[g] for g in range(10)).values()) == {2}


def test_each_source_is_a_fold_with_a_part_that_validates():
    groups, hashes = families([2] * 60)
    origins = ["south" if group < 20 else "north" for group in groups]
    labels = groups % 2
    assignment = assign_by_source(groups, labels, hashes, origins, DataConfig(folds="source"))
    assert (assignment.sources, assignment.untested) == (("north", "south"), ())
    split_of = splits_of(groups, assignment.splits)
    assert Counter(split_of[g] for g in range(20)) == {"fold-2": 18, "fold-2-val": 2}
    assert Counter(split_of[g] for g in range(20, 60)) == {"fold-1": 34, "fold-1-val": 6}


def test_a_group_of_two_sources_is_in_one_fold():
    groups, hashes = families([2] * 40)
    origins = ["south" if group < 20 else "north" for group in groups]
    origins[0] = "north"
    assignment = assign_by_source(groups, groups % 2, hashes, origins, DataConfig(folds="source"))
    assert {split[:6] for split in assignment.splits[:2]} == {"fold-1"}


def test_validation_parts_of_sources_stay_when_the_data_has_grown():
    """East sorts first, so all folds get another number."""
    groups, hashes = families([2] * 40)
    origins = ["south" if group % 4 < 2 else "north" for group in groups]
    config = DataConfig(folds="source")
    few = assign_by_source(groups, groups % 2, hashes, origins, config).splits
    more, more_hashes = families([2] * 40, first=40)
    everything, previous = np.r_[groups, more], dict(zip(hashes, few, strict=True))
    origins += ["east" if group % 4 < 2 else "south" for group in more]
    many = assign_by_source(everything, everything % 2, hashes + more_hashes, origins, config, previous).splits
    assert [split.endswith("-val") for split in many[:80]] == [split.endswith("-val") for split in few]
    assert many[0] == few[0].replace("fold-2", "fold-3")


def by_source(fractures: dict[str, int], normals: dict[str, int]) -> Assignment:
    """Assign so many radiographs of each source and class, each a group of its own."""
    counts = [(name, label, count) for label, each in ((1, fractures), (0, normals)) for name, count in each.items()]
    origins = [name for name, _, count in counts for _ in range(count)]
    labels = np.repeat([label for _, label, _ in counts], [count for *_, count in counts])
    groups, hashes = families([1] * len(origins))
    return assign_by_source(groups, labels, hashes, origins, DataConfig(folds="source"))


def test_a_source_of_one_class_trains_and_is_no_fold():
    """Of 20 radiographs of a class 3 validate; north, the first by name of the others, has the first fold."""
    found = by_source({"north": 20, "south": 20}, {"east": 7, "north": 20, "south": 20})
    assert found.sources == ("north", "south")
    assert found.untested == (
        "source 'east' has 0 separate fractured and 7 normal radiographs or patients, and needs two of each to be "
        "tested; it trains in every fold",
    )
    assert Counter(found.splits.tolist()) == {
        **{"fold-1": 34, "fold-1-val": 6, "fold-2": 34, "fold-2-val": 6},
        "untested": 7,
    }


def test_a_source_with_one_radiograph_of_a_class_cannot_be_tested_and_validate():
    found = by_source({"a": 10, "b": 10, "c": 1}, {"a": 10, "b": 10, "c": 10})
    assert found.sources == ("a", "b")
    assert found.untested[0].startswith("source 'c' has 1 separate fractured and 10 normal radiographs or patients")
    assert Counter(found.splits.tolist())["untested"] == 11


def test_a_source_that_got_its_second_class_becomes_a_fold():
    """Its radiographs trained in every fold before, so none is kept out of its validation."""
    groups, hashes = families([1] * 60)
    origins = ["abc"[group // 20] for group in groups]
    labels = groups % 2 * (groups < 40)
    config = DataConfig(folds="source")
    before = assign_by_source(groups, labels, hashes, origins, config)
    assert before.sources == ("a", "b")
    more, more_hashes = families([1] * 20, first=60)
    everything, previous = np.r_[groups, more], dict(zip(hashes, before.splits, strict=True))
    labels, origins = np.r_[labels, np.ones(20, int)], origins + ["c"] * 20
    after = assign_by_source(everything, labels, hashes + more_hashes, origins, config, previous)
    assert (after.sources, after.untested) == (("a", "b", "c"), ())
    assert after.splits[:40].tolist() == before.splits[:40].tolist()
    assert Counter(after.splits[40:].tolist()) == {"fold-3": 34, "fold-3-val": 6}
    assert (after.splits[40:60] == "fold-3-val").sum() == 3, "of each class"


def test_a_source_whose_radiographs_are_all_of_another_is_no_fold():
    groups, hashes = families([2] * 40)
    origins = ["c"] * 40 + ["a", "b"] * 10 + ["a"] * 20  # each of 10 groups of a has an image of b
    assignment = assign_by_source(groups, groups % 2, hashes, origins, DataConfig(folds="source"))
    assert assignment.sources == ("a", "c")
    assert assignment.untested == ("source 'b' has no radiograph or patient of its own, and is tested with the others",)
    assert "untested" not in assignment.splits
    with pytest.raises(UsageError, match=r"can test on 'a' alone, .* source 'b' has no radiograph or patient of its"):
        assign_by_source(groups, groups % 2, hashes, ["a", "b"] * 40, DataConfig(folds="source"))


def test_folds_by_source_need_two_sources():
    groups, hashes = families([1] * 20)
    for origin, named in (("", "one source"), ("north", "one source, 'north'")):
        message = rf"tests each source by a model of the others, and all 20 images are of {named}\. Name several --data"
        with pytest.raises(UsageError, match=message):
            assign_by_source(groups, groups % 2, hashes, [origin] * 20, DataConfig(folds="source"))


def test_folds_by_source_need_to_know_each_source():
    groups, hashes = families([1] * 20)
    with pytest.raises(UsageError, match=r"needs to know where each file is from, and 5 of 20 have no source"):
        assign_by_source(groups, groups % 2, hashes, ["a"] * 15 + [""] * 5, DataConfig(folds="source"))


def test_folds_by_source_need_two_sources_with_both_classes():
    """The images say so before they are decoded, the radiographs and patients afterwards."""
    with pytest.raises(
        UsageError,
        match=r"nothing to test on: source 'a' has 9 fractured and 0 normal images; source 'b' has 0 fractured and 8 n",
    ):
        by_source({"a": 9}, {"b": 8})
    alone = (
        r"can test on 'a' alone, and then has no other source with two of each class to validate on: source 'b' has "
    )
    with pytest.raises(UsageError, match=alone + "0 fractured and 8 normal images"):
        by_source({"a": 9}, {"a": 9, "b": 8})
    with pytest.raises(UsageError, match=alone + "1 separate fractured and 8 normal radiographs or patients"):
        by_source({"a": 9, "b": 1}, {"a": 9, "b": 8})
    with pytest.raises(UsageError, match=r"nothing to test on: source 'a' has 1 separate fractured .*source 'b' has 1"):
        by_source({"a": 1, "b": 1}, {"a": 9, "b": 8})
