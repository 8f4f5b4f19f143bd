import pytest

from fracture.preparation.layouts.clutter import ANNOTATION, CLUTTER, DOCUMENT, find_reason, is_clutter, sort_out


@pytest.mark.parametrize(
    "path",
    [
        *(".DS_Store", "__MACOSX/fracture/1.png", "fracture/._1.png", ".Trashes/501/1.png", "fracture/Icon\r"),
        *("fracture/Thumbs.db", "THUMBS.DB", "ehthumbs.db", "fracture/Desktop.ini", "$RECYCLE.BIN/S-1-5/$RA1.png"),
        *("RECYCLER/a.png", "System Volume Information/IndexerVolumeGuid", "FOUND.000/FILE0000.CHK", "lost+found/1"),
        *("fracture/@eaDir/1.png/SYNOPHOTO_THUMB_XL.jpg", "#recycle/1.png", "#snapshot/day/fracture/1.png"),
        *("fracture/.@__thumb/s1001.png", "@Recycle/1.png", "@Recently-Snapshot/x/1.png", "~snapshot/hourly.0/1.png"),
        *(
            "DCIM/100CANON/MVI_0001.THM",
            "fracture/1.xmp",
            "fracture/IMG_1.AAE",
            ".thumbnails/1.png",
            "ZbThumbnail.info",
        ),
        *("fracture/1.png.lnk", "fracture/~WRL1.tmp", "~$labels.xlsx", ".~lock.labels.csv#", "#labels.csv#", "a.png~"),
        *("fracture/1.png.part", "fracture/1.png.crdownload", "1.png.filepart", ".1.png.icloud", ".nfs00000001"),
        *(".ipynb_checkpoints/1-checkpoint.png", "__pycache__/a.cpython-311.pyc", ".git/index", "labels.cache"),
        *(
            "1.png:Zone.Identifier",
            "1.png:AFP_AfpInfo",
            "1.png@SynoEAStream",
            "fracture/1.sync-conflict-20240102-1-A.png",
        ),
        *("fracture/1 (Anna's conflicted copy 2024-01-02).png", "1 (SFConflict anna 2024-01-02).png"),
    ],
)
def test_what_machines_leave_is_clutter(path: str):
    assert is_clutter(path)
    assert sort_out([path]) == ([], {CLUTTER: 1})


def test_the_marker_of_generated_radiographs_is_clutter_that_nobody_left():
    assert is_clutter("SYNTHETIC.json")
    assert sort_out(["SYNTHETIC.json", "1.png"]) == (["1.png"], {})
    left_out = sort_out(["my SYNTHETIC.json"])[1]
    assert sum(left_out.values()) == 1, "of another name it is somebody's"


@pytest.mark.parametrize(
    "path",
    [
        *(
            "fracture/1.png",
            "fracture/1",
            "DCIM/100CANON/IMG_0001.JPG",
            "thumbs/left_thumb.png",
            "1 (2).png",
            "1.2.840.113",
        ),
        *("recyclers/1.png", "a~b/1.png", "data@home/1.png", "#1/1.png", "part/1.png", "R\udcf6ntgen.png", "tmp/1.png"),
        *(
            "conflict/1.png",
            "masked man/1.png",
            "labelled.png",
            "unmask.png",
            "segment.png",
            "DICOMDIR",
            "1.dcm",
            "x.zip",
        ),
        *("1.label.tiff", "left seg.png", "export/lateral/1.png", "xml/1.png", "1.png.tif"),
    ],
)
def test_what_may_be_a_radiograph_is_kept(path: str):
    assert sort_out([path]) == ([path], {})
    assert not is_clutter(path)
    assert find_reason(path) is None


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        *(
            (f"{folder}/1.png", ANNOTATION)
            for folder in ("masks", "Mask", "fracture/Annotations", "labels", "heatmaps")
        ),
        *(
            (f"x/{folder}/deep/1.png", ANNOTATION)
            for folder in ("segmentation", "HeatMap", "bounding_boxes", "ground truth")
        ),
        *(
            (f"fracture/1{end}.png", ANNOTATION)
            for end in ("_mask", "_seg", "_heatmap", "-Mask", "_mask_2", "_overlay")
        ),
        ("fracture/mask_0001.png", ANNOTATION),
        *(
            (f"fracture/1.{end}", DOCUMENT)
            for end in ("json", "xml", "txt", "csv", "XLSX", "md", "html", "pdf", "yaml")
        ),
        ("labels/1.txt", DOCUMENT),
    ],
)
def test_annotations_and_documents_beside_images_are_passed_over(path: str, reason: str):
    assert find_reason(path) == reason
    assert not is_clutter(path)
    assert sort_out([path]) == ([], {reason: 1})


def test_files_are_counted_by_reason_and_the_order_stays():
    paths = ["b.png", "masks/b.png", "a.png", ".DS_Store", "__MACOSX/masks/a.png", "README.md"]
    assert sort_out(paths) == (["b.png", "a.png"], {CLUTTER: 2, ANNOTATION: 1, DOCUMENT: 1})
