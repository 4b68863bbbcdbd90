"""The process of a script: its exit status, Ctrl-C, SIGTERM, standard error and memory."""

import builtins
import contextlib
import ctypes
import gc
import os
import pathlib
import signal
import sys
import threading
import zlib

from support.errors import UserError
from support.files import unusable_file

_INTERRUPTED = "interrupted: what was finished is kept; run the same command again to go on"
_ROOT = pathlib.Path(__file__).parent.parent
_loaded = {}  # in a notebook: the CRC-32 of each of the project's files that scripts have run with


def run_script(main):
    """Call `main(argv)` as a script, also as one that a notebook runs by `%run`, whose process goes on.

    A UserError is printed as one line and ends the script with exit status 2, and so does a file or a drive that
    cannot be used. SIGTERM has the effect of Ctrl-C.

    Args:
      main: function of a list of str, the command line without the script's name.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's output shows every letter; a terminal must not end the script
        sys.stdout.reconfigure(errors="backslashreplace")
    before = set_handler(signal.SIGTERM, signal.default_int_handler)
    try:
        if in_notebook():
            _check_loaded_modules()
        main(sys.argv[1:])
    except UserError as error:
        _exit_with(f"error: {error}", 2)
    except OSError as error:
        if (problem := unusable_file(error)) is None:
            raise
        _exit_with(f"error: {problem}", 2)
    except KeyboardInterrupt:
        if not in_notebook():
            raise  # `end_process` follows
        _exit_with(_INTERRUPTED, 130)
    finally:
        set_handler(signal.SIGTERM, before)


def _exit_with(line, status):
    print(line, file=sys.stderr)
    sys.exit(status)


def in_notebook():
    """Whether IPython runs this process, as notebooks do: it outlives the script."""
    return hasattr(builtins, "__IPYTHON__")


def _check_loaded_modules():
    """Raise UserError where a file of the project has changed since an earlier script of this notebook loaded it.

    A process loads a module once. The next `%run` of a script would go on with the old one without a word.
    """
    for name, module in sorted(sys.modules.items()):
        path = pathlib.Path(getattr(module, "__file__", None) or "")
        # `%run` loads the script itself anew, as __main__. Packages may be installed in the project's folder.
        if name != "__main__" and path.is_relative_to(_ROOT) and "site-packages" not in path.parts and path.is_file():
            checksum = zlib.crc32(path.read_bytes())
            if _loaded.setdefault(path, checksum) != checksum:
                changed = path.relative_to(_ROOT)
                raise UserError(f"{changed} has changed since this notebook loaded it: restart the kernel")


def set_handler(number, handler):
    """signal.signal; does nothing in a thread that is not the main one, where Python allows no handlers."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(number, handler)
    return None


def end_process(kind, error, trace):
    """End the process after Ctrl-C with one line and exit status 130; to be used as `sys.excepthook`.

    Every other error is printed as Python does. The function waits for no thread and takes no lock, as the interrupted
    code may hold one. No file is damaged by that, because files are written aside and then renamed.

    Args:
      kind, error, trace: class, instance and traceback of the error, as Python passes them.
    """
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print(_INTERRUPTED, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)


@contextlib.contextmanager
def interrupts_held_back():
    """Delay Ctrl-C and SIGTERM inside the block until the program asks for them.

    The block is given a function, `stop_if_asked`. It raises KeyboardInterrupt once a signal has come. A second signal
    ends the process at once, or in a notebook the script.
    """
    received = []

    def remember(number, frame):
        received.append(number)
        signal.signal(number, handlers[number] if in_notebook() else signal.SIG_DFL)
        # Not print: the signal may have come in the middle of a print.
        os.write(2, b"\nstopping after this batch; once more to stop without saving\n")

    def stop_if_asked():
        if received:
            raise KeyboardInterrupt

    handlers = {number: set_handler(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_if_asked
    finally:
        for number, handler in handlers.items():
            set_handler(number, handler)


@contextlib.contextmanager
def silenced_stderr():
    """Discard what C++ code writes to standard error inside the block.

    Notices of libraries such as TensorFlow would hide the lines that the script itself prints.
    """
    sys.stderr.flush()
    original = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(original, 2)
        os.close(original)


@contextlib.contextmanager
def modules_left_out(*names):
    """Inside the block an import of these modules fails, unless they are there already, as if they were not installed.

    For libraries that import others for what nobody here uses, and can do without.
    """
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # None: Python then raises ModuleNotFoundError
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def release_memory():
    """Delete what nothing needs any more, and give its memory back to the system.

    Graphs and what made them refer to each other in circles, which Python finds late; and malloc keeps what is freed,
    for this process alone.
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # not the GNU library
            ctypes.CDLL(None).malloc_trim(0)
