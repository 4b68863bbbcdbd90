"""The trained captioner as a bundle: two or three models, a vocabulary and a script that needs no TensorFlow.

encoder     pixels -> what the decoder needs to know of an image
decoder     one word of K captions -> log-probabilities of the next
evidence    a word that was said -> the maps that figures draw

captioner.json, vocabulary.json, README.md, caption.py and image_reader.py lie beside them. For LiteRT, decoder and
evidence are two signatures of one file, which share their weights. Letters of shapes as in model.py; K captions are
decoded at a time.
"""

import pathlib
import shutil
import tempfile

import numpy as np
import tensorflow as tf

from captioning.captioner import sampling_settings
from captioning.data.captioned_images import image_path
from captioning.decoder.edited_model import following_model
from captioning.decoder.rules import ban_words, next_word_log_probs
from captioning.export.onnx_models import write_onnx
from captioning.export.saved_model import new_folder
from captioning.features import image_reader
from captioning.features.cache import load_data
from captioning.features.cnn import CNNS
from captioning.features.image_files import load_image
from captioning.words import CHARACTER
from support.errors import UserError
from support.files import write_json
from support.process import release_memory, silenced_stderr

_RUNTIMES = {"litert": "ai-edge-litert", "onnx": "onnxruntime"}  # the package that runs each format
# Number types of the weights, the first one the default
WEIGHTS = {"litert": ("float16", "float32", "int8"), "onnx": ("float32", "float16"), "web": ("float16", "float32")}
# Settings that the script takes too, besides captions, sample and what drawn captions depend on
_DECODING = ("max_words", "beam_width", "length_penalty", "repeat_block")
_CALIBRATION_IMAGES = 100
_MOST_BYTES = 2_000_000_000  # of a model: both formats end at 2 GiB
_FILES = pathlib.Path(__file__).parent / "bundle_files"  # caption.py and README.md, which are copied


def check_weights(kind, weights):
    """UserError where a format has no weights of this type; otherwise the weights, or the format's default for None."""
    known = WEIGHTS.get(kind, (None,))
    if weights and weights not in known:
        fitting = ", ".join(name for name in WEIGHTS if weights in WEIGHTS[name])
        raise UserError(f"--weights {weights} does not go with --format {kind}, only with {fitting}")
    return weights or known[0]


def export_bundle(captioner, network, kind, weights, config, folder):
    """Write the captioner to a folder, which is whole afterwards or not there.

    Args:
      captioner: Captioner
      network: function of uint8 (B, side, side, 3) -> float32 (B, P, F), as feature_network returns.
      kind: "litert" or "onnx".
      weights: str, their number type, one of WEIGHTS[kind].
      config: Config; its settings of decoding are the script's defaults.
      folder: where to; may be there if it is empty.

    Raises:
      UserError: the folder holds something or cannot be written, a model would be too large for the format, tf2onnx is
        not installed, or there are no training images to calibrate int8 weights on.
    """
    check_size(captioner)
    with new_folder(folder) as temporary, following_model(f"--format {kind}", "or take --format savedmodel"):
        functions = bundle_functions(captioner, network, CNNS[config.cnn])
        if kind == "onnx":
            write_onnx(functions, weights, temporary)
        else:
            images = _calibration_images(config) if weights == "int8" else None
            _write_litert(functions, captioner, weights, images, temporary)
        write_json(temporary / "vocabulary.json", captioner.vocabulary)
        write_json(temporary / "captioner.json", describe(captioner, kind, weights, config), indent=1)
        (temporary / "README.md").write_text(_fill_readme(kind, CNNS[config.cnn]), encoding="utf-8")
        for file in (_FILES / "caption.py", pathlib.Path(image_reader.__file__)):
            shutil.copyfile(file, temporary / file.name)


def check_size(captioner):
    """UserError where a model with float32 weights, which the others are made from, may be too large for a file."""
    size = 4 * sum(int(np.prod(weight.shape)) for weight in captioner.encoder.weights + captioner.decoder.weights)
    if size > _MOST_BYTES:
        raise UserError(
            f"the weights take {size / 1e9:.1f} GB, and a model of LiteRT or ONNX {_MOST_BYTES / 1e9:g} GB at most: "
            "take --format savedmodel, or train with a smaller --vocab_size, --units, --encoder_dim or --embedding_dim"
        )


