"""The plan of the house, read off the files: who imports whom, what an import may do, and how long things may be."""

import ast
import fnmatch
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

ROOT_LINES = {  # the longest that each file at the root may be
    "config": 120,
    "model": 300,
    "data_utils": 150,
    "train_image_caption_model": 300,
    "inference_image_caption": 200,
}
SCRIPTS = ("data_utils", "train_image_caption_model", "inference_image_caption")
# The one order of imports: a module imports from earlier lines, and from its own room. Places of one line are apart.
ORDER = (
    ("support", "config"),
    ("captioning.settings", "captioning.words", "captioning.demo"),
    ("captioning.vocabulary",),
    ("captioning.data", "captioning.decoder"),
    ("captioning.features", "model"),
    ("captioning.attention",),
    ("captioning.captioner",),
    ("captioning.evaluation", "captioning.inference", "captioning.export"),
    ("captioning.training",),
    ("data_utils", "train_image_caption_model", "inference_image_caption"),
)
AT_THE_ROOT = {f"{name}.py" for name in ROOT_LINES} | {
    "captioning",
    "support",
    "README.md",
    "LICENSE",
    "requirements.txt",
    "requirements-dev.txt",
    "pyproject.toml",
    "docs",
    "tests",
    "images",
    ".ci",
    ".github",
    ".pre-commit-config.yaml",
    ".gitignore",
    ".git",
}
BEFORE = "support.before_tensorflow"
FUNCTION_LINES, MODULE_LINES, GREEDY_LINES = 60, 450, 25


def house_modules():
    """Dict of module name to path: what is at the root and in the two packages."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("captioning/**/*.py"), *ROOT.glob("support/**/*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


MODULES = house_modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
PACKAGES = ("captioning", "support")


def imports(name):
    """The names of all modules that a module imports, also inside functions, as far as the text tells."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative name"
            both = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {whole if whole in MODULES else node.module for whole in both.values()}
    return found


IMPORTS = {name: imports(name) for name in MODULES}
OURS = {name: found & MODULES.keys() for name, found in IMPORTS.items()}


def reached(name):
    """A module and all of ours that are imported with it."""
    seen, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += OURS[current]
    return seen


def third_party(name):
    """The top-level names of what is not ours that a module and all that it imports of ours import."""
    return {found.partition(".")[0] for each in reached(name) for found in IMPORTS[each] - MODULES.keys()}


# --- Who imports whom ---------------------------------------------------------------------------------------------


def test_the_five_files_and_nothing_else_are_at_the_root():
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    names = {path.name for path in ROOT.iterdir()}
    names = {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    assert names - AT_THE_ROOT == set()
    assert {f"{name}.py" for name in ROOT_LINES} <= names


def test_users_may_rename_the_classes_of_model_py():
    """Its functions are what the rest of the project calls."""
    for name in MODULES:
        froms = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom) and node.module == "model"]
        taken = {alias.name for node in froms for alias in node.names}
        assert all(each == each.lower() for each in taken), f"{name} imports {taken}"


def place(name):
    """(line, room) of a module in ORDER. The package captioning itself holds nothing."""
    found = [
        (line, room)
        for line, rooms in enumerate(ORDER)
        for room in rooms
        if name == room or name.startswith(f"{room}.")
    ]
    assert len(found) == 1, f"{name} has no place in ORDER"
    return found[0]


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"captioning"}))
def test_imports_run_one_way(name):
    line, room = place(name)
    for found in OURS[name] - {"captioning"}:
        their_line, their_room = place(found)
        assert their_line < line or their_room == room, f"{name} imports {found}"


def test_tests_lie_in_folders_of_the_same_names():
    rooms = {path.parent.name for path in (ROOT / "captioning").glob("*/__init__.py")} | {"support", "benchmarks"}
    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"} <= rooms


def test_there_are_no_circles():
    for name in MODULES:
        for found in OURS[name]:
            assert name not in reached(found), f"{name} imports {found}, which leads back to it"


def test_all_that_is_named_is_there():
    """A misspelt module of ours would count as none of ours."""
    for name, found in IMPORTS.items():
        assert {each for each in found if each.partition(".")[0] in PACKAGES} <= MODULES.keys(), name


