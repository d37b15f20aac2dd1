"""Quadruplets (safe and unsafe image-text pairs): readers, synthetic scenes, curriculum, batches."""

from . import photos, scenes
from .collate import Collate, collate
from .curriculum import CurriculumSampler
from .decoded import decode_images
from .errors import DataError, Summary
from .images import ImageArray, ImageError, ImageFile, TarMember, ToTensor
from .open import open_quadruplets
from .photos import PhotoDataset
from .quadruplets import Quadruplet, QuadrupletDataset
from .scenes import SceneDataset
from .shards import write_shards

__all__ = [
    "Collate",
    "CurriculumSampler",
    "DataError",
    "ImageArray",
    "ImageError",
    "ImageFile",
    "PhotoDataset",
    "Quadruplet",
    "QuadrupletDataset",
    "SceneDataset",
    "Summary",
    "TarMember",
    "ToTensor",
    "collate",
    "decode_images",
    "open_quadruplets",
    "photos",
    "scenes",
    "write_shards",
]
