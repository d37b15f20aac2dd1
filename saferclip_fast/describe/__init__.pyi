from .call import describe_images
from .result import Described
from .word_judge import WordJudge, read_words

__all__ = ["Described", "WordJudge", "describe_images", "read_words"]
