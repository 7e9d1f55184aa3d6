"""Weights of others: read to the last tensor, and nothing that their pickles name is run."""

import io
import os
import pickle
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from dalle.models.foreign import ForeignFileError, read_foreign_state


class Payload:
    """Makes the folder ``marker`` when it is unpickled the ordinary way."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def vanishing(monkeypatch):
    """A module class that exists while it is saved and is not importable afterwards."""
    module = types.ModuleType("vanished_package")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 3))
            self.blocks = nn.Sequential(OrderedDict(first=nn.Linear(3, 4), norm=nn.BatchNorm1d(4)))
            self.register_buffer("passing", torch.ones(1), persistent=False)
            self.register_parameter("absent", None)
            self.options = {"partial": print}

    Net.__module__, Net.__qualname__ = module.__name__, "Net"
    module.Net = Net
    monkeypatch.setitem(sys.modules, module.__name__, module)
    net = Net()

    def save(path, **options):
        torch.save(net, path, **options)
        monkeypatch.delitem(sys.modules, module.__name__)
        return net.state_dict()

    return save


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_of_an_unknown_package_gives_its_state_dict(tmp_path, vanishing, zipped):
    expected = vanishing(tmp_path / "net.pkl", _use_new_zipfile_serialization=zipped)
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        torch.load(tmp_path / "net.pkl", weights_only=False)
    assert_equal(read_foreign_state(tmp_path / "net.pkl"), expected)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_state_dict_is_read(tmp_path, wrapped):
    state = nn.Linear(3, 4).bfloat16().state_dict()
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "state.pt")
    assert_equal(read_foreign_state(tmp_path / "state.pt"), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_inside_a_module_is_not_run(tmp_path, vanishing, zipped, monkeypatch):
    marker = tmp_path / "marker"
    net = nn.Linear(3, 4)
    net.extra = Payload(marker)
    torch.save(net, tmp_path / "net.pkl", _use_new_zipfile_serialization=zipped)
    assert_equal(read_foreign_state(tmp_path / "net.pkl"), nn.Linear.state_dict(net))
    assert not marker.exists()
    torch.load(tmp_path / "net.pkl", weights_only=False)        # the payload is one
    assert marker.exists()


HOSTILE = {
    "an attribute set on a torch function":
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}(X\x0c\x00\x00\x00__defaults__K\x01\x85u\x86b.",
    "os.system": b"cos\nsystem\n(S'mkdir {marker}'\ntR.",
    "nested names": b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x02os\x8c\x06system\x86R.",
    "eval": b"c__builtin__\neval\n(S'__import__(\"os\").mkdir(\"{marker}\")'\ntR.",
    "nothing": b"",
    "half an opcode": b"\x80",
    "deep nesting": b"\x80\x02" + b"(" * 100_000 + b".",
    "text": b"hello",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("wrapped", ["bare", "zipped", "with legacy header"])
def test_a_hostile_pickle_ends_in_one_line_and_runs_nothing(tmp_path, name, wrapped):
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    marker, path = tmp_path / "marker", tmp_path / "weights.pt"
    code = HOSTILE[name].replace(b"{marker}", str(marker).encode())
    if wrapped == "zipped":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", code)
            archive.writestr("archive/version", "3\n")
    elif wrapped == "bare":
        path.write_bytes(code)
    else:
        header = [pickle.dumps(part, 2) for part in (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True})]
        path.write_bytes(b"".join(header) + code + pickle.dumps([], 2))
    with pytest.raises(ForeignFileError) as raised:
        read_foreign_state(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    assert not marker.exists()
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults


def test_the_source_that_an_old_file_brings_is_not_written_out(tmp_path, monkeypatch):
    """The format before torch 1.6 holds classes with their source, which torch may write beside the run as a patch."""
    monkeypatch.chdir(tmp_path)
    state = b"N}(U\x0cdump_patchesI01\nU\x08__name__U\x04evilu\x86b"        # attributes for what is on the stack
    code = b"\x80\x02(U\x06module(ctorch._utils\n_rebuild_tensor_v2\n" + state + b"U\x01fU\x04codettQ."
    header = [pickle.dumps(part, 2) for part in (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True})]
    (tmp_path / "weights.pt").write_bytes(b"".join(header) + code + pickle.dumps([], 2))
    with pytest.raises(ForeignFileError, match="changes the functions"):
        read_foreign_state(tmp_path / "weights.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


def test_a_torchscript_archive_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "net.pt"))
    with pytest.raises(ForeignFileError, match="TorchScript"):
        read_foreign_state(tmp_path / "net.pt")


def test_an_archive_that_unfolds_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1_000_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, \
            zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for member in plain.infolist():
            bomb.writestr(member.filename, plain.read(member))
    with pytest.raises(ForeignFileError, match="compressed"):
        read_foreign_state(tmp_path / "bomb.pt")


def test_a_tensor_that_repeats_one_number_a_billion_times_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1).expand(10**9)}, tmp_path / "bomb.pt")
    with pytest.raises(ForeignFileError, match="claims more than the file holds"):
        read_foreign_state(tmp_path / "bomb.pt")


def test_a_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "weights.tar", "w") as tar:
        member = tarfile.TarInfo("\udc80storages")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member, io.BytesIO())
    with pytest.raises(ForeignFileError, match="neither"):
        read_foreign_state(tmp_path / "weights.tar")


@pytest.mark.parametrize("content", [{"step": 3}, [torch.ones(1)], {3: torch.ones(1)}, torch.ones(1), {}])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ForeignFileError):
        read_foreign_state(tmp_path / "other.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ForeignFileError, match=r"none\.pt cannot be read: No such file"):
        read_foreign_state(tmp_path / "none.pt")
