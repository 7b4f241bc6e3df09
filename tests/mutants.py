"""Plants faults, one at a time, in copies of the repository: each must make its named test fail.

    python tests/mutants.py [NAME...] [--list] [--workers N]

The lists are tests/mutants_*.py. A fault is KILLED if its test fails with it, SURVIVED if the test
passes all the same, ERROR if it cannot be planted, or if its test does not pass without it. The
exit code is 0 only if every fault is killed.
"""

import argparse
import ast
import collections
import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".*_cache")
TIMEOUT = 300  # seconds of one test, which may hang with the fault
# exit codes of pytest
PASSED = 0
FAILED = 1
INTERNAL_ERROR = 3


class Mutant(NamedTuple):
    """A fault: in `file`, the text `before`, which occurs once there, becomes `after`."""

    name: str
    file: str
    before: str
    after: str
    test: str  # pytest's name of the test that must fail: file::test or file::test[parameter]


class Outcome(NamedTuple):
    """What became of one fault."""

    name: str
    verdict: str  # killed, SURVIVED or ERROR
    words: str  # why, unless it is killed
    seconds: float


def all_mutants():
    """The faults of every list, in the order of the lists' names."""
    modules = sorted(path.stem for path in Path(__file__).parent.glob("mutants_*.py"))
    return [mutant for name in modules for mutant in importlib.import_module(name).MUTANTS]


@functools.lru_cache
def statements(source):
    """First and last line, decorators included, of every statement at the top of a file."""
    spans = []
    for node in ast.parse(source).body:
        decorators = getattr(node, "decorator_list", [])
        spans.append((min([node, *decorators], key=lambda n: n.lineno).lineno, node.end_lineno))
    return spans


def planted(source, mutant):
    """Text of the file with the fault. Raises ValueError if the fault does not apply.

    Only the statements that it is in are compiled: a whole file takes a second.
    """
    count = source.count(mutant.before)
    if count != 1:
        raise ValueError(f"{mutant.name}: its text occurs {count} times in {mutant.file}, not once")
    if mutant.before == mutant.after:
        raise ValueError(f"{mutant.name}: changes nothing in {mutant.file}")
    begin = source.index(mutant.before)
    first = source.count("\n", 0, begin) + 1
    last = first + mutant.before.count("\n")
    around = [span for span in statements(source) if span[0] <= last and span[1] >= first]
    first = min([first, *(span[0] for span in around)])
    last = max([last, *(span[1] for span in around)])
    part = "".join(source.splitlines(keepends=True)[first - 1 : last])
    try:
        ast.parse(part.replace(mutant.before, mutant.after))
    except SyntaxError as error:
        raise ValueError(f"{mutant.name}: {mutant.file} with it is no Python: {error}") from None
    return source.replace(mutant.before, mutant.after)


