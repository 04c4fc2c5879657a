"""Model repositories: exported files in the layouts that OpenVINO Model Server and Triton Inference Server read.

The layouts are the documented ones. A model has a folder, each of its versions a numbered folder in it. OpenVINO Model Server
takes a ``config.json`` with the list of models (``model_config_list``: ``name``, ``base_path``). Triton takes a
``config.pbtxt`` for each model: a protobuf text with the names, types and sizes of inputs and outputs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from microglia.core.errors import FileError
from microglia.core.optional import needs
from microglia.storage.files import write_atomic
from microglia.storage.run import read_json

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
TRITON_TYPES = {
    "BOOL": "BOOL",
    **{f"{sign}INT{bits}": f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
    "FLOAT16": "FP16",
    "FLOAT": "FP32",
    "DOUBLE": "FP64",
    "BFLOAT16": "BF16",
    "STRING": "STRING",
}
"""Type of a tensor in ONNX -> in Triton's configuration, without ``TYPE_``."""
Shape = Sequence[int]


def openvino_model_server(path_to_xml: str | Path, root: str | Path, name: str, version: int = 1) -> Path:
    """Puts an OpenVINO IR into a model repository of OpenVINO Model Server.

    It writes ``name/version/model.xml`` and ``model.bin``, and lists the model in ``root/config.json``; models that are listed
    there already stay. Start the server with ``--config_path root/config.json``: paths in the list are relative to it.

    Args:
        path_to_xml: The file; its weights (``.bin``) lie beside it.
        root: The repository.
        name: Name of the model, as clients ask for it.
        version: Number of the version; the server offers the highest.

    Returns:
        The folder of the version.

    Raises:
        FileError: The file is no whole OpenVINO IR, the repository has this version, or it cannot be written.
    """
    xml, root = Path(path_to_xml), Path(root)
    _check(xml, root, name, version)
    _check_ir(xml)
    config = root / "config.json"
    listed = _listed(config)
    with _version(root, name, version) as folder:
        shutil.copyfile(xml, folder / "model.xml")
        shutil.copyfile(xml.with_suffix(".bin"), folder / "model.bin")
    models = listed.setdefault("model_config_list", [])
    if all(entry["config"]["name"] != name for entry in models):
        models.append({"config": {"name": name, "base_path": name}})
        try:
            write_atomic(config, json.dumps(listed, indent=2) + "\n")
        except FileError:  # no version that no list names
            shutil.rmtree(root / name, ignore_errors=True)
            raise
    return root / name / str(version)


def triton(
    path_to_onnx: str | Path,
    root: str | Path,
    name: str,
    version: int = 1,
    *,
    max_batch_size: int = 32,
    max_wait_ms: float = 2.0,
) -> Path:
    """Puts an ONNX file into a model repository of Triton Inference Server.

    It writes ``name/version/model.onnx`` with the weights that lie beside the file, and ``name/config.pbtxt``. Where the first
    dimension of every input and output is free, Triton joins requests into batches (``dynamic_batching``). Otherwise the
    configuration says that the model has no batches (``max_batch_size: 0``). Start the server with ``--model-repository root``.

    Args:
        path_to_onnx: The file.
        root: The repository.
        name: Name of the model, as clients ask for it.
        version: Number of the version; Triton offers the highest.
        max_batch_size: Examples in a batch, at most.
        max_wait_ms: Longest that a request waits for others, in milliseconds.

    Returns:
        The folder of the version.

    Raises:
        FileError: The file is no whole ONNX file, the repository has this version, an earlier version has another
            configuration, or it cannot be written.
    """
    path, root = Path(path_to_onnx), Path(root)
    _check(path, root, name, version)
    if max_batch_size < 1 or max_wait_ms < 0:
        raise FileError(f"max_batch_size is at least 1 and max_wait_ms at least 0; got {max_batch_size} and {max_wait_ms}.")
    model = _onnx(path)
    text = triton_config(name, model, max_batch_size, max_wait_ms)
    config = root / name / "config.pbtxt"
    if config.exists() and config.read_text() != text:
        raise FileError(
            f"{config} is of earlier versions with other inputs, outputs or batches, and one file serves all versions: give "
            "another name, or remove it."
        )
    beside = _beside(path, model)
    with _version(root, name, version, {"config.pbtxt": text}) as folder:
        shutil.copyfile(path, folder / "model.onnx")
        for other in beside:
            shutil.copyfile(path.parent / other, folder / other)
    return root / name / str(version)


