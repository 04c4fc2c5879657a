"""Optional libraries: which extra of the package brings each, and one sentence where one is missing."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec

from microglia.core.errors import MissingLibraryError

EXTRAS: dict[str, dict[str, str]] = {
    "data": {"datasets": "datasets", "pyarrow": "pyarrow", "PIL": "pillow", "sklearn": "scikit-learn"},
    "train": {"accelerate": "accelerate"},
    "report": {"jinja2": "jinja2", "matplotlib": "matplotlib", "plotly": "plotly"},
    "zoo": {"timm": "timm", "torchvision": "torchvision", "transformers": "transformers"},
    "export": {name: name for name in ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf")},
    "mobile": {"executorch": "executorch"},
    "language": {"transformers": "transformers", "datasets": "datasets"},
    "track": {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"},
    "cluster": {"ray": "ray", "submitit": "submitit"},
    "hub": {"huggingface_hub": "huggingface_hub"},
    "serve": {"fastapi": "fastapi", "uvicorn": "uvicorn"},
}
"""Extra -> the modules that it brings, and the package of each; pyproject.toml says which versions."""


def command(extra: str) -> str:
    """Returns the command that installs an extra."""
    return f"pip install 'microglia[{extra}]'"


def present(module: str) -> bool:
    """Tells whether a top-level module is installed, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a finder that refuses it, or a module without a spec
        return False


def needs(extra: str, *modules: str, what: str = "This") -> nullcontext[None]:
    """Raises unless modules of an extra are installed; imports none of them.

    Args:
        extra: Name of the extra that installs them, such as ``export``.
        modules: Top-level modules, such as ``onnx``.
        what: Subject of the sentence, such as a verb of the library.

    Returns:
        A context that does nothing: a file may put its imports of the modules into it, ``with needs(...):``.

    Raises:
        MissingLibraryError: One is missing; the text says which, and the command that installs it.
    """
    packages = EXTRAS.get(extra, {})
    missing = [packages.get(module, module) for module in modules if not present(module)]
    if missing:
        raise MissingLibraryError(
            f"{what} needs {' and '.join(missing)}, not installed here: {command(extra)} installs what it needs."
        )
    return nullcontext()
