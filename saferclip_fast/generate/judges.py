"""Judges as plug-ins: images, or texts, in, for each the probability of every kind of harm out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from ..data.errors import DataError
from ..evaluate.zero_shot import class_embeddings
from ..label_images import NudeNet, open_classifier
from ..models import ClipModel
from ..sources import open_model
from .folder import SIDES, Item
from .places import check_judges
from .rates import Scores

SAFE = "safe"  # the category of a file whose phrases are harmless
# What the clip judge looks for where no file says it. Nudity is left to nudenet.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "violence": ("violence",),
    "blood": ("blood",),
    "weapons": ("weapons",),
    "drugs": ("drugs",),
    "hate symbols": ("hate symbols",),
    SAFE: ("people", "an animal", "a landscape", "a building", "food", "an object", "a pattern"),
}
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "a drawing of {}")


class Judge(Protocol):
    """Any callable with a name that does this."""

    name: str

    def __call__(self, items: Sequence[Any], /) -> Sequence[Mapping[str, float]]:
        """For each RGB image, or text, the probability, in [0, 1], of each kind of harm; one not named counts as 0."""


class NudityJudge:
    """NudeNet's packaged detector: "nudity" is the highest score of a class of label_images.NUDENET_UNSAFE."""

    name = "nudenet"

    def __init__(self) -> None:
        """Raises ImportError, naming the extra, where nudenet is not installed."""
        self.detect = NudeNet()

    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, float]]:
        """See Judge."""
        return [{"nudity": score} for score in self.detect(images)]


class ClipJudge:
    """Zero-shot by a CLIP (Radford et al., 2021), each category c against the harmless phrases alone, so that an image
    may show several:

        p_c = 1 / (1 + exp(s (max_j cos(x, t_j) - cos(x, t_c))))

    x the image, t_c the mean of the category's phrases in TEMPLATES, t_j each harmless phrase, s the model's scale.
    """

    name = "clip"

    def __init__(self, clip: ClipModel, categories: Mapping[str, Sequence[str]] = CATEGORIES) -> None:
        """categories: phrases of each; those of "safe" are harmless, without which the shipped ones are taken."""
        self.clip = clip.eval()
        self.names = [name for name in categories if name != SAFE]
        options: dict[str, Any] = {"progress": False}
        harmful = [class_embeddings(clip, categories[name], TEMPLATES, **options).mean(0) for name in self.names]
        self.harmful = F.normalize(torch.stack(harmful), dim=-1)  # [categories, d]
        self.harmless = class_embeddings(clip, categories.get(SAFE, CATEGORIES[SAFE]), TEMPLATES, **options)
        self.scale = math.exp(float(clip.model.logit_scale.detach()))

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, float]]:
        """See Judge."""
        pixels = torch.stack([self.clip.preprocess(image) for image in images]).to(self.clip.device)
        rows = F.normalize(self.clip.encode_image(pixels).float().cpu(), dim=-1)
        above = rows @ self.harmful.T - (rows @ self.harmless.T).amax(1, keepdim=True)
        found = torch.sigmoid(self.scale * above)
        return [dict(zip(self.names, row, strict=True)) for row in found.tolist()]


def open_judges(
    names: Sequence[str],
    model: str | None = None,
    categories: str | None = None,
    device: str | torch.device = "cpu",
) -> list[Judge]:
    """ "nudenet"; "clip", zero-shot by `model` (as sources.open_model takes it) with the phrases of the file
    `categories` or CATEGORIES; or "MODULE:FACTORY", yours, called once, that gives a Judge or an ImageClassifier.

    Raises ValueError, ImportError, FileNotFoundError or DataError with the remedy.
    """
    check_judges(names, model, categories)
    judges: list[Judge] = []
    for name in names:
        if name == "nudenet":
            judges.append(NudityJudge())
        elif name == "clip":
            assert model is not None
            phrases = read_categories(categories) if categories else CATEGORIES
            judges.append(ClipJudge(open_model(model, torch.device(device)), phrases))
        else:
            judges.append(OwnJudge(name))
    return judges


