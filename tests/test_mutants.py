"""The faults of `make mutants` still apply, and their tests exist; planting takes 20 minutes."""

import subprocess
import sys

import pytest
from mutants import ROOT, Mutant, all_mutants, planted

MUTANTS = all_mutants()


def test_every_fault_applies_to_its_file():
    for mutant in MUTANTS:
        planted((ROOT / mutant.file).read_text(encoding="utf-8"), mutant)


def test_no_two_faults_have_one_name():
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names)) > 50


def test_every_test_that_is_to_find_a_fault_exists():
    wanted = sorted({mutant.test for mutant in MUTANTS})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *wanted], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "before, after, words",
    [
        ("b", "2", "0 times"),
        ("a", "2", "2 times"),
        ("1", "(", "no Python"),
        ("1", "1", "changes nothing"),
    ],
)
def test_a_fault_that_does_not_apply_is_refused(before, after, words):
    mutant = Mutant("fault", "file.py", before, after, "tests/test_x.py::test_y")
    with pytest.raises(ValueError, match=words):
        planted("a = 1\nshow(a)\n", mutant)
