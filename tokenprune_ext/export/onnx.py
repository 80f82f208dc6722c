"""Models, pruned or dense, as ONNX files of standard operators."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tokenprune_ext.checks import check_int
from tokenprune_ext.files import replacing
from tokenprune_ext.methods import EViT, Method, Peaks, Pomt, TopK, ZeroTPrune
from tokenprune_ext.patch import Host, inspect_host, record_of
from tokenprune_ext.prune import schedule_of

from .graph import captured
from .onnx_ops import decompositions

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

MIN_OPSET = 18  # the first in which reductions take their axes as torch's exporter writes them
DTYPES = (torch.float32, torch.float16)
INPUT = "images"
BATCH = "batch"

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxSummary:
    """An ONNX file that was written; ``str()`` is a few lines.

    Attributes:
        path: the file.
        opset: version of the operators.
        operators: how many nodes of each operator, the most frequent first.
        size_bytes: size of the file, with that of ``<path>.data``, where weights beyond 2 GB go.
        inputs, outputs: name -> shape; a dynamic batch is the name ``batch``.
    """

    path: Path
    opset: int
    operators: Mapping[str, int]
    size_bytes: int
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]

    def __str__(self) -> str:
        ends = (", ".join(f"{name} {list(shape)}" for name, shape in part.items()) for part in self._ends())
        counts = ", ".join(f"{name} {count}" for name, count in self.operators.items())
        nodes = sum(self.operators.values())
        return (
            f"{self.path}: {self.size_bytes / 2**20:.1f} MiB, opset {self.opset}, {' -> '.join(ends)}\n"
            f"{nodes} nodes: {counts}"
        )

    def _ends(self) -> tuple[Mapping[str, Shape], Mapping[str, Shape]]:
        return self.inputs, self.outputs


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    batch: int | None = None,
    opset: int = MIN_OPSET,
    images: Tensor | None = None,
) -> OnnxSummary:
    """Write a supported model, patched or not, as an ONNX file, checked with ``onnx.checker``.

    The file has operators of the standard domain alone, and the keep counts of the schedule as static shapes. Its input
    is called ``images``; a tensor that the model returns is called ``logits`` (``output`` when it is no matrix), and
    several have the names of their fields. The model stays as it is, and nothing is written unless all went well.

    What differs from the model: scores that tie up to rounding may be decided the other way, NaN is not looked for,
    page rank makes all its iterations (``tol`` ends none early), and kept tokens stand in the order of their scores
    where nothing downstream can tell.

    Args:
        model: a supported model in eval mode, float32 or float16.
        path: the file, replaced if there is one. Beyond 2 GB, weights go to ``<path>.data`` beside it.
        batch: a fixed batch size; None for any.
        opset: version of the operators, at least 18.
        images: an example ``[B, 3, H, W]`` of the images, whose height and width the graph is made for; the model's
            input size by default.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        UnsupportedModelError: the model is not understood.
        TypeError: an argument or the model's dtype is of the wrong type.
        ValueError: the model is in training mode, an argument is out of range, or this torch has no such opset.
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    _check_installed()
    path = Path(path)
    check_int("opset", opset, MIN_OPSET)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    host = inspect_host(model)
    _check_dtype(model, images)
    program = captured(model, images, batch=batch)
    with torch.no_grad():
        program = program.run_decompositions(decompositions(_in_order(model, host, program)))
    return _write(_translated(program, opset), path, opset)


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"export to ONNX needs {error.name}: pip install 'tokenprune[export]'") from error


def _check_dtype(model: nn.Module, images: Tensor | None) -> None:
    found = {part.dtype for part in model.parameters() if part.is_floating_point()}
    if len(found) != 1 or not found <= set(DTYPES):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise TypeError(f"model must be float32 or float16 to be exported to ONNX, got {names}")
    like = next(model.parameters())
    if images is not None and (images.dtype, images.device) != (like.dtype, like.device):
        raise TypeError(
            f"images must be {like.dtype} on {like.device} like the model, got {images.dtype} on {images.device}"
        )


def _in_order(model: nn.Module, host: Host, program: ExportedProgram) -> bool:
    """Whether something downstream can tell in which order tokens stand; attention and pooling cannot."""
    if record_of(model) is None:
        return False
    method = schedule_of(model).build_method()
    # A fused token is at the place of the middle one of those it stands for: an order of their places.
    fused_place = host.positional and getattr(method, "reduction", "") in ("mean", "weighted", "sum")
    token_maps = any(len(value.meta["val"].shape) > 2 for value in _outputs(program))
    return fused_place or token_maps or not _ignores_order(method)


def _ignores_order(method: Method) -> bool:
    """Whether a method chooses the same tokens in whichever order they come. Others by default do not."""
    if type(method) is ZeroTPrune:
        return method.partition in ("unimportant", "important")
    return type(method) in (EViT, Peaks, Pomt, TopK)


def _outputs(program: ExportedProgram) -> list[torch.fx.Node]:
    nodes = {node.name: node for node in program.graph.nodes}
    return [nodes[name] for name in program.graph_signature.user_outputs if isinstance(name, str)]


def _output_names(program: ExportedProgram) -> list[str]:
    """The names of fields; of a plain tensor what it most likely is."""
    spec = program.call_spec.out_spec
    assert spec is not None
    found, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))
    names = ["_".join(re.findall(r"\w+", pytree.keystr(path))) for path, _ in found]
    if names == [""]:
        return ["logits" if len(_outputs(program)[0].meta["val"].shape) == 2 else "output"]
    return [f"output_{name}" if name.isdigit() else name for name in names]


def _translated(program: ExportedProgram, opset: int) -> ONNXProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what onnxscript says of torch's own operators
        found = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT],
            output_names=_output_names(program),
            verbose=False,
        )
    assert found is not None
    graph = found.model.graph
    if found.model.opset_imports.get("") != opset:
        raise ValueError(f"opset must be one that torch {torch.__version__} can write, got {opset}")
    # The sources of torch.export's trace are paths on this machine.
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    shape = graph.inputs[0].shape
    assert shape is not None
    symbol = shape[0]
    if not isinstance(symbol, int):
        values = [*graph.inputs, *(value for node in graph.all_nodes() for value in node.outputs)]
        for value in values:
            value.metadata_props.clear()
            _rename(value, str(symbol.value))
    return found


def _rename(value: Any, symbol: str) -> None:
    """Call the batch by its name in the shape of an ``onnx_ir.Value``."""
    for axis, size in enumerate(value.shape or ()):
        if not isinstance(size, int) and size.value is not None:
            value.shape[axis] = re.sub(rf"\b{symbol}\b", BATCH, size.value)


def _write(program: ONNXProgram, path: Path, opset: int) -> OnnxSummary:
    import onnx

    with replacing(path) as written:
        program.save(written)
        onnx.checker.check_model(written, full_check=True)
        model = onnx.load(written, load_external_data=False)
        domains = {entry.domain for entry in model.opset_import} | {node.domain for node in model.graph.node}
        assert domains == {""}, domains
        assert not model.functions
        size = sum(file.stat().st_size for file in written.parent.iterdir())
    counts = Counter(node.op_type for node in model.graph.node)
    return OnnxSummary(
        path=path,
        opset=opset,
        operators=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        size_bytes=size,
        inputs={value.name: _shape(value) for value in model.graph.input},
        outputs={value.name: _shape(value) for value in model.graph.output},
    )


def _shape(value: Any) -> Shape:
    return tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
