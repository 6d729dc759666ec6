"""As a container runs it: a root that cannot be written, one volume, a user that nobody knows, a health check."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from launched import LLAMAMEM, can_unshare

SCRIPT = """
mount -t tmpfs none "$VOLUME" && mount -o remount,bind,ro / || exit 77
chown 12345:0 "$VOLUME"
cd /
touch "$ROOT_FILE" 2> /dev/null && exit 77
export XDG_STATE_HOME="$VOLUME"
run() { setpriv $OTHER env -u HOME -u TMPDIR -u XDG_CACHE_HOME -u XDG_CONFIG_HOME "$@"; }
run "$@" health --probe > "$VOLUME/early"; echo "early $?"
run "$@" serve --demo --port 0 --json -- --threads 1 > "$VOLUME/ready" 2> "$VOLUME/err" &
launcher=$!
for i in $(seq 600); do [ -s "$VOLUME/ready" ] && break; kill -0 $launcher || break; sleep 0.1; done
[ -s "$VOLUME/ready" ] || cat "$VOLUME/err" >&2
run "$@" health --probe --json; echo "probe $?"
kill -TERM $(run "$@" ps --json | sed 's/.*"launcher_pid": *\\([0-9]*\\).*/\\1/'); wait $launcher; echo "serve $?"
"""
OTHER = "--reuid 12345 --clear-groups --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search"


def test_a_read_only_root_one_volume_and_a_random_user(tmp_path: Path) -> None:
    if os.getuid() != 0 or not can_unshare("--mount"):
        pytest.skip("this machine does not let us make a root that is read-only")
    volume = tmp_path / "volume"
    volume.mkdir()
    env = {**os.environ, "VOLUME": str(volume), "OTHER": OTHER, "ROOT_FILE": str(tmp_path / "file")}
    command = ["unshare", "--mount", "sh", "-c", SCRIPT, "sh", *LLAMAMEM]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode == 77 or "setpriv" in done.stderr:
        pytest.skip("this machine does not let us make a root that is read-only, or has no setpriv")
    early, said, probed, served = done.stdout.splitlines()
    assert (early, probed, served) == ("early 1", "probe 0", "serve 0"), done.stderr
    report = json.loads(said)
    assert report["ok"] and report["detail"] == "ready, memory serial"
    assert "Traceback" not in done.stderr
