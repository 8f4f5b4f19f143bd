import pytest

from fracture.cli import main
from fracture.errors import UsageError
from fracture.workflows.explain import ExplainArguments
from tests.conftest import TINY, quick_bundle


@pytest.mark.parametrize("seen", [True, False])
def test_the_page_shows_the_surest_images_and_says_how_many_the_model_has_seen(
    shard_folder, tmp_path, capsys, seen: bool
):
    folder, _ = shard_folder(test=20, hash_byte=0 if seen else 1)  # the bundle's files have 0
    bundle, out = quick_bundle(tmp_path, *TINY), tmp_path / "out"
    flags = ["--bundle", str(bundle), "--shards", str(folder), "--out", str(out), "--count", "2"]
    assert main(["explain", *flags]) == 0
    page, printed = (out / "explanations.html").read_text(), capsys.readouterr()
    assert [path.name for path in out.iterdir()] == ["explanations.html"]
    for text in ("True positives: ", "False positives: ", "True negatives: ", "False negatives: ", "rank correlation"):
        assert text in page
    shown = page.count("data:image/png;base64,") // 2
    assert 2 <= shown <= 8
    assert "16 radiographs in 20 images" in page  # five images are of one
    assert "SYNTHETIC MODEL" in page
    assert ("trained on 20 of these 20 images" in page) == seen
    assert ("trained on 20 of these 20 images" in printed.out) == seen
    assert f"page       {out}/explanations.html" in printed.out


def test_none_of_each_group_is_no_page():
    with pytest.raises(UsageError, match=r"--count 0: how many of each group to show, 1 or more"):
        ExplainArguments(bundle="b", shards="s", out="o", count=0)
