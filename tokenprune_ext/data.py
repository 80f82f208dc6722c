"""Images to evaluate on: a folder of class folders, a folder of images or a TSV of file and class index."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

EXTENSIONS = frozenset(Image.registered_extensions()) - {".pdf", ".eps", ".ps", ".mpg", ".mpeg"}
NO_LABEL = -1


class DataError(ValueError):
    """An image, a label or a listing that cannot be used; the message names the file or the line."""


class ImageSource(Protocol):
    """Anything with a length whose items are (RGB PIL image, class index, or -1 without a label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class ImageFiles:
    """Image files with their labels; an `ImageSource`.

    Attributes:
        files: one path per image.
        labels: one class index per image, or None for unlabelled images.
        class_names: names in the order of the model's classes, or None where only the indices are known.
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = self.files[index]
        try:
            with Image.open(path) as image:
                rgb = image.convert("RGB")
        except Exception as error:  # what a decoder raises on a broken file is not documented
            raise DataError(f"cannot read image {path}: {error}") from error
        return rgb, NO_LABEL if self.labels is None else self.labels[index]

    def choose(self, limit: int | None, seed: int) -> ImageFiles:
        """At most `limit` images, drawn with `seed` and balanced over the classes, in their original order."""
        if limit is None or limit >= len(self):
            return self
        generator = random.Random(seed)
        members: dict[int, list[int]] = {}
        for index in range(len(self)):
            members.setdefault(self.labels[index] if self.labels else NO_LABEL, []).append(index)
        classes = sorted(members)
        generator.shuffle(classes)
        for indices in members.values():
            generator.shuffle(indices)
        # Round by round one image of every class, so that class counts differ by at most one.
        rounds = range(max(map(len, members.values())))
        drawn = [members[c][r] for r in rounds for c in classes if r < len(members[c])]
        chosen = sorted(drawn[:limit])
        labels = None if self.labels is None else tuple(self.labels[i] for i in chosen)
        return replace(self, files=tuple(self.files[i] for i in chosen), labels=labels)


def load_images(
    path: str | Path, num_classes: int, *, class_names: Sequence[str] | None = None, unlabelled: bool = False
) -> ImageFiles:
    """Find the images under `path`.

    Args:
        path: a folder with one sub-folder per class, a folder of unlabelled images, or a text file with one
            `file<TAB>class index` (or only `file`) per line. Files of a listing are relative to it, or to a folder
            of its name beside it.
        num_classes: number of the model's classes; every class index must be below it.
        class_names: names of the class folders in the order of the model's classes. By default the sorted folder
            names when there are `num_classes` of them, or ImageNet's order for folders named by WordNet ids.
        unlabelled: ignore any labels.

    Raises:
        DataError: nothing there, no image found, an entry that is missing or malformed, a class the model lacks.
    """
    path = Path(path)
    names = None if class_names is None else tuple(class_names)
    if names is not None and len(names) != num_classes:
        raise DataError(f"{len(names)} class names were given, the model has {num_classes} classes")
    if path.is_dir():
        images = _load_folder(path, num_classes, names, unlabelled)
    elif path.is_file():
        images = _load_listing(path, num_classes, names, unlabelled)
    else:
        raise DataError(f"no such file or folder: {path}")
    if not images.files:
        raise DataError(f"no images in {path}")
    return images


def load_pictures(
    paths: Sequence[Path], num_classes: int, *, class_names: Sequence[str] | None = None, limit: int, seed: int
) -> ImageFiles:
    """Image files, all of them, and at most `limit` images of every folder or list, see `load_images`.

    Raises:
        DataError: as `load_images`.
    """
    files: list[Path] = []
    labels: list[int] = []
    names = None if class_names is None else tuple(class_names)
    for path in paths:
        part = ImageFiles((path,))
        if not (path.is_file() and _is_image(path)):
            part = load_images(path, num_classes, class_names=class_names, unlabelled=not num_classes)
            part = part.choose(limit, seed)
        files += part.files
        labels += part.labels or [NO_LABEL] * len(part)
        names = names or part.class_names
    return ImageFiles(tuple(files), tuple(labels), names)


def shown_names(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    """Names of classes for people: ImageNet's words for its WordNet ids, and for 1000 classes without names."""
    if num_classes == 1000:
        from timm.data.imagenet_info import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        if names is None or tuple(names) == tuple(info.label_names()):
            return tuple(words.split(",")[0] for words in info.label_descriptions())
    return None if names is None else tuple(names)


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Class names from a text file, one per line, in the order of the model's classes."""
    try:
        names = tuple(line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read class names {path}: {error}") from error
    if len(set(names)) != len(names):
        raise DataError(f"{path}: a class name appears twice")
    return names


def _load_folder(path: Path, num_classes: int, names: tuple[str, ...] | None, unlabelled: bool) -> ImageFiles:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if unlabelled or not folders:
        return ImageFiles(tuple(_images_under(path)), class_names=names)
    loose = [entry for entry in path.iterdir() if entry.is_file() and _is_image(entry)]
    if loose:
        raise DataError(f"{path} holds both class folders and images ({loose[0].name}): move them, or use no labels")
    order = names or _class_order([folder.name for folder in folders], num_classes, path)
    position = {name: index for index, name in enumerate(order)}
    files: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        if folder.name not in position:
            raise DataError(f"{folder} is none of the {num_classes} class names")
        found = _images_under(folder)
        files += found
        labels += [position[folder.name]] * len(found)
    return ImageFiles(tuple(files), tuple(labels), order)


def _class_order(folders: list[str], num_classes: int, path: Path) -> tuple[str, ...]:
    """Order of the classes: as sorted when all are there; ImageNet's own order for a part of its WordNet ids."""
    if len(folders) == num_classes:
        return tuple(folders)
    if num_classes == 1000:
        from timm.data.imagenet_info import ImageNetInfo

        synsets = tuple(ImageNetInfo("imagenet-1k").label_names())
        if set(folders) <= set(synsets):
            return synsets
    raise DataError(
        f"{path} has {len(folders)} class folders, the model {num_classes} classes: give the names of the model's "
        "classes in order (--labels FILE), or use no labels (--unlabelled)"
    )


def _load_listing(path: Path, num_classes: int, names: tuple[str, ...] | None, unlabelled: bool) -> ImageFiles:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no text file of `file<TAB>class index` lines: {error}") from error
    files: list[Path] = []
    labels: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, *columns = line.rstrip().split("\t")
        where = f"{path}, line {number}"
        candidates = [path.parent / name, path.with_suffix("") / name]
        found = next((file for file in candidates if file.is_file()), None)
        if found is None:
            raise DataError(f"{where}: no such image {name!r} (columns are separated by a tab)")
        files.append(found)
        if columns and not unlabelled:
            labels.append(_class_index(columns[0], num_classes, where))
        if labels and len(labels) != len(files):
            raise DataError(f"{where}: some lines have a class index, others have none")
    return ImageFiles(tuple(files), tuple(labels) or None, names)


def _class_index(text: str, num_classes: int, where: str) -> int:
    try:
        index = int(text)
    except ValueError:
        raise DataError(f"{where}: class index {text!r} is no integer") from None
    if not 0 <= index < num_classes:
        raise DataError(f"{where}: class index {index} is outside the model's classes 0..{num_classes - 1}")
    return index


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def _images_under(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and _is_image(file))


def preprocessing(model: torch.nn.Module, **overrides: Any) -> tuple[dict[str, Any], Callable[[Image.Image], Any]]:
    """Preprocessing of a timm model's own configuration.

    Args:
        model: timm model; its `pretrained_cfg` holds size, mean, std, interpolation and crop.
        overrides: `img_size` (pixels), `mean` and `std` (one or three numbers), `interpolation`, `crop_pct`;
            None leaves the model's own value.

    Returns:
        The resolved configuration and the transform from a PIL image to a float tensor [3, H, W].

    Raises:
        DataError: the model does not take three channels, or a mean / std has not one or three values.
    """
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    for name in ("mean", "std"):
        value = overrides.get(name)
        if value is not None and len(value) not in (1, 3):
            raise DataError(f"{name} takes one or three numbers, got {len(value)}")
    config = resolve_data_config(overrides, model=model)
    if config["input_size"][0] != 3:
        raise DataError(f"the model takes {config['input_size'][0]} channels; images have 3")
    return config, create_transform(**config, is_training=False)


class Preprocessed(Dataset[Any]):
    """(tensor, label), or the DataError itself: a worker process would wrap a raised one in its own traceback."""

    def __init__(self, source: ImageSource, transform: Callable[[Image.Image], Any]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int] | DataError:
        try:
            image, label = self.source[index]
        except DataError as error:
            return error
        return self.transform(image), label


def _collate(items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, DataError)), None) or default_collate(items)


def batches(
    source: ImageSource, transform: Callable[[Image.Image], Any], batch_size: int, workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Preprocessed batches in order: (float images [B, 3, H, W], int64 labels [B], -1 where there is none).

    Raises:
        DataError: an image that cannot be read, by its path.
    """
    loader = DataLoader(
        Preprocessed(source, transform), batch_size=batch_size, num_workers=workers, collate_fn=_collate
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch[0], batch[1]
