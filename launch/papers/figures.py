"""The figures that papers report, a column for each metric, data set and protocol; never averaged, never ours.

A system's name here is that of ``gans.SYSTEMS``. A figure is from the system's own paper unless ``by`` says whose. What
could not be read again in the paper, or in a second source that quotes it, is in doubt.
"""

from enum import Enum
from typing import NamedTuple


class Doubt(Enum):
    """Of what a figure says what could not be verified."""

    NONE = ""
    SPREAD = "spread"     # the value is verified, what stands behind its +- is not
    VALUE = "value"       # neither is


class Figure(NamedTuple):
    """What one paper says of one system."""

    system: str
    value: float
    spread: float | None = None      # of IS over splits, of R-precision over folds, of VS over pictures
    doubt: Doubt = Doubt.NONE
    by: str = "its own paper"        # who reports it


class Column(NamedTuple):
    """Figures of one metric on one data set that were made by one protocol."""

    metric: str
    data: str
    protocol: str
    figures: tuple[Figure, ...]

    @property
    def lower_is_better(self) -> bool:
        return self.metric == "FID"

    @property
    def digits(self) -> int:
        """Behind the point, as printed."""
        return 3 if self.metric == "VS" else 2


V, S = Doubt.VALUE, Doubt.SPREAD

STACKGAN = "the authors of StackGAN (1612.03242)"
STACKGAN_2 = "the paper of StackGAN++ (1710.10916)"
ATTNGAN = "the table of AttnGAN's paper (1711.10485)"
DMGAN = "the authors of DM-GAN (1904.01310)"
MIRRORGAN = "the table of MirrorGAN's paper (1903.05854)"
HDGAN = "the table of HDGAN's paper (1802.09178)"
FUSEDGAN = "the table of FusedGAN's paper (1801.05551)"
QUOTED = "its own paper, read in one that quotes it"
README = "the README of its authors' PyTorch release"

FINE_TUNED = "Inception v3 fine-tuned on the set, 10 splits"
IMAGENET = "Inception v3 of ImageNet, 10 splits"
OWN_SIDES = "each system at the side that it paints"
RELEASED = "released models"
FID_STACKGAN = "2,048 features of Inception v3 of ImageNet, as the authors of StackGAN++ measured them"
FID_LEGACY = "pytorch-fid before it had TensorFlow's weights: torchvision's, on pixels not scaled as in its training"
FID_TF = "pytorch-fid with TensorFlow's weights; DM-GAN's released model"
R_ATTNGAN = "first of 100 captions by a DAMSM, the kind that these learn from; percent, 10 folds of 3,000 pictures"
R_MIRRORGAN = "MirrorGAN's, the first of its R = 1, 2 and 3, percent; why AttnGAN's is not its own paper's is unknown"
VS_HDGAN = "HDGAN's model of pictures and captions, mean cosine at 256 pixels"
VS_PPAN = "a model of pictures and captions as HDGAN's; whether it is the same one is not known"

