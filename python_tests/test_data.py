"""Image sets: what is found where, which labels they get, and what is said about wrong input."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from tokenprune_ext.data import NO_LABEL, DataError, ImageFiles, batches, load_images, preprocessing, read_class_names

REAL = Path(__file__).parents[2] / "shared" / "data" / "imagenet-1000.tsv"


def save_image(path: Path, colour: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (40, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.tensor(list(image.getpixel((0, 0))), dtype=torch.float32).view(3, 1, 1)


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    for name, count in (("cat", 2), ("ant", 3), ("bee", 1)):
        for i in range(count):
            save_image(tmp_path / "set" / name / f"{i}.png")
    (tmp_path / "set" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "set"


def test_class_folders_are_labelled_in_sorted_order(class_folders: Path) -> None:
    images = load_images(class_folders, 3)
    assert images.class_names == ("ant", "bee", "cat")
    assert images.labels == (0, 0, 0, 1, 2, 2)
    assert [file.parent.name for file in images.files] == ["ant", "ant", "ant", "bee", "cat", "cat"]


def test_given_class_names_decide_the_order(class_folders: Path) -> None:
    images = load_images(class_folders, 4, class_names=["bee", "dog", "cat", "ant"])
    assert images.labels == (3, 3, 3, 0, 2, 2)


def test_imagenet_ids_get_imagenets_indices(tmp_path: Path) -> None:
    for name in ("n01443537", "n01484850"):  # classes 1 and 2 of 1000
        save_image(tmp_path / name / "0.png")
    assert load_images(tmp_path, 1000).labels == (1, 2)


def test_folder_of_images_has_no_labels(tmp_path: Path) -> None:
    save_image(tmp_path / "b.png")
    save_image(tmp_path / "a.jpg")
    images = load_images(tmp_path, 10)
    assert images.labels is None
    assert [file.name for file in images.files] == ["a.jpg", "b.png"]
    assert images[0][1] == NO_LABEL


def test_unlabelled_takes_images_of_all_folders(class_folders: Path) -> None:
    images = load_images(class_folders, 1000, unlabelled=True)
    assert images.labels is None
    assert len(images) == 6


@pytest.mark.parametrize(
    ("change", "classes", "names", "said"),
    [
        (lambda path: None, 5, None, "has 3 class folders, the model 5 classes"),
        (lambda path: save_image(path / "loose.png"), 3, None, "both class folders and images"),
        (lambda path: None, 3, ("ant", "bee", "dog"), "cat is none of the 3 class names"),
        (lambda path: None, 3, ("ant", "bee"), "2 class names were given, the model has 3"),
    ],
)
def test_wrong_class_folders_are_refused(class_folders: Path, change, classes, names, said: str) -> None:
    change(class_folders)
    with pytest.raises(DataError, match=said):
        load_images(class_folders, classes, class_names=names)


def test_listing_finds_files_beside_it_and_in_the_folder_of_its_name(tmp_path: Path) -> None:
    save_image(tmp_path / "beside.png")
    save_image(tmp_path / "images" / "inside.png")
    listing = tmp_path / "images.tsv"
    listing.write_bytes(b"\xef\xbb\xbfbeside.png\t7\r\n\r\ninside.png\t3\r\n")
    images = load_images(listing, 10)
    assert images.labels == (7, 3)
    assert images.files == (tmp_path / "beside.png", tmp_path / "images" / "inside.png")
    assert load_images(listing, 2, unlabelled=True).labels is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.png\t1\nmissing.png\t1\n", r"line 2: no such image 'missing.png'"),
        ("a.png 1\n", r"line 1: no such image .* tab"),
        ("a.png\tcat\n", r"line 1: class index 'cat' is no integer"),
        ("a.png\t1\na.png\t10\n", r"line 2: class index 10 is outside the model's classes 0\.\.9"),
        ("a.png\t-1\n", r"line 1: class index -1 is outside"),
        ("a.png\t1\na.png\n", r"line 2: some lines have a class index"),
        ("a.png\na.png\t1\n", r"line 2: some lines have a class index"),
        ("\n", r"no images in"),
    ],
)
def test_wrong_listings_are_refused_by_line(tmp_path: Path, text: str, said: str) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "list.tsv").write_text(text)
    with pytest.raises(DataError, match=said):
        load_images(tmp_path / "list.tsv", 10)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_images(tmp_path / "absent", 10)
    with pytest.raises(DataError, match="no images in"):
        load_images(tmp_path, 10)
    with pytest.raises(DataError, match="is no text file"):
        load_images(save_image(tmp_path / "a.png"), 10)


def test_class_names_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("ant\nbee\n\n")
    assert read_class_names(path) == ("ant", "bee")
    path.write_text("ant\nant\n")
    with pytest.raises(DataError, match="twice"):
        read_class_names(path)


def test_choice_is_balanced_seeded_and_keeps_the_order() -> None:
    labels = (0,) * 10 + (1,) * 10 + (2,) * 3
    images = ImageFiles(tuple(Path(f"{i:02d}.png") for i in range(23)), labels)
    chosen = images.choose(11, seed=0)
    assert sorted(Counter(chosen.labels).values()) == [3, 4, 4]
    assert list(chosen.files) == sorted(chosen.files)
    assert all(labels[int(file.stem)] == label for file, label in zip(chosen.files, chosen.labels, strict=True))
    assert chosen == images.choose(11, seed=0)
    assert chosen != images.choose(11, seed=1)
    assert images.choose(23, seed=0) is images
    assert images.choose(None, seed=0) is images
    assert len(ImageFiles(images.files).choose(5, seed=0)) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_order_and_labels(tmp_path: Path, workers: int) -> None:
    files = tuple(save_image(tmp_path / f"{i}.png", (i, 0, 0)) for i in range(5))
    found = list(batches(ImageFiles(files, (4, 3, 2, 1, 0)), to_tensor, batch_size=2, workers=workers))
    assert [tuple(images.shape) for images, _ in found] == [(2, 3, 1, 1), (2, 3, 1, 1), (1, 3, 1, 1)]
    assert torch.cat([images for images, _ in found])[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert torch.cat([labels for _, labels in found]).tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_unreadable_image_is_named(tmp_path: Path, workers: int, content: bytes) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(content)
    files = (save_image(tmp_path / "good.png"), bad)
    with pytest.raises(DataError) as caught:
        list(batches(ImageFiles(files), to_tensor, batch_size=2, workers=workers))
    assert str(bad) in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_truncated_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"cannot read image .*cut\.png"):
        ImageFiles((path,))[0]


def test_preprocessing_follows_the_model_and_its_overrides() -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    image = Image.new("RGB", (300, 260), (255, 0, 51))
    config, transform = preprocessing(model)
    assert (config["input_size"], config["interpolation"], config["crop_pct"]) == ((3, 224, 224), "bicubic", 0.9)
    assert transform(image)[:, 5, 5].tolist() == pytest.approx([1.0, -1.0, -0.6], abs=1e-5)
    config, transform = preprocessing(model, img_size=96, mean=(0.0,), std=(1.0, 2.0, 4.0), crop_pct=1.0)
    assert transform(image).shape == (3, 96, 96)
    assert transform(image)[:, 5, 5].tolist() == pytest.approx([1.0, 0.0, 0.05], abs=1e-5)


def test_wrong_preprocessing_is_refused() -> None:
    with pytest.raises(DataError, match="mean takes one or three numbers, got 2"):
        preprocessing(timm.create_model("test_vit"), mean=(0.5, 0.5))
    grey = timm.create_model("test_vit")
    grey.pretrained_cfg = {"input_size": (1, 160, 160)}
    with pytest.raises(DataError, match="takes 1 channels"):
        preprocessing(grey)


@pytest.mark.skipif(not REAL.is_file(), reason=f"no real images at {REAL}")
def test_real_listing() -> None:
    images = load_images(REAL, 1000)
    assert sorted(images.labels) == list(range(1000))
    assert all(int(file.name[:4]) == label for file, label in zip(images.files, images.labels, strict=True))
    assert images[17][0].mode == "RGB"
