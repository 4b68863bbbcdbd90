"""The trained captioner as a folder of static files: a page that captions images in the reader's browser.

Any web host can serve the folder, and nobody's images leave their machine. The models are those of the ONNX bundle, run
by ONNX Runtime Web. The page is the page of attention with images that come from the reader.

index.html, *.css, captioner.js      the page; page.css, light.js and page.js are the page of attention's
worker.js, with files.js, pixels.js, decoding.js and gpu.js      what it leaves to a Web Worker
captioner.json                       sizes, settings of decoding, and each large file's address, size and digest
"""

import base64
import dataclasses
import hashlib
import pathlib
import shutil
import string

import model
from captioning.attention.page import PAGE_FILES
from captioning.decoder.edited_model import following_model
from captioning.export.bundle import bundle_functions, check_size, describe
from captioning.export.onnx_models import write_onnx
from captioning.export.saved_model import new_folder
from captioning.features.cnn import CNNS
from support.errors import UserError
from support.files import read_json, write_json

RUNTIME_VERSION = "1.30.0"  # of the npm package onnxruntime-web
_GET_RUNTIME = (
    f"run npm install onnxruntime-web@{RUNTIME_VERSION}, and give --web_runtime node_modules/onnxruntime-web/dist"
)


@dataclasses.dataclass(frozen=True)
class _File:
    """A large file that the page fetches: its address, as seen from the page, its size, and its SHA-256 in base64."""

    url: str
    bytes: int
    sha256: str


_RUNTIME = {  # of that version
    "script": _File("ort.wasm.bundle.min.mjs", 73_054, "EeZL2P/hG9GiovDWJ1/fu7pyYvC3a5m1PSKKiiLvPZA="),
    "wasm": _File("ort-wasm-simd-threaded.wasm", 14_239_897, "M5jBDQfSKb2Rs2RUjhMODlGo5XBLiMfAg+u+t4hC3uI="),
}
_GPU_RUNTIME = {  # the same with WebGPU, which the page fetches only where the browser has a GPU for it
    "gpu_script": _File("ort.webgpu.bundle.min.mjs", 117_732, "BzCBZzHOLN+wbyc9oGXUoccJHrnRdWqDspFsionQFeI="),
    "gpu_wasm": _File(
        "ort-wasm-simd-threaded.asyncify.wasm", 26_781_914, "OfnwiU1HiABIftn32+kmGEmNsyDPVcjj2Jrf+NzmWNo="
    ),
}
_CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{RUNTIME_VERSION}/dist/"  # serves npm's files as they are
_MODELS = ("encoder", "decoder", "evidence")
_WEB_FILES = pathlib.Path(__file__).parent / "web_files"
_SHARED_FILES = ("page.css", "light.js", "page.js")  # of the page of attention


def export_page(captioner, network, weights, config, folder, runtime=None):
    """Write the page and what it needs to a folder, which is whole afterwards or not there.

    Args:
      captioner: Captioner
      network: function of uint8 (B, side, side, 3) -> float32 (B, P, F), as feature_network returns.
      weights: "float32" or "float16".
      config: Config; its max_words, beam_width, length_penalty and repeat_block are the page's.
      folder: where to; may be there if it is empty.
      runtime: path of onnxruntime-web's folder dist, whose files are copied, or None: the page takes them from a CDN.

    Raises:
      UserError: the folder holds something or cannot be written, the runtime is not of RUNTIME_VERSION, a model would
        be too large, or tf2onnx is not installed.
    """
    check_size(captioner)
    check_runtime(runtime)
    with new_folder(folder) as temporary, following_model("the web page", "or take --format savedmodel"):
        write_onnx(bundle_functions(captioner, network, CNNS[config.cnn]), weights, temporary)
        write_json(temporary / "vocabulary.json", captioner.vocabulary)
        files = {name: _describe_file(temporary / f"{name}.onnx") for name in _MODELS}
        files["vocabulary"] = _describe_file(temporary / "vocabulary.json")
        files |= _place_files(_RUNTIME, runtime, temporary)
        gpu_files = _place_files(_GPU_RUNTIME, runtime, temporary)
        about = _describe_page(captioner, weights, config, runtime)
        for name, group in (("files", files), ("gpu_files", gpu_files)):
            about[name] = {name: dataclasses.asdict(file) for name, file in group.items()}
        write_json(temporary / "captioner.json", about, indent=1)
        _write_page(temporary, from_cdn=runtime is None)


