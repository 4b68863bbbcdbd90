"""Every setting of the three scripts, with its default for MS-COCO 2014; edit here or pass `--<field> VALUE`."""

from dataclasses import dataclass
from typing import Annotated, Literal

# `Annotated[int, (1, None)]` is an int of 1 or more: (lowest, highest), either may be None.
# The comment behind a setting is its text in `--help`.

_EFFICIENT = Literal["EfficientNetV2B0", "EfficientNetV2B1", "EfficientNetV2B2", "EfficientNetV2B3", "EfficientNetV2S"]
_CONVNEXT = Literal["ConvNeXtTiny", "ConvNeXtSmall", "ConvNeXtBase"]
_OTHERS = Literal["InceptionV3", "MobileNetV3Large", "ResNet50V2", "ResNet101V2", "DenseNet121", "VGG16"]


@dataclass(frozen=True)
class Config:
    # Data: what data_utils.py prepares
    dataset: Literal["coco", "demo", "karpathy", "table"] = "coco"  # MS-COCO, drawn scenes, a split file, your own
    data_dir: str = "data/coco"  # folder that data_utils.py writes to and the later scripts read
    coco_dir: str = "."  # folder with annotations/ and the image folder, as COCO's zip files unpack
    coco_split: str = "train2014"  # COCO files to read: annotations/captions_<coco_split>.json and <coco_split>/
    karpathy_json: str = ""  # dataset karpathy: the file dataset_coco.json, dataset_flickr8k.json or _flickr30k.json
    images: str = ""  # datasets karpathy and table: folder with the images, in COCO's case train2014/ and val2014/
    captions: str = ""  # dataset table: CSV, TSV, JSON Lines or COCO's JSON; empty: the captions lie among the images
    validation_captions: str = ""  # datasets table and coco: captions to validate on, instead of a share of the images
    test_captions: str = ""  # datasets table and coco: captions that are only scored, by --evaluate --split test
    image_column: str = ""  # dataset table: the column of the file names, where it has no usual name
    caption_column: str = ""  # dataset table: the column of the captions, where it has no usual name
    image_source: Literal["each", "zip"] = "each"  # missing images: fetch each one needed, or the 13.5 GB zip file
    delete_zip: Literal["yes", "no"] = "no"  # image_source zip: delete the zip file once its images are unpacked
    download_workers: Annotated[int, (1, 64)] = 8  # images fetched at a time
    contact: str = ""  # your e-mail or web address, for servers (as Wikimedia's) that refuse whoever gives none
    demo_images: Annotated[int, (10, 1_000_000)] = 1_050  # scenes drawn for the demo
    num_examples: Annotated[int, (2, None)] | None = 30_000  # captions drawn from the data set, None for all
    val_fraction: Annotated[float, (0.0, 0.9)] = 0.2  # share of the images kept for validation, if no file names them
    vocab_size: Annotated[int, (5, 1_000_000)] = 5_000  # V: the most frequent words, with <pad> <unk> <start> <end>
    max_words: Annotated[int, (1, 200)] = 40  # longer captions are left out of training, and decoding stops there
    seed: Annotated[int, (0, 2**31 - 1)] = 42  # fixes the draw, the split, the initial weights and every shuffle

    # Features: a CNN over each image, once
    cnn: Literal[_OTHERS, _EFFICIENT, _CONVNEXT] = "InceptionV3"  # network of keras.applications; VGG16 is the paper's
    inception_weights: str = "imagenet"  # imagenet, random, or the path of a .weights.h5 file without the top
    features_dir: str = ""  # feature cache, one .npy per image; empty for <data_dir>/features
    feature_dtype: Literal["float16", "float32"] = "float16"  # number type of features: 262 or 524 kB of InceptionV3's
    extract_batch: Annotated[int, (1, 1024)] = 16  # images per call of the CNN
    extract_precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the fastest that keeps captions the same

    # Model: letters as in model.py
    encoder_dim: Annotated[int, (1, 16_384)] = 256  # D: encoded feature at each location
    embedding_dim: Annotated[int, (1, 16_384)] = 256  # E: word embedding
    units: Annotated[int, (1, 16_384)] = 512  # U: GRU and attention

    # Training
    run_dir: str = "runs/coco"  # folder for checkpoints, history.csv, loss.png and captions
    start_from: str = ""  # folder of a trained run, to go on from its weights on other data
    keep_vocabulary: Literal["yes", "no"] = "no"  # with start_from: keep that run's words, instead of the data's
    epochs: Annotated[int, (1, None)] = 8  # passes over the training captions, at most
    batch_size: Annotated[int, (1, 8_192)] = 64  # B: captions per optimiser step
    learning_rate: Annotated[float, (1e-8, 10.0)] = 1e-3  # Adam's step size
    clip_norm: Annotated[float, (1e-6, None)] = 5.0  # largest global norm of gradients; the detector has its own
    dropout: Annotated[float, (0.0, 0.95)] = 0.5  # share of activations dropped in training, the same at all words
    feature_dropout: Annotated[float, (0.0, 0.95)] = 0.0  # share of the CNN's channels dropped in training
    doubly_stochastic: Annotated[float, (0.0, None)] = 1.0  # weight of the paper's attention term (eq. 14)
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "auto"  # of the large products
    strategy: Literal["auto", "mirrored", "multiworker"] = "auto"  # one device, all GPUs here, or TF_CONFIG's workers
    schedule: Literal["constant", "cosine"] = "cosine"  # of the learning rate; cosine: to 0 by epochs done
    patience: Annotated[int, (1, None)] = 4  # these epochs end after so many without a better validation loss
    self_critical_epochs: Annotated[int, (0, None)] = 0  # epochs of self-critical (CIDEr) training after these
    self_critical_rate: Annotated[float, (1e-8, 10.0)] = 2e-4  # self-critical: Adam's step size, with the same schedule
    samples_per_image: Annotated[int, (2, 100)] = 5  # self-critical: captions sampled and compared
    reference_weight: Annotated[float, (0.0, None)] = 0.3  # self-critical: weight of a reference; 0: none
    images_per_step: Annotated[int, (1, 8_192)] = 32  # self-critical: images per optimiser step
    checkpoint_minutes: Annotated[float, (0.01, None)] = 30  # a checkpoint is also written in mid-epoch, this often
    tensorboard: Literal["yes", "no"] = "no"  # also write losses and sample captions as TensorBoard events

    # Inference
    beam_width: Annotated[int, (1, 20)] = 1  # captions kept while decoding; 1 is greedy
    length_penalty: Annotated[float, (0.0, 2.0)] = 1.0  # beams are ranked by log-probability / length to this power
    repeat_block: Annotated[int, (0, 5)] = 2  # no sequence of this many words comes twice in a caption; 0: allowed
    captions_per_image: Annotated[int, (1, 20)] = 1  # captions of each image, none twice; --captions N of script 3
    sample: Literal["yes", "no"] = "no"  # draw each word by its probability, instead of searching for the likeliest
    temperature: Annotated[float, (0.01, 10.0)] = 1.0  # of samples: below 1 likely words are drawn even more often
    top_p: Annotated[float, (0.01, 1.0)] = 0.9  # of samples: from the fewest words with this probability together
    sample_seed: Annotated[int, (0, 2**31 - 1)] = 42  # of samples: another draws others; --seed N of script 3
    plot_images: Annotated[int, (1, None)] = 6  # validation images captioned and plotted when none is named
    attention_map: Literal["weights", "evidence"] = "weights"  # what figures draw: attention weights, or evidence
    figures: Annotated[int, (0, None)] = 100  # attention figures to draw at most, of the first images
    decode_batch: Annotated[int, (1, 8_192)] = 100  # images decoded at a time


PRESETS = {
    "coco": {},
    "demo": {
        "data_dir": "data/demo",
        "coco_dir": "data/demo/scenes",
        "run_dir": "runs/demo",
        "num_examples": None,
        "inception_weights": "random",
        "val_fraction": 0.1,
        "encoder_dim": 128,
        "embedding_dim": 64,
        "units": 256,
        "epochs": 4,  # with the next five it learns in minutes, from few scenes
        "batch_size": 32,
        "learning_rate": 3e-3,
        "dropout": 0.3,
        "feature_dropout": 0.3,
        "doubly_stochastic": 3.0,
        "repeat_block": 0,  # its sentences are made of phrases that come twice
    },
    "karpathy": {
        "data_dir": "data/karpathy",
        "run_dir": "runs/karpathy",
        "num_examples": None,
    },
    "table": {"data_dir": "data/table", "run_dir": "runs/table", "num_examples": None},
}
