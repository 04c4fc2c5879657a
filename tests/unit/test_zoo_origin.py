"""Where a user's own model has its code: modules, packages, and names that have none."""

import importlib
import sys

import pytest

from microglia.zoo.origin import import_from, module_of, origin_of
from microglia.zoo.registry import ModelError

NAME = "microglia_own_net"


@pytest.fixture
def path(monkeypatch):
    """The import path and the imported modules as they are now, restored afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield monkeypatch
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]
    importlib.invalidate_caches()


def module(folder, kind):
    folder.mkdir(exist_ok=True)
    if kind == "file":
        (folder / f"{NAME}.py").write_text("Net = 1\n")
        return NAME
    (folder / NAME / "nets").mkdir(parents=True)
    for inside in (NAME, f"{NAME}/nets")[: 2 if kind == "package" else 0]:
        (folder / inside / "__init__.py").touch()
    (folder / NAME / "nets" / "small.py").write_text("Net = 1\n")
    return f"{NAME}.nets.small"


@pytest.mark.parametrize("name", ["resnet20", "timm:resnet18", "torchvision:vgg11", "hf:a/b", ":x", None, 3])
def test_models_of_libraries_have_no_module_of_the_user(name):
    assert module_of(name) is None
    assert origin_of(name) is None


@pytest.mark.parametrize("kind", ["file", "package", "namespace package"])
def test_a_module_is_found_again_where_it_was(tmp_path, path, kind):
    name = module(tmp_path / "there", kind)
    with path.context() as patch:
        patch.syspath_prepend(tmp_path / "there")
        told = origin_of(f"{name}:Net")
    assert told == {"module": name, "folder": str(tmp_path / "there")}
    assert origin_of(f"{name}:Net") is None
    with pytest.warns(UserWarning, match=f"'{name}' is imported from {told['folder']}"):
        import_from(f"{name}:Net", told["folder"], "run")
    assert importlib.import_module(name).Net == 1


def test_the_folder_comes_before_the_current_one_and_behind_libraries(tmp_path, path):
    module(tmp_path / "there", "file")
    module(tmp_path / "here", "file")
    path.chdir(tmp_path / "here")
    sys.path.append(str(tmp_path / "here"))
    with pytest.warns(UserWarning, match="imported from"):
        import_from(f"{NAME}:Net", str(tmp_path / "there"), "run")
    assert sys.path[-2:] == [str(tmp_path / "there"), str(tmp_path / "here")]
    assert importlib.import_module(NAME).__file__ == str(tmp_path / "there" / f"{NAME}.py")


def test_two_runs_whose_modules_have_one_name_are_not_mixed(tmp_path, path):
    for folder in ("one", "two"):
        module(tmp_path / folder, "file")
    with pytest.warns(UserWarning, match="imported from"):
        import_from(f"{NAME}:Net", str(tmp_path / "one"), "run")
    importlib.import_module(NAME)
    with pytest.raises(ModelError, match=f"in {tmp_path / 'one'} comes first"):
        import_from(f"{NAME}:Net", str(tmp_path / "two"), "other run")
