"""What must be set before TensorFlow starts: import this module on a script's first line.

No other module changes the process on import. This one does five things. It ends the process with one line where this
Python lacks something, it lowers TensorFlow's log level, it turns oneDNN on, it ends the process with one line after
Ctrl-C, also during the long imports, and it imports TensorFlow without its notices.
"""

from support.prerequisites import check_prerequisites

check_prerequisites()  # before all else, as an older Python cannot even read some of the other modules

import os  # noqa: E402
import sys  # noqa: E402

from support.errors import UserError  # noqa: E402
from support.process import end_process, in_notebook, modules_left_out, silenced_stderr  # noqa: E402

if not in_notebook():  # whose own handling of errors goes on after the script
    sys.excepthook = end_process
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow reads both once, on import
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # by itself it leaves oneDNN off on CPUs with AVX2 alone
# Keras imports both for parts of it that no script uses, which takes a third of the time.
try:
    with silenced_stderr(), modules_left_out("sklearn", "matplotlib"):
        import tensorflow  # noqa: F401
except ImportError as error:  # it is installed, and not whole, or a library of the system is missing
    remedy = "run pip install --force-reinstall -r requirements.txt"
    if os.name == "nt":
        remedy = f"install Microsoft's Visual C++ redistributable, and if that does not help {remedy}"
    problem = UserError(f"TensorFlow cannot be loaded ({error.__context__ or error}): {remedy}")
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)
