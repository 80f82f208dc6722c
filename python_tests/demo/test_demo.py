"""The demo model and its generated images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from timm.data import create_transform, resolve_model_data_config

from tokenprune_ext.demo import CLASSES, DemoImages, load_model
from tokenprune_ext.demo.images import GENERATOR_VERSION, GRID, IMAGE_SIZE, SPLITS, _draw_scene
from tokenprune_ext.demo.model import WEIGHTS_PATH, create_model, initialise
from tokenprune_ext.demo.train import Options, augment, generate, train, window_tokens

#: Well above the tenth that guessing reaches and safely below the accuracy of the packaged weights.
ACCURACY_BOUND = 0.8


def _pixels(data: DemoImages, index: int) -> np.ndarray:
    return np.asarray(data[index][0])


def test_image_is_a_pure_function_of_its_index() -> None:
    forward = [_pixels(DemoImages(8, seed=5), i) for i in range(8)]
    again = DemoImages(100, seed=5)
    np.random.seed(1)  # noqa: NPY002 - global random state must not matter
    for i in reversed(range(8)):
        assert np.array_equal(_pixels(again, i), forward[i])


def test_images_have_the_stated_type_and_size() -> None:
    image, label = DemoImages(1, seed=2)[0]
    assert image.mode == "RGB"
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert type(label) is int


def test_seeds_splits_and_indices_give_different_images() -> None:
    variants = [DemoImages(2, seed, split) for seed in (0, 1) for split in SPLITS]
    images = {_pixels(data, i).tobytes() for data in variants for i in range(2)}
    assert len(images) == 2 * len(variants)


def test_every_ten_images_hold_each_class_once() -> None:
    data = DemoImages(200, seed=3)
    labels = [data.label(i) for i in range(200)]
    for start in range(0, 200, len(CLASSES)):
        assert sorted(labels[start : start + len(CLASSES)]) == list(range(len(CLASSES)))
    assert labels[:10] != labels[10:20]
    assert [data[i][1] for i in range(10)] == labels[:10]


def test_mask_is_one_small_region() -> None:
    data = DemoImages(100, seed=4)
    corners = set()
    for i in range(100):
        mask = data.object_mask(i)
        assert mask.dtype == torch.bool
        assert mask.shape == (GRID, GRID)
        assert 6 <= int(mask.sum()) <= 49
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        assert int(rows.max() - rows.min()) < 8
        assert int(columns.max() - columns.min()) < 8
        corners.add((int(rows.min()), int(columns.min())))
    assert len(corners) > 25  # the position varies


def test_mask_marks_where_the_object_was_drawn() -> None:
    """Two classes drawn in the same place differ inside the two masks alone."""
    circle, arrow = (_draw_scene(np.random.default_rng(7), CLASSES.index(name)) for name in ("circle", "arrow"))
    changed = (np.asarray(circle.image) != np.asarray(arrow.image)).any(axis=2)
    patches = changed.reshape(GRID, IMAGE_SIZE // GRID, GRID, IMAGE_SIZE // GRID).mean(axis=(1, 3))
    assert patches.max() > 0.5
    assert not (patches[~(circle.mask | arrow.mask)] > 0.25).any()


def test_negative_index_counts_from_the_end() -> None:
    data = DemoImages(20, seed=1)
    assert np.array_equal(_pixels(data, -1), _pixels(data, 19))


@pytest.mark.parametrize("index", [3, -4])
def test_index_out_of_range(index: int) -> None:
    with pytest.raises(IndexError, match=rf"index is {index}; it must lie in \[-3, 2\]"):
        DemoImages(3)[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "count is 0; it must be at least 1"),
        ((1, -1), "seed is -1; it must be 0 or more"),
        ((1, 0, "test"), "split is 'test'; it must be one of 'train', 'val'"),
    ],
)
def test_bad_data_set_arguments(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoImages(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"dim": 65}, "dim is 65; it must be a multiple of heads, 2"),
    ],
)
def test_bad_model_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(**arguments)


def test_weights_file_is_small_and_describes_itself() -> None:
    assert WEIGHTS_PATH.stat().st_size < 3_000_000
    with safe_open(WEIGHTS_PATH, framework="pt") as file:
        facts = file.metadata()
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float16}
    assert names == set(create_model().state_dict())
    assert facts["generator_version"] == str(GENERATOR_VERSION)
    assert float(facts["accuracy"]) > ACCURACY_BOUND
    assert int(facts["steps"]) > 0
    assert facts["seed"] == "0"


def test_loaded_model_is_ready_to_use() -> None:
    model = load_model()
    assert not model.training
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert model.num_prefix_tokens == 1
    assert model.pos_embed is not None
    assert model.pos_embed.shape[1] == 1 + GRID * GRID
    assert model.num_classes == len(CLASSES)


def test_timm_reads_the_preprocessing() -> None:
    config = resolve_model_data_config(load_model())
    assert config["input_size"] == (3, IMAGE_SIZE, IMAGE_SIZE)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert config["crop_pct"] == 1.0
    assert config["interpolation"] == "bicubic"


@torch.inference_mode()
def test_accuracy_on_fresh_images() -> None:
    model = load_model()
    transform = create_transform(**resolve_model_data_config(model))
    data = DemoImages(100, seed=987)
    images, labels = zip(*(data[i] for i in range(100)), strict=True)
    logits = model(torch.stack([transform(image) for image in images]))
    accuracy = float((logits.argmax(1) == torch.tensor(labels)).float().mean())
    assert accuracy >= ACCURACY_BOUND


def test_augmented_masks_follow_the_images() -> None:
    batch = generate(32, 0, "train", 1)
    stripes = batch.masks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    marked = batch._replace(pixels=(stripes[:, None] * 255).expand(-1, 3, -1, -1).to(torch.uint8))
    images, masks = augment(marked, torch.Generator().manual_seed(0))
    inside = images[:, 0, ::8, ::8].abs() > 0
    assert inside.all()
    # A negative swaps the two sides, so compare up to the sign of the image.
    sign = torch.sign(images[:, 0, ::8, ::8])
    wanted = masks.float() * 2 - 1
    assert all(torch.equal(s, w) or torch.equal(s, -w) for s, w in zip(sign, wanted, strict=True))
    assert not torch.equal(masks, batch.masks)


def test_window_holds_the_object() -> None:
    masks = generate(100, 0, "train", 1).masks
    tokens = window_tokens(masks, 8, torch.Generator().manual_seed(0))
    assert tokens.shape == (100, 64)
    assert torch.equal(masks.flatten(1).gather(1, tokens).sum(1), masks.flatten(1).sum(1))


@pytest.fixture
def restored_torch_state() -> Iterator[None]:
    """Keeps the thread count and the random state that training sets from the other tests."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.mark.usefixtures("restored_torch_state")