def _fill_readme(kind, cnn):
    """The text of a bundle's README.md for its format and CNN."""
    text, side = (_FILES / "README.md").read_text(encoding="utf-8"), cnn.grid_size
    sizes = {"IMAGE_SIZE": f"{cnn.image_size} x {cnn.image_size}", "GRID_SIZE": f"{side} x {side}"}
    for name, value in {"RUNTIME": _RUNTIMES[kind], **sizes}.items():
        text = text.replace(name, value)
    return text


def describe(captioner, kind, weights, config):
    """What captioner.json holds."""
    cnn = CNNS[config.cnn]
    locations, channels = cnn.feature_shape
    return {
        "format": kind,
        "weights": weights,
        "sizes": {
            "image": cnn.image_size,
            "locations": locations,
            "channels": channels,
            "encoder_dim": config.encoder_dim,
            "embedding_dim": config.embedding_dim,
            "units": config.units,
            "vocabulary": len(captioner.vocabulary),
        },
        "characters": CHARACTER,  # for a class of a regular expression; no blank is written beside these
        "decoding": {  # the options of a bundle's script with their defaults
            **{name: getattr(config, name) for name in _DECODING},
            **sampling_settings(config),
            "captions": config.captions_per_image,
            "sample": config.sample == "yes",
        },
        "network": captioner.network,
        "checkpoint": captioner.checkpoint,
        "checkpoint_identity": captioner.identity,
    }


# --- The functions ----------------------------------------------------------------------------------------------


def bundle_functions(captioner, network, cnn):
    """The functions of a bundle as dict of name to tf.function. All shapes are fixed but for K."""
    encoder, decoder = captioner.encoder, captioner.decoder
    encoded_features = encoder(tf.zeros((1, *cnn.feature_shape)))  # (1, P, D)
    keys, hidden = decoder.attention.key_layer(encoded_features), decoder.initial_hidden(encoded_features)
    if not tf.is_tensor(hidden) or hidden.shape.rank != 2:
        raise UserError(
            "a bundle and the web page take one tensor (B, n) as the decoder's state, and that of model.py is none: "
            "join its parts there by tf.concat, or take --format savedmodel"
        )
    pixels = tf.TensorSpec((1, cnn.image_size, cnn.image_size, 3), tf.uint8, "pixels")
    word, said = (tf.TensorSpec((1, 1), tf.int32, name) for name in ("words", "said"))
    words = tf.TensorSpec((None, 1), tf.int32, "words")
    one_hidden, many_hidden = (tf.TensorSpec((count, hidden.shape[1]), name="hidden") for count in (1, None))
    image = tf.TensorSpec(encoded_features.shape, name="encoded_features"), tf.TensorSpec(keys.shape, name="keys")
    norms = tf.TensorSpec(encoded_features.shape[:2], name="feature_norms")

    @tf.function(input_signature=[pixels])
    def encode(pixels):
        features = network(pixels)  # (1, P, F)
        encoded_features = encoder(features)  # (1, P, D)
        return {
            "encoded_features": encoded_features,
            "keys": decoder.attention.key_layer(encoded_features),  # (1, P, U)
            "hidden": decoder.initial_hidden(encoded_features),  # (1, U)
            "feature_norms": tf.norm(features, axis=2),  # (1, P)
        }

    @tf.function(input_signature=[words, many_hidden, *image])
    def decode(words, hidden, encoded_features, keys):
        encoded_features, keys = (tf.repeat(x, tf.shape(words)[0], 0) for x in (encoded_features, keys))  # (K, P, ...)
        logits, next_hidden, attention_weights = decoder(words, encoded_features, hidden, keys)
        log_probs = next_word_log_probs(logits, words, repeat_block=0)  # (K, V); the script blocks repeats
        return {"log_probs": log_probs, "next_hidden": next_hidden, "attention_weights": attention_weights[:, :, 0]}

    @tf.function(input_signature=[word, said, one_hidden, *image, norms])
    def explain(words, said, hidden, encoded_features, keys, feature_norms):
        return _word_evidence(decoder, words, said, hidden, encoded_features, keys, feature_norms)

    return {"encoder": encode, "decoder": decode, "evidence": explain}


