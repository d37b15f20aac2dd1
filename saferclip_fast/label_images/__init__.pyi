from .classifiers import ImageClassifier, NudeNet, open_classifier, probabilities
from .labels import label_table

__all__ = [
    "ImageClassifier",
    "NudeNet",
    "label_table",
    "open_classifier",
    "probabilities",
]
