"""Checkpoints are read without torch, exactly, and nothing in a pickle can run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint import read_checkpoint, read_torch_zip
from llamamem.formats.gguf_file import GgufTensor

DELTA = "model.language_model.layers.0.self_attn.delta_q_proj"


def repack(source: Path, target: Path, **members: bytes | None) -> Path:
    """A copy of a .pt whose named members are replaced, or left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            key = info.filename.partition("/")[2].replace(".", "_").replace("/", "_")
            data = members.get(key, old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
    return target


def as_safetensors(tensors: dict[str, GgufTensor], path: Path) -> None:
    header, data = {}, b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_every_tensor_is_there_with_its_bytes(model_a: Path) -> None:
    checkpoint = read_checkpoint(model_a)
    assert len(checkpoint.tensors) == 186
    assert {t.dtype for t in checkpoint.tensors.values()} == {"BF16"}
    assert checkpoint.tensors[DELTA].shape == (64, 8)
    assert checkpoint.config["rwkv_ms_chunk_size"] == 48 and checkpoint.metadata["rank"] == 8
    with zipfile.ZipFile(model_a / "delta_mem_adapter.pt") as archive:
        stored = [archive.read(f"delta_mem_adapter/data/{i}") for i in range(186)]
    assert [t.data for t in checkpoint.tensors.values()] == stored


def test_safetensors_give_the_same(model_a: Path, tmp_path: Path) -> None:
    original = read_checkpoint(model_a)
    for name in ("delta_mem_config.json", "adapter_metadata.json"):
        shutil.copy(model_a / name, tmp_path)
    as_safetensors(original.tensors, tmp_path / "delta_mem_adapter.safetensors")
    assert read_checkpoint(tmp_path).tensors == original.tensors


def test_two_adapters_in_one_directory_are_a_question(model_a: Path, tmp_path: Path) -> None:
    for name in ("delta_mem_config.json", "adapter_metadata.json", "delta_mem_adapter.pt"):
        shutil.copy(model_a / name, tmp_path)
    as_safetensors(read_checkpoint(model_a).tensors, tmp_path / "delta_mem_adapter.safetensors")
    with pytest.raises(LlamamemError, match=r"\.safetensors and delta_mem_adapter\.pt; move away"):
        read_checkpoint(tmp_path)


def test_config_by_name(model_a: Path) -> None:
    assert read_checkpoint(model_a, "delta_mem_config_v2.json").config["rwkv_ms_semantics_version"] == 2
    with pytest.raises(LlamamemError, match=r"nowhere\.json: cannot be read"):
        read_checkpoint(model_a, "nowhere.json")


def test_config_by_path(model_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere.json").write_text('{"rank": 4}')
    assert read_checkpoint(model_a, str(tmp_path / "elsewhere.json")).config == {"rank": 4}
    monkeypatch.chdir(tmp_path)
    assert read_checkpoint(model_a, "elsewhere.json").config == {"rank": 4}


class Storage:
    """Pickles as torch pickles a storage."""

    def __init__(self, kind: str, key: str, numel: int) -> None:
        self.kind, self.key, self.numel = kind, key, numel


class Call:
    """Pickles as a call of a global."""

    def __init__(self, module: str, name: str, *args: Any) -> None:
        self.module, self.name, self.args = module, name, args


def dumps(value: Any) -> bytes:
    """Pickle with globals that need not exist here, written opcode by opcode."""
    match value:
        case Storage():
            text = [
                dumps("storage"),
                f"ctorch\n{value.kind}\n".encode(),
                dumps(value.key),
                dumps("cpu"),
                dumps(value.numel),
            ]
            return b"(" + b"".join(text) + b"tQ"
        case Call():
            return f"c{value.module}\n{value.name}\n".encode() + dumps(value.args) + b"R"
        case dict():
            return b"(" + b"".join(dumps(key) + dumps(item) for key, item in value.items()) + b"d"
        case tuple():
            return b"(" + b"".join(map(dumps, value)) + b"t"
        case _:
            return pickle.dumps(value, protocol=0).removesuffix(b".")


def tensor(storage: Any, offset: int, shape: Any, stride: Any) -> Call:
    return Call(
        "torch._utils", "_rebuild_tensor_v2", storage, offset, shape, stride, False, Call("collections", "OrderedDict")
    )


def write_pt(path: Path, value: Any, *storages: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + dumps(value) + b".")
        for i, data in enumerate(storages):
            archive.writestr(f"archive/data/{i}", data)
    return path


def test_views_types_and_strides(tmp_path: Path) -> None:
    values = np.arange(12, dtype="<f4")
    transposed = tensor(Storage("FloatStorage", "0", 12), 0, (4, 3), (1, 4))
    tail = tensor(Storage("FloatStorage", "0", 12), 8, (2, 2), (2, 1))
    half = tensor(Storage("HalfStorage", "1", 3), 0, (3,), (1,))
    value = {"t": transposed, "tail": tail, "half": half}
    path = write_pt(tmp_path / "x.pt", value, values.tobytes(), np.ones(3, "<f2").tobytes())
    read = read_torch_zip(path)
    assert read["t"].data == np.ascontiguousarray(values.reshape(3, 4).T).tobytes() and read["t"].shape == (4, 3)
    assert read["tail"].data == values[8:].tobytes() and read["tail"].dtype == "F32"
    assert read["half"] == GgufTensor("half", "F16", (3,), np.ones(3, "<f2").tobytes())


def test_a_malicious_pickle_is_refused_before_it_runs(model_a: Path, tmp_path: Path) -> None:
    flag = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {flag}",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        bad = repack(
            model_a / "delta_mem_adapter.pt", tmp_path / "evil.pt", data_pkl=pickle.dumps({"x": Evil()}, protocol)
        )
        with pytest.raises(LlamamemError, match=r"evil\.pt: refused: .*system'"):
            read_torch_zip(bad)
    assert not flag.exists()


@pytest.mark.parametrize(
    "call",
    [
        Call("builtins", "eval", "1"),
        Call("builtins", "getattr", 1, "real"),
        Call("torch", "load", "x"),
        Call("torch", "DoubleStorage"),
        Call("torch._utils", "_rebuild_tensor_v2.__globals__"),
        Call("collections", "OrderedDict.__init__"),
        Call("collections", "defaultdict"),
    ],
)
def test_names_that_no_dict_of_tensors_needs(call: Call, tmp_path: Path) -> None:
    with pytest.raises(LlamamemError, match="refused"):
        read_torch_zip(write_pt(tmp_path / "x.pt", {"x": call}))


FLOATS = Storage("FloatStorage", "0", 4)


@pytest.mark.parametrize(
    "value",
    [
        {"x": tensor(FLOATS, 0, (5,), (1,))},  # beyond the storage
        {"x": tensor(FLOATS, 3, (2,), (1,))},
        {"x": tensor(FLOATS, -1, (2,), (1,))},
        {"x": tensor(FLOATS, 0, (2, 2), (4, 1))},
        {"x": tensor(FLOATS, 0, (2,), (-1,))},
        {"x": tensor(FLOATS, 0, (-1,), (1,))},
        {"x": tensor(FLOATS, 0, (2, 2), (1,))},
        {"x": tensor(FLOATS, 0, (1 << 40,), (0,))},  # 4 TB of 16 bytes
        {f"x{i}": tensor(FLOATS, 0, (1 << 25,), (0,)) for i in range(20)},
        {"x": tensor(Storage("FloatStorage", "1", 4), 0, (1,), (1,))},  # no such storage
        {"x": tensor(Storage("FloatStorage", "../0", 4), 0, (1,), (1,))},
        {"x": tensor("no storage", 0, (1,), (1,))},
        {"x": "text"},
        {1: tensor(FLOATS, 0, (1,), (1,))},
        {"x": {"y": tensor(FLOATS, 0, (1,), (1,))}},
        7,
    ],
)
def test_malformed_tensors(value: Any, tmp_path: Path) -> None:
    path = write_pt(tmp_path / "x.pt", value, np.zeros(4, "<f4").tobytes())
    with pytest.raises(LlamamemError, match=r"x\.pt: "):
        read_torch_zip(path)


def test_files_that_torch_did_not_write(model_a: Path, tmp_path: Path) -> None:
    good = model_a / "delta_mem_adapter.pt"
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(OrderedDict()))
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:-100])
    repack(good, tmp_path / "big_endian.pt", byteorder=b"big")
    repack(good, tmp_path / "no_pickle.pt", data_pkl=None)
    repack(good, tmp_path / "no_storage.pt", data_5=None)
    repack(good, tmp_path / "short_storage.pt", data_5=b"12")
    with zipfile.ZipFile(tmp_path / "compressed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1000))
    for path in sorted(tmp_path.glob("*.pt")):
        with pytest.raises(LlamamemError, match=path.name) as caught:
            read_torch_zip(path)
        assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=300)
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_pickle_gives_tensors_or_one_clear_error(
    flips: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    data = bytearray(
        b"\x80\x02" + dumps({"x": tensor(FLOATS, 0, (2, 2), (2, 1)), "y": tensor(FLOATS, 2, (2,), (1,))}) + b"."
    )
    for at, byte in flips:
        data[at % len(data)] = byte
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(data))
        archive.writestr("archive/data/0", bytes(16))
    try:
        tensors = read_torch_zip(path)
    except LlamamemError as e:
        assert str(path) in str(e) and "\n" not in str(e)
        return
    assert all(len(t.data) <= 16 for t in tensors.values())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"rank": 8, "rank": 9}', "'rank' is there twice"),
        ('{"alpha": NaN}', "not valid JSON"),
    ],
)
def test_a_malformed_config(text: str, says: str, model_a: Path, tmp_path: Path) -> None:
    shutil.copy(model_a / "delta_mem_adapter.pt", tmp_path)
    (tmp_path / "delta_mem_config.json").write_text(text)
    with pytest.raises(LlamamemError, match=rf"delta_mem_config\.json: .*{says}"):
        read_checkpoint(tmp_path)


def test_a_directory_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(LlamamemError, match="holds neither"):
        read_checkpoint(tmp_path)
    with pytest.raises(LlamamemError, match="no such checkpoint directory"):
        read_checkpoint(tmp_path / "nowhere")


def test_metadata_may_be_absent(model_a: Path, tmp_path: Path) -> None:
    for name in ("delta_mem_adapter.pt", "delta_mem_config.json"):
        shutil.copy(model_a / name, tmp_path)
    assert read_checkpoint(tmp_path).metadata == {}
    (tmp_path / "adapter_metadata.json").write_text(json.dumps({"base_model": "x"}))
    assert read_checkpoint(tmp_path).metadata == {"base_model": "x"}