def triton_config(name: str, model: Any, max_batch_size: int, max_wait_ms: float) -> str:
    """Returns Triton's configuration of an ONNX model as protobuf text.

    Args:
        name: Name of the model.
        model: ``onnx.ModelProto``.
        max_batch_size: Where the first dimensions are free; see `triton`.
        max_wait_ms: See `triton`.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [_tensor(value) for value in model.graph.input if value.name not in weights]
    outputs = [_tensor(value) for value in model.graph.output]
    batched = all(shape and shape[0] == -1 for _, _, shape in (*inputs, *outputs))
    lines = [f"name: {_quoted(name)}", 'platform: "onnxruntime_onnx"', f"max_batch_size: {max_batch_size if batched else 0}"]
    for word, tensors in (("input", inputs), ("output", outputs)):
        entries = [_entry(tensor, kind, shape[1:] if batched else shape) for tensor, kind, shape in tensors]
        lines += [f"{word} [", ",\n".join(entries), "]"]
    if batched:
        lines += ["dynamic_batching {", f"  max_queue_delay_microseconds: {round(1000 * max_wait_ms)}", "}"]
    return "\n".join(lines) + "\n"


def _tensor(value: Any) -> tuple[str, str, Shape]:
    """Returns name, Triton's type and sizes of an input or output; -1 for a size that is free."""
    import onnx

    tensor = value.type.tensor_type
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
    if kind not in TRITON_TYPES:
        raise FileError(f"Triton knows no tensors of the type {kind}, which {value.name!r} has.")
    return value.name, TRITON_TYPES[kind], [dim.dim_value if dim.dim_value > 0 else -1 for dim in tensor.shape.dim]


def _entry(name: str, kind: str, shape: Shape) -> str:
    """Returns one input or output; Triton wants at least one size, and is told how to go on where there is none."""
    sizes = ", ".join(map(str, shape)) or "1"
    scalar = "" if len(shape) else "\n    reshape: { shape: [ ] }"
    return f"  {{\n    name: {_quoted(name)}\n    data_type: TYPE_{kind}\n    dims: [ {sizes} ]{scalar}\n  }}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# -------------------------------------------------------------------------------------------------------------- files
def _check(path: Path, root: Path, name: str, version: int) -> None:
    if not NAME.fullmatch(name):
        raise FileError(f"The name of a served model has letters, digits, '_', '.' and '-', such as resnet56; got {name!r}.")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise FileError(f"A version is a whole number of at least 1; got {version!r}.")
    if not path.is_file():
        raise FileError(f"There is no file {path}.")
    if (root / name / str(version)).exists():
        raise FileError(f"{root / name} has a version {version} already; give another number, such as version={version + 1}.")


def _check_ir(xml: Path) -> None:
    needs("export", "openvino")
    import openvino

    if not xml.with_suffix(".bin").is_file():
        raise FileError(f"There is no file {xml.with_suffix('.bin')}, which holds the weights of {xml.name}.")
    try:
        openvino.Core().read_model(str(xml))
    except RuntimeError as error:
        raise FileError(f"{xml} is damaged or no OpenVINO IR.") from error


def _onnx(path: Path) -> Any:
    needs("export", "onnx")
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise FileError(f"{path} is damaged or not an ONNX file.") from error
    if not model.graph.output:
        raise FileError(f"{path} is damaged or not an ONNX file: it has no outputs.")
    return model


def _beside(path: Path, model: Any) -> list[str]:
    """Returns the names of files that hold weights of an ONNX file, all of them beside it."""
    found = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
    for name in sorted(found):
        if Path(name).name != name or not (path.parent / name).is_file():
            raise FileError(f"{path} has weights in {name!r}, and there is no such file beside it.")
    return sorted(found)


def _listed(config: Path) -> dict[str, Any]:
    """Returns the list of models of a repository, empty for a new one."""
    listed = read_json(config) if config.exists() else {}
    models = listed.get("model_config_list", [])
    if not isinstance(models, list) or not all(_names(entry) for entry in models):
        raise FileError(f"{config} is no configuration of OpenVINO Model Server: its model_config_list names no models.")
    return listed


def _names(entry: Any) -> bool:
    config = entry.get("config") if isinstance(entry, Mapping) else None
    return isinstance(config, Mapping) and isinstance(config.get("name"), str)


@contextmanager
def _version(root: Path, name: str, version: int, beside: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Yields a folder to fill; it becomes the folder of the version by one move, or nothing is left of it.

    A server that watches the repository never sees half a version: a new model appears with its configuration.

    Args:
        root: The repository.
        name: Folder of the model.
        version: Folder in it.
        beside: Texts of files in the folder of the model, for a new model.
    """
    made = [place for place in (root, *root.parents) if not place.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        writing = Path(tempfile.mkdtemp(dir=root, prefix=f".{name}.", suffix=".writing"))
    except OSError as error:
        raise FileError(f"Cannot write {root}: {error.strerror or error}.") from error
    try:
        model = writing / name
        folder = model / str(version)
        folder.mkdir(parents=True)
        yield folder
        for file, text in (beside or {}).items():
            write_atomic(model / file, text)
        for file_path in model.rglob("*"):
            if file_path.is_file():
                with file_path.open("rb") as opened:
                    os.fsync(opened.fileno())
        if (root / name).exists():
            folder.rename(root / name / str(version))
        else:
            model.rename(root / name)
    except OSError as error:
        raise FileError(f"Cannot write {root / name / str(version)}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
        if not (root / name).exists():
            for place in made:
                if place.exists() and not any(place.iterdir()):
                    place.rmdir()