def keep_page(captioner, make_network, weights, config, folder, runtime=None):
    """Export the page, unless the folder has that of this checkpoint, these settings and this code.

    Args:
      make_network: function without arguments that returns the network.
      captioner, weights, config, folder, runtime: as `export_page` takes them.

    Raises:
      UserError: as `export_page`; also if the folder holds what is no such page.
    """
    path = pathlib.Path(folder, "captioner.json")
    kept = read_json(path, dict) if path.exists() else {}
    wanted = _describe_page(captioner, weights, config, runtime)
    if kept | wanted == kept:
        return
    if kept.get("format") == "web":
        shutil.rmtree(folder)
    export_page(captioner, make_network(), weights, config, folder, runtime)


def _describe_page(captioner, weights, config, runtime):
    """What captioner.json holds, but for the large files."""
    own_files = [*sorted(PAGE_FILES.iterdir()), *sorted(_WEB_FILES.iterdir())]
    own_files.append(pathlib.Path(model.__file__))  # what a user edits changes the models
    code = _content_policy(not runtime).encode() + b"".join(path.read_bytes() for path in own_files)
    about = describe(captioner, "web", weights, config)
    return about | {"runtime": RUNTIME_VERSION, "page": hashlib.sha256(code).hexdigest()}


def check_runtime(folder):
    """UserError where `folder` does not hold onnxruntime-web's files of RUNTIME_VERSION. None holds nothing."""
    for file in (_RUNTIME | _GPU_RUNTIME).values() if folder else ():
        path = pathlib.Path(folder, file.url)
        try:
            fits = _describe_file(path) == file
        except OSError:
            raise UserError(f"{path} is missing: {_GET_RUNTIME}") from None
        if not fits:
            raise UserError(f"{path} is not that of onnxruntime-web {RUNTIME_VERSION}: {_GET_RUNTIME}")


def _place_files(files, source, folder):
    """Copy the runtime's files to `folder`, if there is a source. Takes and returns dict of name to _File."""
    for file in files.values() if source else ():
        shutil.copyfile(pathlib.Path(source, file.url), folder / file.url)
    place = "" if source else _CDN
    return {name: dataclasses.replace(file, url=place + file.url) for name, file in files.items()}


def _describe_file(path):
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return _File(path.name, path.stat().st_size, base64.b64encode(digest).decode())


def _write_page(folder, from_cdn):
    """Write all but the models: the page, its scripts and styles, and README.md."""
    for name in _SHARED_FILES:
        shutil.copyfile(PAGE_FILES / name, folder / name)
    for path in _WEB_FILES.iterdir():
        if path.suffix in (".js", ".css"):
            shutil.copyfile(path, folder / path.name)
    parts = {name: (PAGE_FILES / f"{name}.html").read_text(encoding="utf-8") for name in ("guide", "controls")}
    source = f"is fetched from {_CDN}\n(an export with `--web_runtime` puts it here)" if from_cdn else "lies here too"
    words = {"policy": _content_policy(from_cdn), "version": RUNTIME_VERSION, "source": source, **parts}
    for name in ("index.html", "README.md"):
        template = string.Template((_WEB_FILES / name).read_text(encoding="utf-8"))
        (folder / name).write_text(template.substitute(words), encoding="utf-8")


def _content_policy(from_cdn):
    """The Content Security Policy: nothing is fetched but this folder's files and the runtime, and nothing is sent.

    The worker and the runtime are loaded as blobs. So the policy holds in the worker too, and the runtime is checked
    before it runs.
    """
    cdn = f" {_CDN}" if from_cdn else ""
    return (
        f"default-src 'none'; script-src 'self' blob: 'wasm-unsafe-eval'; worker-src blob:; connect-src 'self'{cdn}; "
        "style-src 'self'; img-src blob: data:; base-uri 'none'; form-action 'none'"
    )
