from .clip import CONFIG_FOLDER, CONFIG_NAME, WEIGHTS_NAME, ClipModel
from .loading import load_clip

__all__ = ["CONFIG_FOLDER", "CONFIG_NAME", "WEIGHTS_NAME", "ClipModel", "load_clip"]
