"""Reading a file that a stranger made: what torch.save and safetensors write arrives, and nothing hostile runs."""

import builtins
import importlib
import io
import json
import os
import pickle
import shlex
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dat_deploy.errors import CheckpointError
from dat_deploy.networks import untrusted
from dat_deploy.networks.untrusted import read_tensors

ADVICE = "If you trust its source, save its state dict alone, with torch.save or safetensors."
TENSORS = {"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.ones(3), "layer.index": torch.arange(4)}


def yacs_config() -> dict[str, Any]:
    """What the official files carry; only the class's name and how it is pickled matter (yacs 0.1.8: NEWOBJ, BUILD)."""

    class CfgNode(dict[str, Any]):
        def __init__(self, content: dict[str, Any]) -> None:
            super().__init__(content)
            self.__dict__.update({"__immutable__": True, "__deprecated_keys__": set(), "__renamed_keys__": {}})

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    return CfgNode({"BASE": [""], "DATA": CfgNode({"IMG_SIZE": 224, "MEAN": (0.5, 0.4)}), "AMP": True})


def save_official(path: Path, tensors: dict[str, Tensor], *, legacy: bool = False, **more: Any) -> Path:
    """A file as upstream's training script writes it; yacs exists only while it is written."""
    config = yacs_config()
    module = types.ModuleType("yacs.config")
    module.CfgNode = type(config)  # type: ignore[attr-defined]
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    content = {"model": OrderedDict(tensors), "config": config, "epoch": 299, "optimizer": optimizer, **more}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert "yacs" not in sys.modules
    return path


def rewrite_zip(path: Path, edit: Callable[[str, bytes], tuple[str, bytes]], compression: int = 0) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [edit(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)


def replace_in_pickle(path: Path, old: bytes, new: bytes) -> None:
    def edit(name: str, data: bytes) -> tuple[str, bytes]:
        if name.endswith("data.pkl"):
            assert data.count(old) == 1
            data = data.replace(old, new)
        return name, data

    rewrite_zip(path, edit)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's own message advises to switch the protection off
    return str(caught.value)


# --- what torch.save and safetensors write arrives ---


@pytest.mark.parametrize(
    "form", ["official", "official_legacy", "state_dict", "bare", "module_prefix", "parameters", "safetensors"]
)
def test_every_form_of_file_gives_the_same_tensors(form: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    match form:
        case "official":
            save_official(path, TENSORS)
        case "official_legacy":
            save_official(path, TENSORS, legacy=True)
        case "state_dict":
            torch.save({"state_dict": TENSORS, "epoch": 3}, path)
        case "bare":
            torch.save(TENSORS, path)
        case "module_prefix":
            save_official(path, {f"module.{name}": tensor for name, tensor in TENSORS.items()})
        case "parameters":
            torch.save({k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in TENSORS.items()}, path)
        case "safetensors":
            save_file(TENSORS, path)  # known by its content, not by its name
    loaded = read_tensors(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)  # the type too
        assert not loaded[name].requires_grad


# --- hostile files: refused by name, and nothing runs ---


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.reduced

    def __call__(self) -> None:
        raise AssertionError("only there so that pickle takes it for a function")


def make_canary(canary: Path) -> str:
    return f"touch {shlex.quote(str(canary))}"


def nested_pickle(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Call(os.system, make_canary(canary)), buffer)
    return buffer.getvalue()


PAYLOADS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "os_system": (lambda canary: Call(os.system, make_canary(canary)), "posix.system"),
    "eval": (lambda canary: Call(eval, f"open({str(canary)!r}, 'w').close()"), "builtins.eval"),
    "exec": (lambda canary: Call(builtins.exec, f"open({str(canary)!r}, 'w').close()"), "builtins.exec"),
    "chain": (
        lambda canary: Call(Call(getattr, Call(importlib.import_module, "os"), "system"), make_canary(canary)),
        "builtins.getattr",
    ),
    "torch_storage": (
        lambda canary: Call(torch.storage._load_from_bytes, nested_pickle(canary)),
        "torch.storage._load_from_bytes",
    ),
}
CONTAINERS: dict[str, Callable[[Any, Path], Any]] = {
    "zip": lambda content, path: torch.save(content, path),
    "zip_protocol_4": lambda content, path: torch.save(content, path, pickle_protocol=4),
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "plain_pickle_2": lambda content, path: path.write_bytes(pickle.dumps(content["config"], 2)),
    "plain_pickle_5": lambda content, path: path.write_bytes(pickle.dumps(content["config"], 5)),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_code_is_refused_by_name_and_does_not_run(payload: str, container: str, tmp_path: Path) -> None:
    build, name = PAYLOADS[payload]
    path, canary = tmp_path / "evil.pth", tmp_path / "canary"
    evil = build(canary)
    CONTAINERS[container]({"model": TENSORS, "config": evil}, path)
    assert refusal(path) == (
        f"refused to load {path}: it asks for the Python object '{name}', which a checkpoint does not need. {ADVICE}"
    )
    assert not canary.exists()


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_torch_refuses_code_too_should_the_inspection_miss_it(
    payload: str, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for inspection in ("_inspect_zip", "_inspect_legacy"):
        monkeypatch.setattr(untrusted, inspection, lambda *_: None)
    path, canary = tmp_path / "evil.pth", tmp_path / "canary"
    CONTAINERS[container]({"model": {}, "config": PAYLOADS[payload][0](canary)}, path)
    assert refusal(path).startswith(f"{path} is damaged or incomplete: ")
    assert not canary.exists()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_payloads_do_run_when_python_unpickles_them(payload: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(PAYLOADS[payload][0](canary)))  # noqa: S301  # the control of the test above
    assert canary.exists()


@pytest.mark.parametrize(
    ("pickled", "name"),
    [
        (b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n.", "os.system"),  # INST, which names without GLOBAL
        (b"\x80\x02X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.", "os.system"),  # STACK_GLOBAL
        (b"\x80\x02X\x06\x00\x00\x00system2X\x02\x00\x00\x00os\x93.", "None.os"),  # a name that is computed
        (b"\x80\x02\x82\x05.", "copyreg extension.5"),
        (b"\x80\x02K\x01\x85X\x06\x00\x00\x00system\x93.", "None.system"),  # a name that is no string
        (b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.", "builtins.bytearray"),  # 64 GiB
        (b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.", "torch._utils._rebuild_sparse_tensor"),
    ],
)
def test_every_way_to_name_an_object_is_seen(pickled: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({}, path)
    rewrite_zip(path, lambda member, data: (member, pickled if member.endswith("data.pkl") else data))
    assert refusal(path) == (
        f"refused to load {path}: it asks for the Python object '{name}', which a checkpoint does not need. {ADVICE}"
    )


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x020.",  # pops an empty stack
        b"\x80\x02(q\x00.",  # a mark where an object belongs
        b"\x80\x02h\x07.",  # an object that was never stored
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a string of 2 GiB in a file of 15 bytes
        b"\x80\x02N",  # no end
        b"\x80\x02X\x01\x00\x00\x00aQ.",  # a reference to something that is no storage
        # tuples as a key, so deep that hashing them overflows the stack of Python itself
        pytest.param(b"\x80\x02}K\x01" + b"\x85" * 200_000 + b"K\x01s.", id="deep_tuples"),
        # tuples that share their members: a trillion numbers when written out
        pytest.param(b"\x80\x02K\x01" + b"q\x00h\x00\x86" * 40 + b".", id="shared_tuples"),
    ],
)
def test_a_malformed_pickle_is_refused(pickled: bytes, tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({}, path)
    rewrite_zip(path, lambda member, data: (member, pickled if member.endswith("data.pkl") else data))
    assert refusal(path) == f"{path} is damaged or incomplete: its pickle is not one that torch.save writes."


def test_another_pickle_protocol_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(TENSORS, path, pickle_protocol=4)
    assert refusal(path) == (
        f"{path} has pickle protocol 4; only torch.save's own, 2, can be read without running code."
    )


@pytest.fixture
def three_numbers(tmp_path: Path) -> Path:
    path = tmp_path / "evil.pth"
    torch.save({"model": {"a": torch.ones(3)}}, path)
    return path


def test_a_storage_that_claims_more_than_the_file_holds_is_refused(three_numbers: Path) -> None:
    replace_in_pickle(three_numbers, b"K\x03t", b"J\xff\xff\xff\x7ft")
    assert refusal(three_numbers) == (
        f"refused to load {three_numbers}: it claims 8589934588 bytes for storage '0', which has 12."
    )


def test_a_storage_that_the_file_lacks_is_refused(three_numbers: Path) -> None:
    old, new = (b"X" + struct.pack("<I", len(key)) + key for key in (b"0", b"../../etc/passwd"))
    replace_in_pickle(three_numbers, old, new)
    assert refusal(three_numbers) == (
        f"refused to load {three_numbers}: it claims 12 bytes for storage '../../etc/passwd', which has 0."
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"QK\x00K\x03\x85", b"QK\x00K\x63\x85"),  # 99 items of three
        (b"QK\x00K\x03\x85", b"QK\x63K\x03\x85"),  # three items from the 99th on
        (b"K\x01\x85", b"K\x63\x85"),  # every 99th
        (b"K\x01\x85", b"J\xff\xff\xff\xff\x85"),  # backwards
        (b"QK\x00K\x03\x85", b"QJ\xff\xff\xff\xffK\x03\x85"),  # from the item before the first
    ],
)
def test_a_tensor_that_reaches_outside_its_storage_is_refused(old: bytes, new: bytes, three_numbers: Path) -> None:
    with zipfile.ZipFile(three_numbers) as archive:
        pickled = archive.read("evil/data.pkl")
    for memo in (b"q\x08", b"q\x09"):  # BINPUT between the parts that are written together here
        pickled = pickled.replace(memo, b"")
    assert pickled.count(old) == 1
    rewrite_zip(
        three_numbers, lambda name, data: (name, pickled.replace(old, new) if name.endswith("data.pkl") else data)
    )
    assert refusal(three_numbers).startswith(f"{three_numbers} is damaged or incomplete: ")


def test_a_legacy_storage_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"K\x03Nt") == 1
    path.write_bytes(data.replace(b"K\x03Nt", b"J\xff\xff\xff\x7fNt"))
    assert refusal(path) == (
        f"refused to load {path}: it claims 8589934588 bytes of storage, and the file has {path.stat().st_size}."
    )


def test_a_legacy_storage_that_is_claimed_with_two_sizes_counts_with_both(tmp_path: Path) -> None:
    path, x = tmp_path / "evil.pth", torch.ones(3)
    torch.save({"a": x, "b": x[:2]}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"K\x03Nt") == 2
    path.write_bytes(data.replace(b"K\x03Nt", b"J\xff\xff\xff\x7fNt", 1))  # torch sets aside what the first one says
    assert refusal(path) == (
        f"refused to load {path}: it claims 8589934600 bytes of storage, and the file has {path.stat().st_size}."
    )


def test_a_legacy_tensor_that_reaches_outside_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"QK\x00K\x03\x85") == 1
    path.write_bytes(data.replace(b"QK\x00K\x03\x85", b"QK\x00K\x63\x85"))
    assert refusal(path).startswith(f"{path} is damaged or incomplete: ")


@pytest.mark.parametrize("member", ["../../evil", "/evil", "evil\\..\\evil"])
def test_an_archive_member_that_leaves_its_folder_is_refused(member: str, three_numbers: Path) -> None:
    with zipfile.ZipFile(three_numbers, "a") as archive:
        archive.writestr(member, b"x")
    shown = member.replace("\\", "\\\\")
    assert (
        refusal(three_numbers) == f"refused to load {three_numbers}: its member '{shown}' leaves the archive's folder."
    )


def test_two_archive_members_of_one_name_are_refused(three_numbers: Path) -> None:
    with (
        zipfile.ZipFile(three_numbers, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("evil/data.pkl", pickle.dumps(Call(os.system, "true"), 2))
    assert refusal(three_numbers) == f"refused to load {three_numbers}: two of its members have one name."


def test_a_compressed_archive_is_refused(three_numbers: Path) -> None:
    rewrite_zip(
        three_numbers,
        lambda name, data: (name, b"\0" * 10**7 if name.endswith("data/0") else data),
        zipfile.ZIP_DEFLATED,
    )
    assert three_numbers.stat().st_size < 20_000
    assert refusal(three_numbers) == f"refused to load {three_numbers}: it is compressed, which torch.save never does."


def test_an_archive_that_declares_more_than_it_holds_is_refused(three_numbers: Path) -> None:
    data = bytearray(three_numbers.read_bytes())
    entry = data.rindex(b"PK\x01\x02")  # the last record of the central directory
    struct.pack_into("<II", data, entry + 20, 2**32 - 2, 2**32 - 2)
    three_numbers.write_bytes(data)
    message = refusal(three_numbers)
    assert message.startswith(f"refused to load {three_numbers}: its members declare 42949")
    assert message.endswith(f" bytes, and the file has {len(data)}.")


def test_a_pickle_too_large_for_a_checkpoint_is_refused(three_numbers: Path) -> None:
    rewrite_zip(three_numbers, lambda name, data: (name, data + bytes(2**24) if name.endswith(".pkl") else data))
    message = refusal(three_numbers)
    assert message.startswith(f"refused to load {three_numbers}: its pickle has 1677")
    assert message.endswith(" bytes, and 16777216 are the limit.")


# --- files that are no checkpoints ---


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_short_anywhere_is_refused(legacy: bool, tmp_path: Path) -> None:
    path = save_official(tmp_path / "model.pth", {"large": torch.rand(100_000), **TENSORS}, legacy=legacy)
    data = path.read_bytes()
    for share in (0.001, 0.01, 0.1, 0.5, 0.9, 0.9999):
        path.write_bytes(data[: int(share * len(data))])
        message = refusal(path)
        assert message.startswith((f"{path} is damaged or incomplete: ", f"refused to load {path}: it claims ")), share


def test_a_flipped_bit_in_the_weights_is_noticed(three_numbers: Path) -> None:
    data = bytearray(three_numbers.read_bytes())
    data[data.index(struct.pack("<fff", 1, 1, 1))] ^= 1
    three_numbers.write_bytes(data)
    assert refusal(three_numbers) == (
        f"{three_numbers} is damaged: the checksum of 'evil/data/0' is wrong. Download it again."
    )


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.pth", b"", "{path} is empty."),
        (
            "text.pth",
            b"hello, I am a text file",
            "{path} is not a checkpoint: neither torch.save nor safetensors wrote it.",
        ),
        (
            "text2.pth",
            b"settings{a: 1, b: 2}",
            "{path} is not a checkpoint: neither torch.save nor safetensors wrote it.",
        ),
        (
            "cat.jpg",
            b"\xff\xd8\xff\xe0\0\x10JFIF",
            "{path} is not a checkpoint: neither torch.save nor safetensors wrote it.",
        ),
        ("dict.pkl", pickle.dumps({"a": 1}, 2), "{path} is a plain pickle, not a checkpoint that torch.save wrote."),
        ("page.pth", b"PK\x03\x04 and no archive", "{path} is damaged or incomplete: File is not a zip file."),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert refusal(path) == message.format(path=path)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x08", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 8) + b'{"a": 1}', struct.pack("<Q", 2) + b"{"],
)
def test_a_corrupt_safetensors_header_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    expected = f"{path} is not a readable safetensors file: " if data else f"{path} is empty."
    assert refusal(path).startswith(expected)


def test_safetensors_whose_tensor_lies_outside_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert refusal(path).startswith(f"{path} is not a readable safetensors file: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "{path} holds an object of type 'list', not a state dict."),
        (torch.ones(1), "{path} holds an object of type 'Tensor', not a state dict."),
        ({"epoch": 3}, "{path} holds no tensors, neither in itself nor under 'model' or 'state_dict'."),
        ({"model": {}}, "{path} holds no tensors, neither in itself nor under 'model' or 'state_dict'."),
        (
            {"a": torch.ones(1), "epoch": 3},
            "{path} has the entry 'epoch' of type 'int' among its tensors; a state dict has names and tensors only.",
        ),
    ],
)
def test_a_file_without_a_state_dict_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    assert refusal(path) == message.format(path=path)


def test_a_zip_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "archive.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/readme.txt", "hello")
    assert refusal(path) == f"{path} is a zip archive that torch.save did not write."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/constants.pkl", "")
    assert refusal(path) == f"{path} is a TorchScript program; a state dict written by torch.save is needed."


def test_paths_that_cannot_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(tmp_path) == f"{tmp_path} is a folder; name the checkpoint file in it."
    missing = tmp_path / "missing.pth"
    assert refusal(missing) == f"cannot read {missing}: No such file or directory."
    pipe = tmp_path / "pipe.pth"
    os.mkfifo(pipe)
    assert refusal(pipe) == f"{pipe} is not a regular file."
    closed = tmp_path / "closed.pth"
    closed.write_bytes(b"x")

    def denied(*_: Any) -> Iterator[None]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root, who runs CI, is denied nothing
    assert refusal(closed) == f"cannot read {closed}: Permission denied."
