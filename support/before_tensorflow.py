"""What must be set before TensorFlow starts: import this module on a script's first line.

No other module changes the process on import. This one does three things. It lowers TensorFlow's log level, it ends
the process with one line after Ctrl-C, also during the long imports, and it imports TensorFlow without its notices.
"""

import os
import sys

from support.process import end_process, modules_left_out, silenced_stderr

sys.excepthook = end_process
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow reads it once, on import
# Keras imports both for parts of it that no script uses, which takes a third of the time.
with silenced_stderr(), modules_left_out("sklearn", "matplotlib"):
    import tensorflow  # noqa: F401
