"""Is a sidecar file right, and does the runtime say the same?"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.base import file_sha256
from llamamem.formats.findings import Finding
from llamamem.formats.sidecar import Sidecar, validate_sidecar


@dataclass(frozen=True)
class SidecarReport:
    """All findings about a file; `sidecar` is None if it cannot be used.

    `loader` is what the runtime's own loader says, None if it loads the file; it means nothing unless `asked`.
    """

    path: Path
    sha256: str | None
    sidecar: Sidecar | None
    findings: tuple[Finding, ...]
    asked: bool
    loader: str | None

    @property
    def disagreement(self) -> str | None:
        """Where the runtime's loader and this package differ: in whether the file is refused, or in why."""
        ours = next((f.reason for f in self.findings if not f.reason.startswith("base-")), None)
        match = re.search(r": \[([a-z0-9-]+)\] ", self.loader or "")
        theirs = match.group(1) if match else self.loader
        if not self.asked or ours == theirs:
            return None
        return f"the runtime's loader says {theirs or 'ok'}, the validator {ours or 'ok'}: please report this file"

    @property
    def ok(self) -> bool:
        """Nothing is wrong, and nobody disagrees."""
        return not self.findings and self.disagreement is None

    def as_json(self) -> dict[str, Any]:
        """For machines; `runtime` is there if the loader was asked."""
        tensors = self.sidecar.tensors.values() if self.sidecar else []
        report = {
            "path": str(self.path),
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
            "sha256": self.sha256,
            "tensors": len(tensors),
            "tensor_bytes": sum(len(tensor.data) for tensor in tensors),
        }
        loader = {"loads": self.loader is None, "message": self.loader, "disagreement": self.disagreement}
        return report | ({"runtime": loader} if self.asked else {})


def check_sidecar_file(
    path: str | Path,
    base: str | Path | None = None,
    *,
    runtime: bool = False,
    progress: Callable[[int], None] | None = None,
) -> SidecarReport:
    """Checks every rule of docs/sidecar.md; with `runtime`, asks the loader too, which needs a build."""
    path = Path(path)
    loader = None
    if runtime:
        from llamamem.native.runtime import loader_refusal  # the bindings, which a check of a file does not need

        loader = loader_refusal(path)
    checked = validate_sidecar(path, base, progress)
    try:
        sha256 = file_sha256(path)
    except LlamamemError:
        sha256 = None
    return SidecarReport(path, sha256, checked.sidecar, tuple(checked.findings), runtime, loader)
