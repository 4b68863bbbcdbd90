"""Whether this Python can run the scripts: its version, and the packages of requirements.txt.

`python support/prerequisites.py` asks for the version alone, before anything is installed. Older Pythons must be able
to read this file and the scripts, down to 3.8.
"""

import importlib.util
import os
import platform
import sys

_OLDEST, _NEWEST = (3, 11), (3, 13)  # as TensorFlow 2.21 has wheels for, from 3.11 on
_PACKAGES = {  # the module by which each package of requirements.txt is imported -> the package
    "tensorflow": "tensorflow",
    "keras": "keras",
    "numpy": "numpy",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "pillow_heif": "pillow-heif",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
    "requests": "requests",
    "pycocoevalcap": "pycocoevalcap",
}


def check_prerequisites(packages=True):
    """End the process with one line and exit status 2 where this Python cannot run the scripts.

    Args:
      packages: bool, whether the packages must be installed already.
    """
    missing = [package for module, package in _PACKAGES.items() if not _is_installed(module)] if packages else []
    # A Python that is newer than known is right where TensorFlow is installed for it all the same.
    problem = _version_problem(newer_is_wrong=not packages or "tensorflow" in missing)
    if problem is None and missing:
        names = ", ".join(missing) + (" is" if len(missing) == 1 else " are")
        environment = r".venv\Scripts\python" if os.name == "nt" else ".venv/bin/python"
        python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
        problem = (
            f"{names} not installed for {sys.executable}: run {python} -m pip install "
            f"-r requirements.txt, or start the script with an environment's own Python, such as {environment}"
        )
    if problem:
        print("error: " + problem, file=sys.stderr)
        sys.exit(2)


def _is_installed(module):
    return module in sys.modules or importlib.util.find_spec(module) is not None


def _version_problem(newer_is_wrong):
    """What is wrong with this Python, and what mends it; None where nothing is."""
    found = tuple(sys.version_info[:2])
    if newer_is_wrong and sys.platform == "darwin" and platform.machine() == "x86_64":
        return "TensorFlow 2.21 does not exist for Macs with Intel chips: use one with an Apple chip, Linux or Windows"
    if _OLDEST <= found and (found <= _NEWEST or not newer_is_wrong):
        return None
    oldest, newest, this = (".".join(map(str, version)) for version in (_OLDEST, _NEWEST, found))
    command = f"py -{newest}" if os.name == "nt" else f"python{newest}"
    return (
        f"Python {this} is too {'old' if found < _OLDEST else 'new'}, as TensorFlow 2.21 runs on {oldest} to {newest}: "
        f"install one of these and make the environment with it, by {command} -m venv .venv"
    )


if __name__ == "__main__":
    check_prerequisites(packages=False)