class Copy:
    """A copy of the repository in which tests run, one at a time."""

    def __init__(self, folder):
        self.folder = folder / "tree"
        self.temporary = folder / "tmp"
        self.output = folder / "output.txt"
        self.source = ""  # of the file with a fault, as it was before
        self.process = 0
        self.began = 0.0
        shutil.copytree(ROOT, self.folder, ignore=LEFT_OUT)

    def write(self, file, text):
        """Writes a source file, and removes what Python keeps of it.

        A file of the same size and second would pass for the one that was compiled.
        """
        path = self.folder / file
        path.write_text(text, encoding="utf-8")
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def start(self, test):
        """Starts one test in a process of its own, as `python -m pytest TEST` in this copy would.

        It is forked, because importing torch takes longer than most of the tests.
        """
        self.began = time.monotonic()
        self.process = os.fork()
        if self.process:
            return
        code = INTERNAL_ERROR
        try:
            os.setsid()
            file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(file, number)
            os.chdir(self.folder)
            here = str(Path(__file__).parent)
            sys.path = [str(self.folder), *(path for path in sys.path if path != here)]
            options = ["-q", "-x", "-p", "no:cacheprovider", f"--basetemp={self.temporary}"]
            code = int(importlib.import_module("pytest").main([*options, test]))
            sys.stdout.flush()
        finally:
            os._exit(code)

    def finish(self):
        """Exit code of the test and the last line that it printed; None while it runs.

        A test that was skipped, or takes longer than TIMEOUT, has the code INTERNAL_ERROR.
        """
        ended, status = os.waitpid(self.process, os.WNOHANG)
        if not ended:
            if time.monotonic() - self.began < TIMEOUT:
                return None
            os.killpg(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            return INTERNAL_ERROR, f"takes more than {TIMEOUT} s"
        code = os.waitstatus_to_exitcode(status)
        lines = self.output.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        skipped = code == PASSED and "passed" not in last
        return INTERNAL_ERROR if skipped else code, last


class Clean(NamedTuple):
    """A test without a fault, which must pass."""

    name: str
    test: str

    def begin(self, copy):
        copy.start(self.test)

    def end(self, copy, code, last):
        if code == PASSED:
            return "passed", ""
        return "ERROR", f"does not pass without a fault: {last}"


class Planted(NamedTuple):
    """A test with a fault, which must fail."""

    name: str
    mutant: Mutant

    def begin(self, copy):
        copy.source = (copy.folder / self.mutant.file).read_text(encoding="utf-8")
        copy.write(self.mutant.file, planted(copy.source, self.mutant))
        copy.start(self.mutant.test)

    def end(self, copy, code, last):
        copy.write(self.mutant.file, copy.source)
        if code == FAILED:
            return "killed", ""
        if code == PASSED:
            return "SURVIVED", f"{self.mutant.test} passes"
        return "ERROR", f"{self.mutant.test}: {last}"


def preload():
    """Imports what tests import and faults are not in: every forked test has it already."""
    os.environ["OMP_NUM_THREADS"] = "1"
    # no CUDA in this process: forks could not use it any more
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if not importlib.import_module("torch").cuda.is_available():
        # as in conftest.py, which comes too late here: `varlen` imports triton
        os.environ.setdefault("TRITON_INTERPRET", "1")
    names = "torch torch.nn.attention.varlen numpy pytest brotli sentencepiece hypothesis"
    for name in names.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def run_jobs(jobs, copies):
    """Yields the Outcome of every job, which may be in another order; each copy runs one."""
    waiting = collections.deque(jobs)
    running = {}  # copy: job
    while waiting or running:
        for copy in copies:
            if copy in running:
                if (finished := copy.finish()) is None:
                    continue
                job = running.pop(copy)
                seconds = time.monotonic() - copy.began
                yield Outcome(job.name, *job.end(copy, *finished), seconds)
            if waiting:
                running[copy] = waiting.popleft()
                running[copy].begin(copy)
        time.sleep(0.02)


def show(outcome):
    """Prints the line of one fault."""
    words = f"{outcome.name}  {outcome.words}".strip()
    print(f"{outcome.verdict:8} {outcome.seconds:6.1f} s  {words}", flush=True)


def run_all(mutants, copies):
    """Tries every test without a fault, then every fault -> outcomes of the faults."""
    outcomes = []
    for mutant in mutants:
        try:
            planted((ROOT / mutant.file).read_text(encoding="utf-8"), mutant)
        except ValueError as error:
            outcomes.append(Outcome(mutant.name, "ERROR", str(error), 0.0))
    wrong = {outcome.name for outcome in outcomes}
    tests = sorted({mutant.test for mutant in mutants if mutant.name not in wrong})
    print(f"{len(mutants)} faults; {len(tests)} tests without a fault first", flush=True)
    failing = {}
    for outcome in run_jobs([Clean(test, test) for test in tests], copies):
        if outcome.words:
            failing[outcome.name] = f"{outcome.name} {outcome.words}"
    jobs = []
    for mutant in mutants:
        if mutant.test in failing:
            outcomes.append(Outcome(mutant.name, "ERROR", failing[mutant.test], 0.0))
        elif mutant.name not in wrong:
            jobs.append(Planted(mutant.name, mutant))
    for outcome in outcomes:
        show(outcome)
    for outcome in run_jobs(jobs, copies):
        outcomes.append(outcome)
        show(outcome)
    return outcomes


def summary(mutants, results):
    """Table: one line a list of faults by file, with the number of each verdict; then the rest."""
    files = {mutant.name: mutant.file for mutant in mutants}
    counts = collections.Counter((files[result.name], result.verdict) for result in results)
    verdicts = "killed", "SURVIVED", "ERROR"
    lines = [f"{'file':28}" + "".join(f"{verdict:>10}" for verdict in verdicts)]
    for file in sorted({*files.values()}):
        numbers = [counts[file, verdict] for verdict in verdicts]
        lines.append(f"{file:28}" + "".join(f"{number:10}" for number in numbers))
    not_killed = [result.name for result in results if result.verdict != "killed"]
    lines.append(f"{len(results) - len(not_killed)} of {len(results)} faults killed")
    if not_killed:
        lines.append(f"not killed: {' '.join(not_killed)}")
    return "\n".join(lines)


def chosen(mutants, names):
    """The faults with these names, all without names. Raises SystemExit for an unknown name."""
    known = {mutant.name for mutant in mutants}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no fault is called {', '.join(unknown)}: --list names them")
    return [mutant for mutant in mutants if not names or mutant.name in names]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults; all, if none is named")
    parser.add_argument("--list", action="store_true", help="print the faults and their tests")
    parser.add_argument("--workers", type=int, default=2, help="tests at a time")
    arguments = parser.parse_args()
    mutants = chosen(all_mutants(), arguments.names)
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.name}  {mutant.file}  {mutant.test}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        preload()
        copies = [Copy(Path(folder, str(number))) for number in range(arguments.workers)]
        results = run_all(mutants, copies)
    print(summary(mutants, results))
    return int(any(result.verdict != "killed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
