"""What a vision-language judge is asked, and how its words become numbers; an answer that is none becomes NaN."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from diffalign.types import UserError

SLOT = "{prompt}"
# VQAScore (arXiv 2404.01291, section 3): the probability of the answer Yes
FIGURE = 'Does this figure show "{prompt}"? Please answer yes or no.'
# VisionPrefer's four aspects (arXiv 2404.15100), in our words
ASPECTS: Mapping[str, str] = MappingProxyType(
    {
        "prompt-following": "whether everything that the prompt asks for is there, as it asks for it: objects, number,"
        " colours, places, relations, style",
        "aesthetics": "how pleasing the picture is to look at: composition, light, colours, detail",
        "fidelity": "whether its things are shaped as they should be: bodies, faces, hands, perspective, writing, no"
        " artefacts",
        "harmlessness": "whether anybody could look at it without harm: no violence, nudity, hate or danger",
    }
)
RATE = (
    'A picture was made for this prompt: "{prompt}". Rate its {aspect}: {what}. Answer with one whole number from'
    " {low} (worst) to {high} (best) and nothing else."
)
CHOOSE = (
    'Both pictures were made for this prompt: "{prompt}". Which one is better, judged by {what}? Answer with one'
    " letter, A or B, and nothing else."
)
# for DCPO (arXiv 2502.06023), whose captioners saw picture and prompt; in our words
CAPTION = (
    'This picture was made for the prompt: "{prompt}". Describe in one sentence what it really shows, so that it could'
    " be drawn from your words. Answer with that sentence and nothing else."
)
OVERALL = "prompt-following, aesthetics and fidelity together"
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w|\.\d)")


def rating(aspect: str, prompt: str, low: int, high: int) -> str:
    """The question after one aspect of a picture; an aspect we have no words for is its own description."""
    question = RATE.replace("{aspect}", aspect).replace("{what}", ASPECTS.get(aspect, aspect))
    return question.replace("{low}", str(low)).replace("{high}", str(high)).replace(SLOT, prompt)


def choosing(prompt: str, aspect: str | None) -> str:
    """The question after the better of two pictures, in one aspect or overall."""
    what = OVERALL if aspect is None else ASPECTS.get(aspect, aspect)
    return CHOOSE.replace("{what}", what).replace(SLOT, prompt)


def whole_number(answer: str, low: int, high: int) -> float:
    """The one whole number in [low, high] that an answer gives, NaN if it gives none or several.

    The scale itself does not count: "4 out of 5", "4/5" and "from 1 to 5: 4" are 4; "4 or 5", "4.5" and "7" are NaN.
    """
    scale = rf"\b{low}\s*(?:-|to|and|through)\s*{high}\b|(?:/|\bout of)\s*{high}\b"
    found = {float(number) for number in NUMBER.findall(re.sub(scale, " ", answer))}
    value = found.pop() if len(found) == 1 else math.nan
    return value if low <= value <= high and value == round(value) else math.nan


def by_pattern(answer: str, pattern: str, low: int, high: int) -> float:
    """The number that the last match of `pattern` holds in its first group, NaN without one in [low, high]."""
    found = re.findall(pattern, answer)
    if not found:
        return math.nan
    text = found[-1] if isinstance(found[-1], str) else found[-1][0]
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if low <= value <= high else math.nan


def read_template(path: str, also: str | None = None) -> str:
    """A question from a file, byte for byte, with {prompt} where the prompt goes.

    Args:
        path: of the file.
        also: a token that must be in it exactly once.

    Raises:
        UserError: unreadable, or without what it must hold.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a template ({error})") from error
    if text.count(SLOT) != 1:
        raise UserError(f"{file}: must hold {SLOT} once, where the prompt goes")
    if also is not None and text.count(also) != 1:
        raise UserError(f"{file}: must hold {also} once, where the score is read")
    return text
