"""How the tools end: output that nobody takes, a closed or full standard output, Ctrl-C at any
moment.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_maker import make_run

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
DRIVER = """
import sys
sys.path.insert(0, {root!r})
from tools import command_line
command_line.begin("tool.py")

def main():
    {body}

command_line.run(main, "tool.py")
"""


def drive(body, **options):
    """A tool whose main() is `body` -> what subprocess.run gives."""
    code = DRIVER.format(root=str(ROOT), body=body)
    return subprocess.run(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=120, **options
    )


def without_reader(command):
    """Runs a command whose output goes to a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=120)
    finally:
        os.close(writer)


@pytest.fixture(scope="module")
def summarize(tmp_path_factory):
    """A command that prints a table."""
    return [
        sys.executable,
        TOOLS / "summarize.py",
        make_run(tmp_path_factory.mktemp("runs") / "run"),
    ]


def test_a_pipe_that_is_closed_is_no_error(summarize):
    done = without_reader(summarize)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
    # argparse may have passed over the error
    assert without_reader([*summarize[:2], "--help"]).stderr == b""


@pytest.mark.parametrize("buffering", ["", "x"])
@pytest.mark.parametrize("amount", [10, 1_000_000])
def test_a_closed_pipe_is_no_error_however_much_is_printed(amount, buffering, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", buffering)
    code = DRIVER.format(root=str(ROOT), body=f"print('x' * {amount})")
    done = without_reader([sys.executable, "-c", code])
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("buffering", [{}, {"PYTHONUNBUFFERED": "1"}])
@pytest.mark.parametrize("amount", [10, 1_000_000])
def test_output_that_cannot_be_written_is_told_in_one_line(amount, buffering):
    environ = {
        key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"
    } | buffering
    with open("/dev/full", "wb") as full:
        done = drive(f"print('x' * {amount})", stdout=full, env=environ)
    assert done.returncode == 1
    assert done.stderr.startswith(b"tool.py: ") and done.stderr.endswith(
        b"No space left on device\n"
    )
    assert done.stderr.count(b"\n") == 1


def test_a_table_on_a_full_disk_is_told(summarize):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(summarize, stdout=full, stderr=subprocess.PIPE, timeout=120)
        assert done.stderr.startswith(b"summarize.py: ") and done.stderr.endswith(
            b"No space left on device\n"
        )
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1
        assert subprocess.run(summarize, stdout=full, stderr=full, timeout=120).returncode == 1


def test_a_closed_output_is_no_error(summarize):
    command = " ".join(map(str, summarize))
    done = subprocess.run(["sh", "-c", f"{command} >&-"], stderr=subprocess.PIPE, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


def test_exit_codes_and_messages_of_main_stay():
    done = drive("sys.exit('tool.py: wrong')")
    assert (done.returncode, done.stderr) == (1, b"tool.py: wrong\n")
    assert drive("sys.exit(2)").returncode == 2
    assert drive("return 3").returncode == 3
    done = drive("open('/no/such/file')")
    assert (done.returncode, done.stderr) == (
        1,
        b"tool.py: [Errno 2] No such file or directory: '/no/such/file'\n",
    )
    assert b"Traceback" in drive("1 / 0").stderr


def test_an_interrupt_is_one_line():
    done = drive("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)")
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, b"tool.py: interrupted\n")


@pytest.mark.parametrize(
    "tool, module",
    [
        ("summarize.py", "scipy"),
        ("plot_run.py", "matplotlib"),
        ("make_record.py", "matplotlib"),
        ("publish.py", "huggingface_hub"),
    ],
)
def test_an_interrupt_while_modules_are_imported_is_one_line(tool, module, tmp_path):
    body = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / f"{module}.py").write_text(body)
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, TOOLS / tool, "x"], env=environ, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, f"{tool}: interrupted\n".encode())


def test_pictures_do_not_depend_on_the_backend_of_a_notebook(tmp_path):
    run = make_run(tmp_path / "run")
    environ = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(
        [sys.executable, TOOLS / "plot_run.py", run],
        env=environ,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in run.glob("*.png")) == ["stages.png", "training.png"]