def _word_evidence(decoder, words, said, hidden, encoded_features, keys, feature_norms):
    """What captioning.attention.evidence.explain_captions computes of one word, by operations that both formats know.

    That evidence needs v_p . g for each location, the derivative of the said word's log-probability where the context
    vector moves towards v_p. If all encoded features move by v_p, their mean, the context vector, does so too. So P
    copies of the image move, each another way. LiteRT lacks operations of the backward pass, but differentiating that
    pass once more, by its own input (which is linear), gives the derivative forwards.

    Args:
      decoder: RNN_Decoder
      words, said: int (1, 1), the word before, and the word that the decoder is made to say.
      hidden: float (1, U)
      encoded_features, keys, feature_norms: float (1, P, D), (1, P, U) and (1, P).

    Returns:
      dict of next_hidden (1, U), attention_weights (1, P) and evidence (1, P)
    """
    sightings = decoder.detector(encoded_features, said[0])[:, :, 0]  # (1, P)
    P, state = encoded_features.shape[1], (words, encoded_features, hidden, keys)
    words, moved, hidden, keys = (tf.repeat(x, P, 0) for x in state)  # (P, 1), (P, P, D), (P, U), (P, P, U)
    ones = tf.ones(P)
    directions = tf.repeat(tf.transpose(encoded_features, (1, 0, 2)), P, 1)  # (P, P, D)
    with tf.GradientTape() as forwards:
        forwards.watch(ones)
        with tf.GradientTape() as backwards:
            backwards.watch(moved)
            logits, next_hidden, weights = decoder(words, moved, hidden, keys)
            log_probs = tf.gather(tf.nn.log_softmax(ban_words(logits)), said[0, 0], axis=1)  # (P,)
        gradients = backwards.gradient(log_probs, moved, ones, unconnected_gradients="zero")  # (P, P, D)
    # 0 where an edit of model.py leaves no word that depends on the image.
    gains = forwards.gradient(gradients, ones, directions, unconnected_gradients="zero")[tf.newaxis]  # (1, P)
    weights = weights[:1, :, 0]  # (1, P)
    logs = tf.math.log(weights + 1e-30) + gains + tf.math.log(sightings * feature_norms + 1e-30)  # (1, P)
    return {"next_hidden": next_hidden[:1], "attention_weights": weights, "evidence": tf.nn.softmax(logs)}


# --- LiteRT -----------------------------------------------------------------------------------------------------


def _write_litert(functions, captioner, weights, images, folder):
    """Write encoder.tflite and decoder.tflite, the second with the signatures `decoder` and `evidence`.

    Args:
      functions: as `bundle_functions` returns them.
      images: as `_calibration_images` returns them, or None where the weights are not int8.
    """
    for file, names in (("encoder", ["encoder"]), ("decoder", ["decoder", "evidence"])):
        with tempfile.TemporaryDirectory() as saved, silenced_stderr():  # not in `folder`, see is_pattern
            module = tf.Module()
            module.weights = [weight.value for weight in captioner.encoder.weights + captioner.decoder.weights]
            tf.saved_model.save(module, saved, signatures={name: functions[name] for name in names})
            converter = tf.lite.TFLiteConverter.from_saved_model(saved, signature_keys=names)
            if weights != "float32":
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
            if weights == "float16":
                converter.target_spec.supported_types = [tf.float16]
            if weights == "int8" and file == "encoder":  # the decoder's activations stay float32
                converter.representative_dataset = lambda: (("encoder", {"pixels": pixels}) for pixels in images)
            if file == "encoder":
                release_memory()  # what saving took, as converting takes most
            model = converter.convert()
        (folder / f"{file}.tflite").write_bytes(model)


def _calibration_images(config):
    """Training images that show how large the encoder's numbers become: list of uint8 (1, side, side, 3).

    UserError where they are not there.
    """
    try:
        train = load_data(config, to_caption=True).train
        count = min(_CALIBRATION_IMAGES, len(train))
        chosen = np.random.default_rng(config.seed).choice(len(train), count, replace=False)
        side = CNNS[config.cnn].image_size
        images = [load_image(image_path(train[i], config), side)[np.newaxis] for i in chosen]
    except (UserError, ValueError) as error:
        raise UserError(
            f"int8 weights are calibrated on training images, and {error}: "
            "name where these are by --data_dir and --coco_dir (or --images), or take --weights float16"
        ) from error
    print(f"int8 weights are calibrated on {count} training images of {config.data_dir}, drawn by seed {config.seed}")
    return images
