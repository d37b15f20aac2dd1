from .batches import Collate, collate
from .curriculum import CurriculumSampler
from .decoded import decode_images
from .errors import DataError, Summary
from .images import ImageArray, ImageError, ImageFile, TarMember
from .memory import open_rows
from .open import open_quadruplets
from .quadruplets import Quadruplet, QuadrupletDataset, QuadrupletEmbeddings
from .readers.shards import write_shards
from .synthetic import photos, scenes
from .synthetic.photos import PhotoDataset
from .synthetic.scenes import SceneDataset
from .transforms import ToTensor

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
    "QuadrupletEmbeddings",
    "SceneDataset",
    "Summary",
    "TarMember",
    "ToTensor",
    "collate",
    "decode_images",
    "open_quadruplets",
    "open_rows",
    "photos",
    "scenes",
    "write_shards",
]