def test_training_writes_weights_of_the_plain_model(tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    options = Options(images=20, window_steps=2, decay_steps=1, full_steps=1, batch=4, validation=10, workers=1)
    accuracy = train(options, out, report_every=2)
    assert 0.0 <= accuracy <= 1.0
    with safe_open(out, framework="pt") as file:
        assert set(file.keys()) == set(create_model().state_dict())
        assert file.metadata()["steps"] == "3"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(batch=0), "batch is 0; it must be positive"),
        (Options(seed=-1), "seed is -1; it must be 0 or more"),
        (Options(window=15), "window is 15; it must be at most 14"),
    ],
)
def test_bad_training_options(options: Options, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(options, tmp_path / "weights.safetensors")


def test_initialisation_looks_at_nearby_tokens() -> None:
    """The first attention scores of a middle patch are highest around it."""
    model = create_model(depth=1)
    initialise(model, torch.Generator().manual_seed(0))
    attention = model.blocks[0].attn
    assert model.pos_embed is not None
    with torch.no_grad():
        tokens = torch.nn.functional.layer_norm(model.pos_embed[0, 1:], (64,))
        query, key, _ = attention.qkv(tokens).chunk(3, dim=1)  # type: ignore[operator,union-attr]
        middle = (GRID // 2) * GRID + GRID // 2
        best = int((key @ query[middle]).argmax())
    distance = math.dist(divmod(best, GRID), divmod(middle, GRID))
    assert distance <= 3
