"""What script 3's options --export and --serve ask for: a format, its number type, and a server of the web page."""

import os
import pathlib

from captioning.export import bundle, saved_model, web
from support import local_server
from support.errors import UserError, printable

_PORT = 8000
_ONE_CAPTION = {"savedmodel": "a SavedModel", "web": "the web page"}  # formats without a place for several


def add_options(parser):
    parser.add_argument(
        "--export",
        metavar="DIR",
        type=os.path.expanduser,
        help="write the captioner for use without this code, and no captions",
    )
    parser.add_argument(
        "--format",
        choices=("savedmodel", "litert", "onnx", "web"),
        help="of --export: a TensorFlow SavedModel, a bundle for LiteRT or ONNX Runtime, or a web page that captions "
        "images in the browser (default: savedmodel)",
    )
    parser.add_argument(
        "--weights",
        choices=("float32", "float16", "int8"),
        help=f"of a bundle (default: {', '.join(f'{types[0]} for {kind}' for kind, types in bundle.WEIGHTS.items())})",
    )
    parser.add_argument(
        "--serve",
        nargs="?",
        type=int,
        const=_PORT,
        metavar="PORT",
        help=f"open that web page at this port of 127.0.0.1 (default: {_PORT}), and write no captions",
    )
    parser.add_argument(
        "--web_runtime",
        metavar="DIR",
        type=os.path.expanduser,
        help=f"of the web page: the folder dist of npm's onnxruntime-web@{web.RUNTIME_VERSION}, which the runtime is "
        "copied from; without it, readers' browsers fetch that from a CDN",
    )


def check_options(options):
    """UserError where options of these do not go together."""
    if not options.export and (options.format or options.weights):
        raise UserError("--format and --weights say how to export: give --export DIR too")
    if options.web_runtime and options.serve is None and options.format != "web":
        raise UserError("--web_runtime goes with --serve, and with --export DIR --format web")
    bundle.check_weights(options.format or "savedmodel", options.weights)
    web.check_runtime(options.web_runtime)


def export(load_captioner, make_network, options, config):
    """Write the captioner in the format that the options name, or serve its page.

    Args:
      load_captioner: function without arguments that returns the Captioner.
      make_network: function without arguments that returns the network, as feature_network does.

    Raises:
      UserError: the settings are for several captions of an image or for drawn ones, and the format is for one alone;
        or as the format's module does.
    """
    kind, folder = "web" if options.serve is not None else options.format or "savedmodel", options.export
    if kind in _ONE_CAPTION and (config.captions_per_image > 1 or config.sample == "yes"):
        raise UserError(
            f"{_ONE_CAPTION[kind]} says one caption of each image, and draws none: give --captions 1 --sample no, or "
            "take --format litert or onnx"
        )
    if options.serve is not None:
        _serve_page(load_captioner, make_network, options, config)
        return
    weights = bundle.check_weights(kind, options.weights)
    captioner, network = load_captioner(), make_network()
    if kind == "savedmodel":
        saved_model.export_captioner(captioner, network, config, folder)
        print(f"the SavedModel is in {printable(folder)}")
    elif kind == "web":
        web.export_page(captioner, network, weights, config, folder, options.web_runtime)
        print(f"the page is in {printable(folder)}, for any web host: see README.md there")
    else:
        bundle.export_bundle(captioner, network, kind, weights, config, folder)
        print(f"the bundle is in {printable(folder)}: see README.md there")


def _serve_page(load_captioner, make_network, options, config):
    """Serve the web page of a run on this machine until Ctrl-C. The run folder keeps the page."""
    folder = pathlib.Path(config.run_dir, "web")
    with local_server.make_server(folder, options.serve) as server:  # first, as the port may not be had
        weights = bundle.check_weights("web", None)
        web.keep_page(load_captioner(), make_network, weights, config, folder, options.web_runtime)
        if not options.web_runtime:
            print("the page fetches its runtime from a CDN; with --web_runtime DIR it needs no internet")
        local_server.serve(server)
