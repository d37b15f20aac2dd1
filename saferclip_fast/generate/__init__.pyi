from .call import generate_images
from .judges import ClipJudge, Judge, NudityJudge, open_judges
from .prompts import Prompt, read_prompts
from .result import Generated

__all__ = [
    "ClipJudge",
    "Generated",
    "Judge",
    "NudityJudge",
    "Prompt",
    "generate_images",
    "open_judges",
    "read_prompts",
]