@pytest.mark.parametrize(
    ("name", "unwanted"),
    [
        ("model", {"PIL", "sklearn", "matplotlib", "tqdm", "requests", "urllib", "http"}),
        ("support.files", {"tensorflow", "keras"}),
        ("support.errors", {"tensorflow", "keras", "numpy"}),
        ("support.command_line", {"tensorflow", "keras", "numpy"}),
    ],
)
def test_an_import_brings_nothing_that_is_not_needed(name, unwanted):
    assert third_party(name) & unwanted == set()
    assert "support.downloads" not in reached("model")


# --- What an import does ------------------------------------------------------------------------------------------


def test_the_three_scripts_alone_set_up_the_process_on_their_first_line():
    for name in MODULES:
        assert (BEFORE in IMPORTS[name]) == (name in SCRIPTS), name
    for name in SCRIPTS:
        docstring, first = TREES[name].body[:2]
        assert isinstance(docstring.value, ast.Constant)
        assert isinstance(first, ast.Import) and [alias.name for alias in first.names] == [BEFORE], name


def run(code):
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unwanted"),
    [
        ("model", ["sklearn", "matplotlib", "tqdm", "requests", "support.downloads", "captioning.data.coco_download"]),
        ("support.files", ["tensorflow", "keras"]),
        ("inference_image_caption", ["sklearn", "scipy.stats", "matplotlib.pyplot", "captioning.data.coco_download"]),
    ],
)
def test_an_import_loads_nothing_that_is_not_needed(name, unwanted):
    """What TensorFlow and Keras load themselves is theirs."""
    theirs = "import keras, tensorflow; " if name == "model" else ""
    code = f"import json, sys; {theirs}theirs = set(sys.modules); import {name}\n"
    assert set(run(code + "print(); print(json.dumps(list(set(sys.modules) - theirs)))")) & set(unwanted) == set()


@pytest.mark.slow
def test_what_keras_does_without_is_there_for_others():
    code = "import support.before_tensorflow, json, sys; before = 'sklearn' in sys.modules; import sklearn, keras\n"
    code += "from matplotlib import pyplot; print(json.dumps([before, keras.__name__, pyplot.__name__]))"
    assert run(code) == [False, "keras", "matplotlib.pyplot"]


@pytest.mark.slow
def test_importing_changes_nothing_in_the_process():
    """What the libraries change as they are first imported is theirs."""
    names = [name for name in MODULES if name not in SCRIPTS and name != BEFORE]
    libraries = set.union(*(IMPORTS[name] for name in names)) - MODULES.keys()
    code = (
        "import contextlib, importlib, json, os, signal, sys\n"
        f"for name in {sorted(libraries)}:\n"
        "    with contextlib.suppress(ModuleNotFoundError):\n"  # such as msvcrt
        "        importlib.import_module(name)\n"
        # A bundle's script finds this module beside itself.
        "sys.modules['image_reader'] = importlib.import_module('captioning.features.image_reader')\n"
        "handlers = lambda: {number: signal.getsignal(number) for number in signal.valid_signals()}\n"
        "files = lambda: [tuple(os.fstat(number)) for number in (0, 1, 2)]\n"
        "streams = lambda: (sys.stdin, sys.stdout, sys.stderr)\n"
        "process = lambda: (sys.excepthook, streams(), dict(os.environ), os.getcwd(), handlers(), files())\n"
        "changed = []\n"
        f"for name in {names}:\n"
        "    before = process()\n"
        "    importlib.import_module(name)\n"
        "    changed += [name] if process() != before else []\n"
        "print(); print(json.dumps(changed))"
    )
    assert run(code) == []


# --- How long things are ------------------------------------------------------------------------------------------


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_no_function_is_too_long():
    """Decorators and inner functions count."""
    for name, tree in TREES.items():
        for node in functions(tree):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.end_lineno - first + 1 <= FUNCTION_LINES, f"{name}.{node.name}"


def test_no_module_is_too_long():
    for name, path in MODULES.items():
        count = len(path.read_text(encoding="utf-8").splitlines())
        assert count <= ROOT_LINES.get(name, MODULE_LINES), name


def test_greedy_decoding_is_short():
    (node,) = (node for node in functions(TREES["model"]) if node.name == "greedy_decode")
    lines = MODULES["model"].read_text(encoding="utf-8").splitlines()
    docstring = node.body[0]
    code = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    assert len([line for line in code if line.strip() and not line.strip().startswith("#")]) <= GREEDY_LINES
