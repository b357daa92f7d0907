"""VOC's files: what is read, and what is refused."""

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from PIL import Image

from qprune.errors import UserError
from qprune.tasks.data import voc
from qprune.tasks.data.voc import CLASSES, VocPictures, read_annotation

CAT = "<object><name>cat</name><difficult>0</difficult><bndbox>{}</bndbox></object>"


def corners(x1: float, y1: float, x2: float, y2: float) -> str:
    return f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"


def annotation(*objects: str, size: tuple[int, int] = (40, 30)) -> str:
    width, height = size
    return (
        f"<annotation><size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        f"{''.join(objects)}</annotation>"
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three pictures: a cat, a grey one with two objects, and one without any."""
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    hard = CAT.replace("cat", "person").replace(">0<", ">1<")
    written = {
        "000001": annotation(CAT.format(corners(3, 4, 5, 10))),
        "000002": annotation(CAT.format(corners(1, 1, 40, 30)), hard.format(corners(2, 2, 9, 9))),
        "000003": annotation(),
    }
    for name, text in written.items():
        (folder / "Annotations" / f"{name}.xml").write_text(text)
        Image.effect_noise((40, 30), 50).convert("L" if name == "000002" else "RGB").save(
            folder / "JPEGImages" / f"{name}.jpg"
        )
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("000001\n000002\n000003\n")
    (folder / "ImageSets" / "Main" / "mine.txt").write_text("000002 1\n")
    return tmp_path


def pictures(root: Path, split: str = "trainval") -> VocPictures:
    return VocPictures(root, split, "task.train_split")


def xml_of(root: Path, name: str = "000001") -> Path:
    return root / "VOCdevkit" / "VOC2007" / "Annotations" / f"{name}.xml"


def test_boxes_reach_from_before_their_first_pixel_to_behind_their_last(root: Path) -> None:
    sample = pictures(root)[0]
    assert sample.boxes.tolist() == [[2, 3, 5, 10]]
    assert sample.labels.tolist() == [1 + CLASSES.index("cat")] == [8]
    assert (sample.image.shape, sample.image.dtype) == ((3, 30, 40), torch.uint8)


def test_grey_pictures_become_colour_ones_and_difficult_objects_are_noted(root: Path) -> None:
    sample = pictures(root)[1]
    assert sample.image.shape == (3, 30, 40)
    assert torch.equal(sample.image[0], sample.image[2])
    assert sample.difficult.tolist() == [False, True]
    assert sample.labels.tolist() == [8, 15]


def test_a_picture_without_objects_is_all_background(root: Path) -> None:
    sample = pictures(root)[2]
    assert (sample.boxes.shape, sample.labels.shape, sample.labels.dtype) == ((0, 4), (0,), torch.int64)


def test_a_list_of_one_s_own_names_the_pictures(root: Path) -> None:
    assert pictures(root, "mine").names == ["000002"]


def test_the_checksum_sees_pictures_and_boxes(root: Path) -> None:
    before = pictures(root).checksum()
    assert before == pictures(root).checksum()
    text = xml_of(root).read_text()
    xml_of(root).write_text(text.replace("<xmax>5", "<xmax>6"))
    moved = pictures(root).checksum()
    xml_of(root).write_text(text)
    path = root / "VOCdevkit" / "VOC2007" / "JPEGImages" / "000003.jpg"
    path.write_bytes(path.read_bytes() + b" ")
    assert len({before, moved, pictures(root).checksum()}) == 3


def test_a_box_is_cut_at_the_edge_of_the_picture(root: Path) -> None:
    xml_of(root).write_text(annotation(CAT.format(corners(-3, 0, 99, 31))))
    assert read_annotation(xml_of(root)).boxes.tolist() == [[0, 0, 40, 30]]


@pytest.mark.parametrize("box", [(50, 4, 60, 10), (9, 9, 5, 12), (8, 5, 7, 9), (3, 31, 9, 40)])
def test_boxes_without_area_in_the_picture_are_refused(root: Path, box: tuple[int, int, int, int]) -> None:
    xml_of(root).write_text(annotation(CAT.format(corners(*box))))
    shown = f"the box {', '.join(map(str, box))} of a cat"
    with pytest.raises(UserError, match=rf"000001\.xml: {shown} has no area inside the picture of 40x30; mend the"):
        pictures(root)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<annotation><size>", "ParseError"),
        ("", "ParseError"),
        ("<other/>", "KeyError: 'annotation'"),
        ("<annotation><size/></annotation>", "KeyError: 'size'"),
        (annotation("<object><name>cat</name></object>"), "KeyError: 'bndbox'"),
        (annotation(CAT.format(corners(1, 1, 5, float("nan")))), "nan"),
        (annotation(CAT.format("<xmin>a</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax>")), "ValueError"),
    ],
)
def test_broken_annotations_are_named_with_the_reason(root: Path, text: str, reason: str) -> None:
    xml_of(root).write_text(text)
    with pytest.raises(UserError, match=rf"000001\.xml.*{reason}"):
        pictures(root)


def test_an_unknown_class_is_named(root: Path) -> None:
    xml_of(root).write_text(annotation(CAT.replace("cat", "unicorn").format(corners(1, 1, 5, 5))))
    with pytest.raises(UserError, match=r"000001\.xml: the class 'unicorn' is not one of VOC's \(aeroplane, "):
        pictures(root)


def test_missing_files_are_named(root: Path) -> None:
    (root / "VOCdevkit" / "VOC2007" / "JPEGImages" / "000003.jpg").unlink()
    with pytest.raises(UserError, match=r"000003\.jpg is missing, and task\.train_split=trainval names it"):
        pictures(root)
    xml_of(root, "000002").unlink()
    with pytest.raises(UserError, match=r"000002\.xml is missing; fetch the data again, or leave the picture out"):
        pictures(root)


def test_a_missing_split_lists_those_that_are_there(root: Path) -> None:
    said = r"task\.train_split=test: there is no readable list .*test\.txt \(lists there: mine, trainval\)"
    with pytest.raises(UserError, match=said):
        pictures(root, "test")
    (root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.txt names no picture; choose another list"):
        pictures(root, "empty")


def test_a_broken_picture_and_one_of_another_size_are_named(root: Path) -> None:
    path = root / "VOCdevkit" / "VOC2007" / "JPEGImages" / "000001.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"000001\.jpg cannot be decoded"):
        pictures(root)[0]
    Image.new("RGB", (30, 40)).save(path)
    with pytest.raises(UserError, match=r"000001\.jpg is 30x40 pixels, and its annotation was made for 40x30"):
        pictures(root)[0]


def test_without_a_folder_the_archives_are_fetched_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def unreachable(root: str, year: str, image_set: str, download: bool) -> None:
        assert download
        asked.append((year, image_set))
        raise URLError("no route to host")

    monkeypatch.setattr(voc, "VOCDetection", unreachable)
    with pytest.raises(UserError, match=r"there is no .*VOC2007, and it could not be fetched .*set data\.root=FOLDER"):
        pictures(tmp_path)
    assert asked == [("2007", "trainval")]
    with pytest.raises(UserError, match="nowhere is no folder; create it to have VOC 2007 downloaded there"):
        pictures(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(UserError, match=r"task\.train_split=mine is not a published split \(train, val, trainval, te"):
        pictures(tmp_path, "mine")


def test_the_real_files_read(real_root: Path) -> None:
    if not (real_root / voc.FOLDER).is_dir():
        pytest.skip("no VOC 2007 in QPRUNE_DATA")
    lists = real_root / voc.FOLDER / "ImageSets" / "Main"
    split = VocPictures(real_root, sorted(lists.glob("*.txt"))[0].stem, "task.train_split")
    sample = split[0]
    assert sample.image.shape[0] == 3
    assert (sample.boxes[:, :2] < sample.boxes[:, 2:]).all()
    height, width = sample.image.shape[1:]
    assert (sample.boxes <= torch.tensor([width, height, width, height])).all()
