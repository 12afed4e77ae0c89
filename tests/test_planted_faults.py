"""The list of planted faults fits the project; a fault that a test sees is found, and what is none is missed."""

from __future__ import annotations

import pytest

from instruments import planted_faults
from instruments.devices import ROOT
from instruments.planted_faults import FAULTS, Fault

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_has_one_place(fault):
    assert planted_faults.place(ROOT, fault).is_file() and fault.new != fault.old


def test_a_place_that_is_gone_is_loud():
    with pytest.raises(LookupError, match=r"gone: 0 files of instruments/\*.py have 'no such text at all"):
        planted_faults.place(ROOT, Fault("gone", "fast", "instruments/*.py", "no such text " + "at all", "", ""))


def test_what_a_test_sees_is_found_and_the_rest_is_missed(monkeypatch, capsys):
    path, tests = "instruments/memory.py", "tests/test_architecture.py -k no_circle"
    circle = Fault("a circle", "fast", path, "import ctypes\n", "import ctypes\nfrom tests import cases\n", tests)
    another_word = Fault("another word", "fast", path, "Finds an access", "Sees an access", tests)
    monkeypatch.setattr(planted_faults, "FAULTS", [circle, another_word])
    assert planted_faults.main(["--narrow", "--jobs", "0"]) == 1
    test = "tests/test_architecture.py::test_folders_import_one_another_in_no_circle[instruments]"
    assert capsys.readouterr().out.splitlines() == [
        f"found   fast       a circle: {test}",
        "MISSED  fast       another word: -",
        "1 of 2 found",
    ]