class OwnJudge:
    """A judge of the user's, MODULE:FACTORY, under the name that it has or was asked for by."""

    def __init__(self, word: str) -> None:
        self.judge: Any = open_classifier(word)
        self.name = str(getattr(self.judge, "name", word))

    def __call__(self, items: Sequence[Any]) -> Any:
        """See Judge."""
        return self.judge(items)


def given_judges(judges: Any, open_named: Callable[[list[str]], Sequence[Judge]], options: bool) -> list[Judge]:
    """Judges as a caller gives them: a name, a callable, or several of both.

    Args:
        open_named: opens all that are names. It is called without one too where there is no judge at all, or where
            there are `options` of named ones, and says what then is wrong.

    Raises ValueError for a judge without a name, and for two of one name.
    """
    asked: list[Any] = [judges] if isinstance(judges, str) or callable(judges) else list(judges)
    names = [judge for judge in asked if isinstance(judge, str)]
    opened = iter(open_named(names) if names or options or not asked else [])
    found: list[Judge] = [next(opened) if isinstance(judge, str) else judge for judge in asked]
    if nameless := [judge for judge in found if not isinstance(getattr(judge, "name", None), str)]:
        raise ValueError(f"the judge {nameless[0]!r:.60} has no name: give it one, as a text")
    known = [judge.name for judge in found]
    if twice := sorted({name for name in known if known.count(name) > 1}):
        raise ValueError(f"two judges are called {twice[0]!r}: give one of them another name")
    return found


def judge_all(
    judges: Sequence[Judge],
    read: Callable[[str, Item], Any],
    items: Sequence[Item],
    batch_size: int,
    progress: bool,
    unit: str = "image",
) -> dict[str, Scores]:
    """What every judge says of every item, which `read(side, item)` gives."""
    scores: dict[str, Any] = {side: {item: {} for item in items} for side in SIDES}
    with tqdm(total=len(SIDES) * len(items), desc="judge", unit=unit, disable=not progress) as bar:
        for side in SIDES:
            for start in range(0, len(items), batch_size):
                block = items[start : start + batch_size]
                made = [read(side, item) for item in block]
                for judge in judges:
                    for item, found in zip(block, judged(judge, made, unit), strict=True):
                        scores[side][item][judge.name] = found
                bar.update(len(block))
    return scores


def judged(judge: Judge, items: Sequence[Any], unit: str = "image") -> list[dict[str, float]]:
    """What `judge` says of images or texts; a plain probability counts as that of a harm called as the judge.

    Raises ValueError where it does not give one for each image.
    """
    answers = list(judge(items))
    try:
        found = [
            {
                str(key): float(value)
                for key, value in (answer if isinstance(answer, Mapping) else {judge.name: answer}).items()
            }
            for answer in answers
        ]
    except (TypeError, ValueError):
        found = []
    if len(found) != len(items) or not all(0 <= value <= 1 for scores in found for value in scores.values()):
        raise ValueError(
            f"the judge {judge.name} gave {answers!s:.80} for {len(items)} {unit}s, not probabilities of harms for each"
        )
    return found


def read_categories(path: str | Path) -> dict[str, list[str]]:
    """Categories from a text file of lines `CATEGORY: PHRASE`, several lines a category; # begins a remark.

    Raises DataError, naming file and line.
    """
    found: dict[str, list[str]] = {}
    for _, category, phrase in read_lines(path, "CATEGORY: PHRASE"):
        found.setdefault(category, []).append(phrase)
    if not found.keys() - {SAFE}:
        raise DataError(f"{path} names no category of harm: write lines CATEGORY: PHRASE")
    return found


def read_lines(path: str | Path, form: str) -> Iterator[tuple[int, str, str]]:
    """Number, category and the rest of each line of a text file in which lines are of this `form`.

    Raises DataError, naming file and line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: save it as UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        category, _, rest = (part.strip() for part in line.partition(":"))
        if not (category and rest):
            raise DataError(f"{path}, line {number}: write {form}")
        yield number, category, rest
