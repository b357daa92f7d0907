from pathlib import Path

import pytest
from PIL import Image

from qprune.errors import UserError
from qprune.tasks.data.images import read_images

REMEDY = (
    "put the images there, set data.root=FOLDER or task.train_folder=FOLDER to where they are, "
    "or type data=synthetic to run without files"
)


def picture(path: Path, mode: str = "RGB") -> Path:
    Image.effect_noise((40, 30), 50).convert(mode).save(path)
    return path


def test_images_come_by_file_name_and_as_rgb(tmp_path: Path) -> None:
    for name, mode in (("b.png", "L"), ("a.bmp", "RGB"), ("c.png", "P"), ("d.PNG", "RGBA")):
        picture(tmp_path / name, mode)
    (tmp_path / "notes.txt").write_text("no image")
    picture(tmp_path / ".hidden.png")
    images = read_images(tmp_path, "task.train_folder")
    assert [Path(name).name for name, _ in images] == ["a.bmp", "b.png", "c.png", "d.PNG"]
    assert {(image.mode, image.size) for _, image in images} == {("RGB", (40, 30))}


def test_a_missing_folder_is_named_with_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_images(tmp_path / "t91", "task.train_folder")
    assert str(error.value) == f"there is no folder {tmp_path / 't91'}; {REMEDY}"


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError) as error:
        read_images(tmp_path, "task.train_folder")
    assert str(error.value) == (f"{tmp_path} holds no image (.bmp, .jpeg, .jpg, .png, .tif, .tiff, .webp); {REMEDY}")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif"])
@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5])
def test_a_truncated_image_is_named(tmp_path: Path, suffix: str, kept: float) -> None:
    path = picture(tmp_path / f"broken.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=r"broken\.\w+ cannot be decoded \(.+\); fetch the file again, or remove it$"):
        read_images(tmp_path, "task.train_folder")
