"""A full disk: one clear sentence, no debris, and the same bits once there is room."""

import pytest
import torch
from torch import nn

import microglia as mg
from commands import CONTEXT, LIMIT, TINY, microglia, refused, weights
from microglia.core.errors import FileError
from microglia.storage import files


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The bytes of the model of a run that has room."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert microglia("prune", *TINY, "--out", folder / "run", folder=folder / "work").status == 0
    return weights(folder / "run")


@pytest.mark.parametrize(
    "file_size",
    [
        pytest.param(100, id="no file fits"),
        pytest.param(210_000, id="the dense model fits, its training state does not"),
        pytest.param(600_000, id="training fits"),
    ],
)
def test_a_run_goes_on_when_there_is_room_again(tmp_path, undisturbed, file_size):
    words = ("prune", *TINY, "--out", tmp_path / "run")
    full = microglia(*words, folder=tmp_path / "work", file_size=file_size)
    if file_size < 600_000:
        refused(full, "There is no room on the disk to write")
        assert not list(tmp_path.rglob("*.part"))
        assert not (tmp_path / "run" / "result.json").exists()
    else:
        assert full.status == 0, full.err
    again = microglia(*words, folder=tmp_path / "work")
    assert again.status == 0, again.err
    assert weights(tmp_path / "run") == undisturbed


def limited(directory, errors):
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        mg.save(nn.Linear(100, 100), directory)
    except FileError as error:
        errors.put(str(error))


def test_saving_to_a_full_disk_keeps_what_was_saved_before(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(100, 100)
    mg.save(model, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    errors = CONTEXT.Queue()
    process = CONTEXT.Process(target=limited, args=(tmp_path, errors))
    process.start()
    assert "There is no room on the disk" in errors.get(timeout=LIMIT)
    process.join(LIMIT)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert torch.equal(mg.load(tmp_path, nn.Linear(100, 100)).weight, model.weight)


@pytest.mark.parametrize("code", sorted(files.NO_ROOM))
def test_every_way_to_be_full_is_named(tmp_path, monkeypatch, code):
    def full(descriptor):
        raise OSError(code, "full")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FileError, match="There is no room on the disk"):
        files.write_atomic(tmp_path / "file", "content")
    assert not list(tmp_path.iterdir())
