"""Writes tests/data/hostile/: a small file for each way in which a sidecar can be wrong, and cases.json.

    python tools/make_hostile_sidecars.py [FOLDER]

The same run gives the same bytes. In FOLDER, cases.json and the files that it has are replaced; all else stays, such as
what a fuzzer found.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from hostile import config_cases, file_cases, json_cases, key_cases, sound_cases, tensor_cases, version_3

MODULES = (file_cases, key_cases, json_cases, config_cases, tensor_cases, sound_cases, version_3)
FOLDER = Path(__file__).parents[1] / "tests" / "data" / "hostile"


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description="Writes a small file for each way in which a sidecar can be wrong.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="default: tests/data/hostile")
    folder: Path = parser.parse_args().folder
    cases = [case for module in MODULES for case in module.cases()]
    names = Counter(case.name for case in cases)
    if twice := [name for name, n in names.items() if n > 1]:
        sys.exit(f"two cases of one name: {', '.join(twice)}")
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "cases.json"
    for old in json.loads(listed.read_text()) if listed.exists() else ():
        (folder / Path(old["file"]).name).unlink(missing_ok=True)
    for case in cases:
        (folder / f"{case.name}.gguf").write_bytes(case.data)
    rows = [{"file": f"{c.name}.gguf", "reason": c.reason, "names": list(c.names), "why": c.why} for c in cases]
    listed.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(f"{folder}: {len(cases)} files, {sum(len(case.data) for case in cases)} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
