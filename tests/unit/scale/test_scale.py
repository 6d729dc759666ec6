"""What replicas are told, and the files of configs/ that put many of them behind one URL."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llamamem.errors import LlamamemError
from llamamem.scale.replica import STORE, Options

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, "model and sidecar are missing"),
        ({"model": "a.gguf"}, "model and sidecar are missing"),
        ({"demo": True, "modle": "a.gguf"}, "args: modle"),
        ({"demo": True, "lease": "soon"}, "args: lease"),
    ],
)
def test_what_would_not_do_is_named(told: dict[str, object], said: str) -> None:
    with pytest.raises(LlamamemError, match=said):
        Options.of(told)


def test_a_store_is_given_or_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STORE, raising=False)
    options = Options.of({"demo": True})
    with pytest.raises(LlamamemError, match=STORE):
        _ = options.store
    monkeypatch.setenv(STORE, "sqlite:/tmp/a.db")
    assert options.store == "sqlite:/tmp/a.db"
    assert Options.of({"demo": True, "sessions": "/tmp/b"}).store == "/tmp/b"


def test_without_ray_it_says_what_to_install(llamamem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = llamamem("scale", "--demo", "--store", tmp_path / "store")
    assert (result.status, result.out) == (2, "") and "llamamem[scale]" in result.err
    assert "Traceback" not in result.err and not (tmp_path / "store").exists()


def test_the_yaml_is_what_ray_and_replicas_take() -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'llamamem[scale]'")
    import yaml
    from ray.serve.schema import ServeDeploySchema

    read = yaml.safe_load((CONFIGS / "ray-serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(read).applications
    Options.of(application.args)
    assert application.import_path == "llamamem.scale.app:application"


def test_nginx_takes_its_file(tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if nginx is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs nginx: Debian's package nginx-light")
    done = subprocess.run(
        [nginx, "-t", "-c", CONFIGS / "nginx.conf", "-p", tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_nginx_and_ray_hash_the_header_that_gateways_take() -> None:
    from llamamem.gateway.naming import SESSION_HEADERS

    assert "$http_x_session_id consistent" in re.sub(r"\$affinity", "$http_x_session_id", _read("nginx.conf"))
    assert "x-session-id" in SESSION_HEADERS and "x-litellm-session-id" in SESSION_HEADERS
    assert "session_affinity" in _read("litellm.yaml")


def _read(name: str) -> str:
    return (CONFIGS / name).read_text(encoding="utf-8")