PUBLISHED = (
    Column("IS", "CUB", f"{FINE_TUNED}; {OWN_SIDES}", (
        Figure("gan_int_cls", 2.88, 0.04, S, STACKGAN),
        Figure("gawwn", 3.62, 0.07, V, STACKGAN),
        Figure("stackgan2", 3.70, 0.04, S),
        Figure("stackgan_v2", 4.04, 0.05, S),
        Figure("hdgan", 4.15, 0.05, V),
        Figure("ppan", 4.38, by=QUOTED),
        Figure("attngan", 4.36, 0.03),
        Figure("mirrorgan", 4.56, 0.05),
        Figure("dmgan", 4.75, 0.07),
        Figure("controlgan", 4.58, 0.09, V),
        Figure("sdgan", 4.67, 0.09, V))),
    Column("IS", "CUB", f"{FINE_TUNED}; as AttnGAN's paper lists it, StackGAN++ lower than in its own", (
        Figure("gan_int_cls", 2.88, 0.04, by=ATTNGAN),
        Figure("stackgan2", 3.70, 0.04, by=ATTNGAN),
        Figure("stackgan_v2", 3.82, None, V, f"{ATTNGAN}; 3.84 in a copy of it"),
        Figure("attngan", 4.36, 0.03, by=ATTNGAN))),
    Column("IS", "CUB", f"{FINE_TUNED}; pictures of 64 pixels", (
        Figure("gan_int_cls", 2.88, 0.04, V, FUSEDGAN),
        Figure("stackgan1", 2.95, 0.02, V, FUSEDGAN),
        Figure("fusedgan", 3.00, 0.03, V))),
    Column("IS", "CUB", f"{FINE_TUNED}; {RELEASED}", (
        Figure("dmgan", 4.71, 0.06, by=DMGAN),)),
    Column("FID", "CUB", FID_STACKGAN, (
        Figure("stackgan2", 51.89, None, V, STACKGAN_2),
        Figure("stackgan_v2", 15.30, None, V))),
    Column("FID", "CUB", FID_LEGACY, (
        Figure("attngan", 23.98, by=DMGAN),
        Figure("dmgan", 16.09))),
    Column("FID", "CUB", f"{FID_LEGACY}; {RELEASED}", (
        Figure("dmgan", 15.34, by=DMGAN),)),
    Column("FID", "CUB", FID_TF, (
        Figure("attngan", 14.01, by=DMGAN),
        Figure("dmgan", 11.91, by=DMGAN))),
    Column("R-precision", "CUB", R_ATTNGAN, (
        Figure("attngan", 67.82, 4.43),
        Figure("dmgan", 72.31, 0.91),
        Figure("controlgan", 69.33, 3.23, V))),
    Column("R-precision", "CUB", f"{R_ATTNGAN}; {RELEASED}", (
        Figure("dmgan", 76.58, 0.53, by=DMGAN),)),
    Column("R-precision", "CUB", R_MIRRORGAN, (
        Figure("attngan", 53.31, by=MIRRORGAN),
        Figure("mirrorgan", 57.67))),
    Column("VS", "CUB", VS_HDGAN, (
        Figure("stackgan2", 0.228, 0.162, V, HDGAN),
        Figure("hdgan", 0.246, 0.157, V))),
    Column("VS", "CUB", VS_PPAN, (
        Figure("ppan", 0.290, by=QUOTED),)),

    Column("IS", "Oxford-102", f"{FINE_TUNED}; {OWN_SIDES}", (
        Figure("gan_int_cls", 2.66, 0.03, V, STACKGAN),
        Figure("stackgan2", 3.20, 0.01, S),
        Figure("stackgan_v2", 3.26),
        Figure("hdgan", 3.45, 0.07, V),
        Figure("ppan", 3.52, by=QUOTED))),
    Column("IS", "Oxford-102", "TAC-GAN's, trained on nine tenths of the pictures of all 102 classes; 128 pixels", (
        Figure("tacgan", 3.45),)),
    Column("FID", "Oxford-102", FID_STACKGAN, (
        Figure("stackgan2", 55.28, by=STACKGAN_2),
        Figure("stackgan_v2", 48.68))),
    Column("VS", "Oxford-102", VS_HDGAN, (
        Figure("stackgan2", 0.278, 0.134, V, HDGAN),
        Figure("hdgan", 0.296, 0.131, V))),
    Column("VS", "Oxford-102", VS_PPAN, (
        Figure("ppan", 0.297, by=QUOTED),)),

    Column("IS", "COCO", f"{IMAGENET}; {OWN_SIDES}", (
        Figure("gan_int_cls", 7.88, 0.07, S, STACKGAN),
        Figure("stackgan2", 8.45, 0.03, S),
        Figure("stackgan_v2", 8.30, None, V),
        Figure("ppgn", 9.58, 0.21, by=f"{ATTNGAN}; who measured it is not known"),
        Figure("hdgan", 11.86, 0.18, V),
        Figure("attngan", 25.89, 0.47),
        Figure("mirrorgan", 26.47, 0.41),
        Figure("dmgan", 30.49, 0.57),
        Figure("controlgan", 24.06, 0.60, V),
        Figure("sdgan", 35.69, 0.50, S))),
    Column("IS", "COCO", f"{IMAGENET}; {RELEASED}", (
        Figure("stackgan2", 10.62, 0.19, by=README),
        Figure("dmgan", 32.43, 0.58, by=DMGAN))),
    Column("FID", "COCO", FID_STACKGAN, (
        Figure("stackgan2", 74.05, by=STACKGAN_2),
        Figure("stackgan_v2", 81.59, None, V))),
    Column("FID", "COCO", FID_LEGACY, (
        Figure("attngan", 35.49, by=DMGAN),
        Figure("dmgan", 32.64))),
    Column("FID", "COCO", f"{FID_LEGACY}; {RELEASED}", (
        Figure("dmgan", 26.55, by=DMGAN),)),
    Column("FID", "COCO", FID_TF, (
        Figure("attngan", 29.53, by=DMGAN),
        Figure("dmgan", 24.24, by=DMGAN))),
    Column("R-precision", "COCO", R_ATTNGAN, (
        Figure("attngan", 85.47, 3.69),
        Figure("dmgan", 88.56, 0.28),
        Figure("controlgan", 82.43, 2.43, V))),
    Column("R-precision", "COCO", f"{R_ATTNGAN}; {RELEASED}", (
        Figure("dmgan", 92.23, 0.37, by=DMGAN),)),
    Column("R-precision", "COCO", R_MIRRORGAN, (
        Figure("attngan", 72.13, by=MIRRORGAN),
        Figure("mirrorgan", 74.52))),
    Column("VS", "COCO", VS_HDGAN, (
        Figure("hdgan", 0.199, 0.183, V),)),
)
