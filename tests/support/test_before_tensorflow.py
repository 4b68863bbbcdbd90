import importlib
import os
import sys

import pytest

from support import before_tensorflow


@pytest.mark.parametrize(("given", "taken"), [(None, "1"), ("0", "0")])
def test_onednn_is_on_unless_the_user_says_otherwise(monkeypatch, given, taken):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", given or "")
    if given is None:
        monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS")
    importlib.reload(before_tensorflow)
    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == taken
