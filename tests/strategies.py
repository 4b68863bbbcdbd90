"""Hypothesis strategies that several test modules share: JSON files whose content may be anything.

Importing this module sets the profile of all tests that draw examples: the same ones in every run.
"""

import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

settings.register_profile(
    "same every time",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("same every time")

TEXT = st.text(st.characters(), max_size=20)  # with halves of surrogate pairs
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
NUMBERS = st.integers(1, 4) | st.sampled_from([3, 4, 0, -1, 10**400])
NAMES = (
    st.sampled_from(["a.jpg", "a.png", "b.jpg", "c", "..", ".", "", "../a.jpg", "/a.jpg", "a/b.jpg", "a\\b.jpg", "C:a"])
    | st.sampled_from([".tmp-1-a.jpg", "a\0.jpg", "a\n.jpg", "\udc80.jpg", "é" * 200, "x" * 300 + ".jpg"])
    | TEXT
)
SENTENCES = st.sampled_from(["a dog", "Dogs' tails", "ein Hündchen", "!?", "", "word " * 500, "\0", "\ud800"]) | TEXT


def rarely(draw):
    return draw(st.integers(0, 9)) == 9


@st.composite
def records(draw, **fields):
    """Dicts in which a field is sometimes missing and sometimes anything. Sometimes not a dict at all."""
    if rarely(draw):
        return draw(JSON)
    return {name: draw(JSON if rarely(draw) else values) for name, values in fields.items() if not rarely(draw)}


def after(good, drawn):
    """Lists that begin with usable values, so that some files load, and go on with anything."""
    return st.lists(drawn, max_size=6).map(lambda rest: good + rest)


@st.composite
def files_of(draw, shaped):
    """The bytes of JSON files of one shape, sometimes of any other shape, and sometimes of no JSON."""
    if rarely(draw):
        return draw(st.binary())
    shapeless = st.fixed_dictionaries({}, optional={"images": JSON, "annotations": JSON}) | JSON
    return json.dumps(draw(shapeless if rarely(draw) else shaped)).encode()


def check_one_line(error):
    assert len(str(error).splitlines()) == 1, str(error)


def places(value):
    """Every (container, key) inside a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])
