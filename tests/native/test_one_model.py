"""Whether two files are roundings of one model: quantisations of one are, and nothing else."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from native_runs import logits_and_states, make_model

from llamamem.errors import LlamamemError
from llamamem.formats.sidecar.copy import rebind_sidecar, zero_sidecar
from llamamem.native.build import find_build
from llamamem.proof import one_model
from llamamem.proof.one_model import check_one_model

pytestmark = pytest.mark.native

TYPES = ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K_S", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M", "Q2_K")
RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def made(small: tuple[Path, Path], quantise: Callable[..., Path], tmp_path_factory: Any) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("one-model")
    return {"F32": small[0]} | {kind: quantise(small[0], folder / f"{kind}.gguf", kind) for kind in TYPES}


def changed(source: Path, made: Path, change: Callable[[str, np.ndarray], None]) -> Path:
    """A copy of an F32 file whose tensors `change` has written to."""
    shutil.copy(source, made)
    for tensor in gguf.GGUFReader(made, "r+").tensors:
        change(tensor.name, tensor.data)
    return made


def test_pairs_of_quantisations_is_one_model(made: dict[str, Path]) -> None:
    for a, b in [*((a, b) for a in ("F32", "Q8_0") for b in TYPES), ("Q4_0", "Q4_K_M"), ("Q2_K", "IQ4_NL")]:
        if a == b:
            continue
        found = check_one_model(made[a], made[b])
        assert 0 < found.most <= 1 and found.n_tensors > 100, (a, b, found)
        assert found.most > 0.1, f"{a} and {b}: {found}: the bound says nothing"


def test_a_split_file_is_the_whole_one(made: dict[str, Path], tmp_path: Path) -> None:
    program = find_build().bin_dir / "llama-gguf-split"
    command = [program, "--split", "--split-max-tensors", "40", made["Q8_0"], tmp_path / "part"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    first = min(tmp_path.glob("part-00001-of-*.gguf"))
    assert check_one_model(made["Q8_0"], first).most == 0
    assert check_one_model(first, made["Q4_0"]).most > 0.1


def test_another_training_is_another_model(made: dict[str, Path], tmp_path: Path) -> None:
    other, _ = make_model(tmp_path, "small", "--seed", "7")
    for kind in ("F32", "Q8_0", "Q4_0", "Q2_K"):
        with pytest.raises(LlamamemError, match=r"are not one model: tensor '.*' differs by .* times"):
            check_one_model(made[kind], other)


# what a fine-tune did to the weights, a part of their own size -> the rounding beside which it is seen
@pytest.mark.parametrize(
    ("size", "kind"), [(1e-5, "F32"), (0.01, "Q8_0"), (0.1, "Q4_0"), (0.1, "Q4_K_M"), (0.3, "Q3_K_M")]
)
def test_a_fine_tune_is_seen_where_rounding_does_not_hide_it(
    made: dict[str, Path], tmp_path: Path, size: float, kind: str
) -> None:
    """Of the projections alone, as a merged LoRA leaves the norms, which any rounding keeps."""

    def tune(name: str, data: np.ndarray) -> None:
        if ".ffn_" in name and "norm" not in name:
            data += (RNG.standard_normal(data.shape) * size * data.std()).astype(np.float32)

    tuned = changed(made["F32"], tmp_path / "tuned.gguf", tune)
    with pytest.raises(LlamamemError, match=r"tensor 'blk\.\d\.ffn_.*' differs by"):
        check_one_model(made[kind], tuned)


def test_what_no_rounding_touches_must_be_equal(made: dict[str, Path], quantise: Any, tmp_path: Path) -> None:
    def one_bit(name: str, data: np.ndarray) -> None:
        if name == "blk.3.attn_norm.weight":
            data.view(np.uint32)[7] ^= 1

    other = changed(made["F32"], tmp_path / "norm.gguf", one_bit)
    with pytest.raises(LlamamemError, match=r"blk\.3\.attn_norm\.weight"):
        check_one_model(made["Q4_0"], quantise(other, tmp_path / "norm-q4.gguf", "Q4_0"))


def test_what_is_not_a_number_is_no_model(made: dict[str, Path], tmp_path: Path) -> None:
    def spoil(name: str, data: np.ndarray) -> None:
        if name == "output_norm.weight":
            data[3] = np.nan

    bad = changed(made["F32"], tmp_path / "nan.gguf", spoil)
    with pytest.raises(LlamamemError, match="not a number"):
        check_one_model(bad, bad)


def test_other_figures_are_named(made: dict[str, Path], base: Path) -> None:
    with pytest.raises(LlamamemError, match=r"key '.*' is .* in one and .* in the other"):
        check_one_model(made["F32"], base)


@pytest.mark.parametrize("kind", [kind for kind in one_model._ROUNDING if kind != "F32"])
def test_the_rounding_of_llama_cpp_is_as_the_table_says(kind: str) -> None:
    """On weights of four kinds, with importance and without: never more, and not far less, or the bound is idle."""
    quantize = ctypes.CDLL(str(find_build().lib_dir / "libggml-base.so")).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    width, rows, type_ = 1024, 64, GGMLQuantizationType[kind]
    importance = np.exp(1.5 * RNG.standard_normal(width)).astype(np.float32)
    seen = []
    for weights in (
        RNG.standard_normal((rows, width)),
        RNG.laplace(size=(rows, width)),
        RNG.uniform(-1, 1, (rows, width)),
        RNG.standard_t(3, (rows, width)),
    ):
        x = np.ascontiguousarray(weights, np.float32)
        for by in (None, importance.ctypes.data):
            out = np.zeros(x.size * 4, np.uint8)
            n = quantize(type_.value, x.ctypes.data, out.ctypes.data, 0, rows, width, by)
            error = dequantize(out[:n].reshape(rows, -1), type_) - x
            largest = np.abs(x.reshape(-1, 32)).max(axis=1)
            seen.append(float(np.sqrt((error**2).mean() / (largest**2).mean())))
    assert max(seen) <= one_model._ROUNDING[kind] <= 1.5 * max(seen), seen


def test_a_state_goes_along(
    product: Any, small: tuple[Path, Path], made: dict[str, Path], cli: Any, tmp_path: Path
) -> None:
    """Its numbers stay, its binding is the new base's: the server's loader takes it there, and only there."""
    ids = np.arange(40) % 300
    old, q4 = tmp_path / "old.state", tmp_path / "q4.gguf"
    rebind_sidecar(small[1], made["Q4_0"], q4)
    product(save_memory, small[0], small[1], ids, old)
    old_files = ("--sidecar", small[1], "--base", small[0])
    done = cli("state", "rebase", old, *old_files, "--to-sidecar", q4, "--to-base", made["Q4_0"], "--output",
               tmp_path / "new.state", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["most"] < 1
    _, states = product(logits_and_states, small[0], small[1], ids)
    loaded = product(load_memory, made["Q4_0"], q4, tmp_path / "new.state")
    for a, b in zip(states, loaded, strict=True):
        np.testing.assert_array_equal(a.S, b.S)
        assert a.n == b.n
    with pytest.raises(LlamamemError, match="state-identity"):
        product(load_memory, small[0], small[1], tmp_path / "new.state")


def save_memory(base: Path, sidecar: Path, ids: np.ndarray, path: Path) -> None:
    from llamamem.native.runtime import Context, Model

    with Model.open(base, sidecar) as model, Context(model, 256) as context:
        context.decode(ids)
        context.save_memory(path)


def load_memory(base: Path, sidecar: Path, path: Path) -> Any:
    from llamamem.native.runtime import Context, Model

    with Model.open(base, sidecar) as model, Context(model, 256) as context:
        context.load_memory(path)
        return context.states()


def test_what_is_not_proven_is_refused(
    product: Any, small: tuple[Path, Path], made: dict[str, Path], cli: Any, tmp_path: Path
) -> None:
    state, q4, out = tmp_path / "old.state", tmp_path / "q4.gguf", tmp_path / "new.state"
    product(save_memory, small[0], small[1], np.arange(20), state)
    rebind_sidecar(small[1], made["Q4_0"], q4)
    other, _ = make_model(tmp_path, "small", "--seed", "7")
    bound_to_other, zeroed = tmp_path / "other-memory.gguf", tmp_path / "zero.gguf"
    rebind_sidecar(small[1], other, bound_to_other)
    zero_sidecar(q4, zeroed)
    for files, said in (
        ((small[1], small[0], bound_to_other, other), "are not one model"),
        ((small[1], small[0], zeroed, made["Q4_0"]), "are not one adapter"),
        ((small[1], small[0], q4, made["Q8_0"]), "base-hash"),
        ((q4, made["Q4_0"], small[1], small[0]), "state-identity"),
    ):
        names = ("--sidecar", "--base", "--to-sidecar", "--to-base")
        arguments = [part for pair in zip(names, files, strict=True) for part in pair]
        done = cli("state", "rebase", state, *arguments, "--output", out)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not out.exists()
