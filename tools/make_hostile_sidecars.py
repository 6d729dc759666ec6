"""Writes tests/data/hostile/: a small file for each way in which a sidecar can be wrong, and cases.json.

    python tools/make_hostile_sidecars.py [FOLDER]

The same run gives the same bytes. What is in FOLDER is replaced: *.gguf and cases.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hostile import config_cases, file_cases, json_cases, key_cases, sound_cases, tensor_cases

MODULES = (file_cases, key_cases, json_cases, config_cases, tensor_cases, sound_cases)
FOLDER = Path(__file__).parents[1] / "tests" / "data" / "hostile"


def main() -> None:
    """Writes the folder."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    cases = [case for module in MODULES for case in module.cases()]
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.gguf"):
        old.unlink()
    for case in cases:
        with (folder / f"{case.name}.gguf").open("xb") as file:  # two cases of one name are an error
            file.write(case.data)
    rows = [{"file": f"{c.name}.gguf", "reason": c.reason, "names": list(c.names), "why": c.why} for c in cases]
    (folder / "cases.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(f"{folder}: {len(cases)} files, {sum(len(case.data) for case in cases)} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
