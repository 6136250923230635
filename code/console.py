"""What turns a function into a program: a quiet start, errors in one line, and a Ctrl-C that breaks nothing."""

import contextlib
import logging
import os
import signal
import sys


def start():
    """Make the running process a program; to be called first, before TensorFlow is imported.

    An error that its user can mend (ValueError, OSError) ends it in one line on stderr, with exit status 1; Ctrl-C does
    so with status 130. A notebook, where `%run` runs a file as a program, keeps its own ways with both.
    """
    kept = _Kept()
    if not hasattr(sys, "ps1"):  # nobody types here
        _end_in_one_line(kept)
        sys.stdout.reconfigure(line_buffering=True)  # what is printed is out, whenever the process ends
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _quiet_stderr():
        import matplotlib.figure  # noqa: F401
        import tensorflow  # noqa: F401
    kept.text = ""


class _Kept(logging.Handler):
    """What Ctrl-C says of the work so far: the latest message of assignment.py's log."""

    text = "nothing was begun"

    def emit(self, record):
        self.text = record.getMessage()


def _end_in_one_line(kept):
    """Let errors and Ctrl-C end the process in one line; where SIGINT is ignored, in the background, it stays so."""
    screen = os.dup(2)  # even while the imports are kept from it
    log = logging.getLogger("assignment")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(kept)

    def leave(*_):
        """End where the process stands: KeyboardInterrupt, raised inside TensorFlow, can damage its memory."""
        with contextlib.suppress(RuntimeError, OSError):  # stdout may be closed, or be printing this very moment
            sys.stdout.flush()
        os.write(screen, f"\ninterrupted{': ' * bool(kept.text)}{kept.text}\n".encode())
        os._exit(130)

    def report(kind, error, traceback):
        if issubclass(kind, KeyboardInterrupt):
            leave()
        elif issubclass(kind, (ValueError, OSError)):
            print(" ".join(f"error: {error}".split()), file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = report
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


@contextlib.contextmanager
def _quiet_stderr():
    """Keep start-up notes off the screen; TensorFlow writes some of them before it reads its own log level."""
    sys.stderr.flush()
    screen = os.dup(2)
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)
