"""How a command-line tool ends when it is interrupted or its output is closed.

One line at most, no traceback.

    command_line.begin("summarize.py")        # before imports that take seconds
    ...
    command_line.run(main, "summarize.py")    # calls main() and ends the process

Standard library only.
"""

import os
import sys

INTERRUPTED, BROKEN_PIPE = 130, 141  # as a shell counts them: 128 + SIGINT, 128 + SIGPIPE


def begin(name):
    """From here on Ctrl-C shows one line, also while modules are imported.

    The process then ends by SIGINT.
    """

    def one_line(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            tell(f"{name}: interrupted")
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = one_line


def run(main, name):
    """Calls main() and ends the process with its exit code.

    An OSError that main lets through becomes one line.

    `tool | head -1` ends without a word, as programs that die of SIGPIPE do. Where standard output
    cannot be written otherwise (a full disk), the exit code is 1, so that no script takes half a
    table for the whole one.
    """
    try:
        code = main()
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        tell(f"{name}: interrupted")
        code = INTERRUPTED
    except BrokenPipeError:
        code = BROKEN_PIPE
    except OSError as error:
        code = f"{name}: {error}"
    fault = flush_output()
    if isinstance(fault, BrokenPipeError):
        code = BROKEN_PIPE
    elif fault is not None:
        code = f"{name}: standard output cannot be written: {fault.strerror}"
    if isinstance(code, str):
        tell(code)
        code = 1
    sys.exit(code)


def tell(line):
    """A line on standard error, if there is somebody who reads it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def flush_output():
    """Writes what standard output still holds -> the OSError where that fails.

    Then nothing more goes there.
    """
    try:
        if sys.stdout is not None:  # closed by `>&-`
            sys.stdout.flush()
    except OSError as error:
        silence(sys.stdout)
        return error
    return None


def silence(stream):
    """Points a stream's descriptor at /dev/null.

    What the stream keeps would be tried again, and told, at exit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
