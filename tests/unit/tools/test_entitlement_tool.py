"""tools/entitlement.py on a server of hashes: nothing is wrong with a right one, and every planted fault is found."""

from __future__ import annotations

import random

import pytest
from entitled.driver import Tally
from entitled.fresh import Reference
from entitlement import PROFILES, Fault, Session
from entitlement_mutants import MUTANTS, ROOT
from fake_server import FAULTS, FakeServer


def run(n_slots: int, fault: str, checks: int, seed: str = "1") -> tuple[Session, Fault | None]:
    variants = [[], ["--sleep-idle-seconds", "1"]]
    rng, reference = random.Random(seed), Reference(FakeServer())
    session = Session(FakeServer(n_slots, fault), reference, n_slots, variants, rng, Tally())
    return session, session.run(checks, len(variants))


@pytest.mark.parametrize("n_slots", [1, 4])
def test_nothing_is_wrong_with_a_server_that_keeps_both_rules(n_slots: int) -> None:
    session, fault = run(n_slots, "", 1000)
    assert fault is None, str(fault)
    tally = session.tally
    assert tally.checks >= 1000 and tally.reused > 0.2 * tally.read and tally.furthest == 0
    assert min(tally.kinds.values()) > 0 and len(tally.kinds) > 28


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_within_two_thousand_checks(fault: str) -> None:
    assert run(4, fault, 2000)[1] is not None


@pytest.mark.parametrize("fault", ["late actions", "slot file forgets setting"])
def test_what_is_found_is_told_in_a_few_steps(fault: str) -> None:
    session, found = run(4, fault, 2000)
    assert found is not None
    session.shrink(found, 10.0)
    assert len(found.history) <= 6, str(found)
    assert session.again(found, found.history) is not None


def test_every_mutant_has_a_name_and_an_edit_of_its_own() -> None:
    assert len({one.name for one in MUTANTS}) == len({(one.file, one.old, one.new) for one in MUTANTS}) == len(MUTANTS)
    for one in MUTANTS:
        assert one.profiles and set(one.profiles) <= set(PROFILES) and one.old != one.new
        if one.file.startswith("patches/"):  # vendor/ is there after the first build
            assert (ROOT / one.file).read_text().count(one.old) == 1, one.name
