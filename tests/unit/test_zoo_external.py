"""Models of timm, torchvision and transformers, the user's own factory, and libraries that are missing or half broken."""

import importlib.util
import json
import sys

import pytest
import torch
from torch import nn

import fresh
from microglia.core.errors import UnknownNameError
from microglia.zoo import ModelError, build, external


def needs(library):
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


@needs("timm")
def test_timm():
    model = build("timm:resnet10t", classes=3, shape=(1, 32, 32))
    assert model.training
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)


@needs("timm")
def test_timm_with_a_fixed_input_size():
    model = build("timm:vit_tiny_patch16_224", classes=3, shape=(3, 32, 48), depth=1)
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 3)


@needs("timm")
def test_timm_refusals():
    with pytest.raises(UnknownNameError, match=r"no timm model named 'resnet18dd'\. Did you mean 'resnet18d'.*lists all"):
        build("timm:resnet18dd")
    with pytest.raises(ModelError, match=r"timm:resnet10t cannot be built: .*'wdth'"):
        build("timm:resnet10t", wdth=3)


@needs("torchvision")
def test_torchvision():
    model = build("torchvision:squeezenet1_1", classes=3, shape=(3, 64, 64))
    assert model.training
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)


@needs("torchvision")
def test_torchvision_without_auxiliary_heads():
    model = build("torchvision:googlenet", classes=3, shape=(3, 64, 64), init_weights=False)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)


@needs("torchvision")
def test_torchvision_refusals():
    with pytest.raises(UnknownNameError, match=r"no torchvision model named 'resnet_18'\. Did you mean 'resnet18'"):
        build("torchvision:resnet_18")
    with pytest.raises(ModelError, match="take 3 channels, not 1"):
        build("torchvision:resnet18", shape=(1, 32, 32))
    with pytest.raises(ModelError, match=r"torchvision:resnet18 cannot be built: .*'wdth'"):
        build("torchvision:resnet18", wdth=3)


@pytest.fixture
def vit_folder(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = {"model_type": "vit", "image_size": 224, "patch_size": 4, "num_channels": 3, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@needs("transformers")
def test_hf_from_a_local_folder(vit_folder):
    model = build(f"hf:{vit_folder}", classes=3, shape=(1, 8, 8))
    assert model.training
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    assert all(name.startswith("model.") for name in model.state_dict())
    deeper = build(f"hf:{vit_folder}", classes=3, shape=(3, 8, 8), num_hidden_layers=2)
    assert len(deeper.state_dict()) > len(model.state_dict())


@needs("transformers")
def test_hf_with_the_weights_of_a_local_folder(vit_folder):
    source = build(f"hf:{vit_folder}", classes=3, shape=(3, 8, 8))
    source.model.save_pretrained(vit_folder / "trained")
    same = build(f"hf:{vit_folder / 'trained'}", classes=3, shape=(3, 8, 8), pretrained=True)
    state = same.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in source.state_dict().items())


@needs("transformers")
def test_hf_refusals(tmp_path):
    with pytest.raises(ModelError, match=r"^hf:.* cannot be built: .*$"):
        build(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="cannot be built"):
        build(f"hf:{tmp_path}")


@pytest.mark.parametrize("source", ["timm", "torchvision", "hf"])
def test_a_library_that_is_not_installed(monkeypatch, source):
    library = "transformers" if source == "hf" else source

    def absent(name, *rest):
        if name == library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return nn

    monkeypatch.setattr(external.importlib, "import_module", absent)
    with pytest.raises(ModelError, match=rf"'{source}:resnet18' needs {library}, .*pip install 'microglia\[zoo\]'"):
        build(f"{source}:resnet18")


OWN_MODELS = """
from torch import nn

size = 3

def plain():
    return nn.Linear(4, 2)

def asks(classes, *, shape, hidden=5):
    channels, height, width = shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, hidden), nn.Linear(hidden, classes))

def anything(**given):
    model = nn.Linear(4, 2)
    model.given = given
    return model

def needs_more(depth):
    return nn.Linear(4, depth)

def no_model():
    return 3

def fails():
    raise ZeroDivisionError("my own bug")

class Net(nn.Linear):
    def __init__(self, classes):
        super().__init__(4, classes)
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(OWN_MODELS)
    (tmp_path / "broken_models.py").write_text("import surely_not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("own_models", "broken_models"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("own_module")
def test_a_factory_gets_what_its_signature_takes():
    assert build("own_models:plain").out_features == 2
    assert build("own_models:asks", classes=3, shape=(1, 8, 8), hidden=6)(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    assert build("own_models:anything", classes=3, x=1).given == {"classes": 3, "shape": (3, 32, 32), "x": 1}
    assert build("own_models:Net", classes=7).out_features == 7
    assert build("own_models:needs_more", depth=3).out_features == 3


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("own_models:plan", UnknownNameError, "no own_models model named 'plan'. Did you mean 'plain'"),
        ("own_modles:plain", UnknownNameError, "no module 'own_modles' .*PYTHONPATH"),
        ("own_models.sub:plain", UnknownNameError, "no module 'own_models.sub'"),
        ("own_models:size", ModelError, "own_models:size is a int, not a function"),
        ("own_models:no_model", ModelError, "returned int; a model factory returns a torch.nn.Module"),
        ("own_models:needs_more", ModelError, r"own_models:needs_more\(depth\) cannot be called.*'depth'"),
        ("own_models:", ModelError, "write SOURCE:NAME"),
        (":plain", ModelError, "write SOURCE:NAME"),
        ("timm:", ModelError, "write SOURCE:NAME"),
    ],
)
def test_factory_refusals(name, kind, text):
    with pytest.raises(kind, match=text):
        build(name)


@pytest.mark.usefixtures("own_module")
def test_the_bugs_of_a_factory_stay_its_own():
    with pytest.raises(ZeroDivisionError, match="my own bug"):
        build("own_models:fails")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed_anywhere"):
        build("broken_models:plain")
    with pytest.raises(ModelError, match="cannot be called"):
        build("own_models:plain", hidden=3)


@needs("torchvision")
@needs("timm")
def test_a_plain_import_works_in_tests():
    """What tests/conftest.py promises, on every machine."""
    assert importlib.import_module("torchvision").models.list_models()
    assert importlib.import_module("timm").list_models()


LIBRARY_DOES_NOT_LOAD = """
import torch
def refuse(path):
    raise OSError("libcudart.so: cannot open shared object file")
torch.ops.load_library = refuse
from microglia.zoo import build
for name in ("torchvision:squeezenet1_1", "timm:resnet10t"):
    print(tuple(build(name, classes=3)(torch.randn(2, 3, 64, 64)).shape))
import torchvision
try:
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except (RuntimeError, NotImplementedError):
    print("refused")
"""


@needs("torchvision")
@needs("timm")
def test_a_torchvision_whose_operators_do_not_load():
    """The CUDA-built wheel beside a CPU-only torch."""
    done = fresh.run(LIBRARY_DOES_NOT_LOAD)
    assert done.stdout.split("\n")[:3] == ["(2, 3)", "(2, 3)", "refused"], done.stderr[-2000:]


def test_another_failure_of_torchvision_is_not_hidden(monkeypatch):
    def fail(name):
        raise RuntimeError("something else")

    monkeypatch.setattr(external.importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match="something else"):
        external.import_torchvision()
