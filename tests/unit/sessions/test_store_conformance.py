"""Every kind of store is held to one suite, here in short: `tools/store_conformance.py` runs it long."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from store_checks import SHORT
from store_conformance import checks_of, run_check
from store_places import KINDS, NoRoom
from store_servers import Server


@pytest.mark.parametrize(("kind", "check"), [(kind, check) for kind in KINDS for check in checks_of(kind)])
def test_store(kind: str, check: str, servers: Callable[[str], Server]) -> None:
    if kind in ("valkey", "postgres"):
        servers(kind)  # skipped by name where there is none
    try:
        run_check(check, kind, SHORT, servers)
    except NoRoom as e:
        pytest.skip(str(e))
