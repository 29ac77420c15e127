"""Whether an answer is right: GTA's three scorers, and GAIA's.

GTA (open-compass/GTA, arXiv 2407.08713) gives a whitelist (groups of aliases, of each of which one
must occur) with a blacklist, or a list of reference texts, or nothing. Three scorers:

- ``official``: an alias occurs where ``\\b(?:alias|...)\\b`` matches, without regard to case. So
  "-2", "50%" and "$2697" are never found (there is no word boundary before a sign), and "2" is
  found in "2.5" and in "-2". References are compared by the cosine of sentence embeddings
  (all-mpnet-base-v2).
- ``mat``: MAT-Agent's. An alias occurs where it is a substring in lower case, so that "2" is found
  in "12"; the blacklist does not count, and only tasks with a whitelist do.
- ``fixed``: an alias occurs as whole words and whole numbers: "2" is in "2", "$2" and "2.0", and
  not in "-2", "2.5", "12" or "2:30"; "2697" is in "2,697"; aliases may begin and end with a sign.
  References are compared as ``official`` does where an embedding model is given, else by word F1.
"""

import re
import string
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

Similarity = Callable[[str, str], float]
SCORERS = ("official", "mat", "fixed")


@dataclass(frozen=True)
class Whitelist:
    """An answer is right if it holds an alias of every group, and none of the blacklist's."""

    groups: tuple[tuple[str, ...], ...]
    blacklist: tuple[tuple[str, ...], ...] = ()


References = Whitelist | tuple[str, ...] | None


def answer_score(
    scorer: str, answer: str, references: References, similarity: Similarity | None = None
) -> float | None:
    """From 0 to 1; None where the scorer does not judge this task.

    Args:
        scorer: one of ``SCORERS``.
        similarity: of two texts, from -1 to 1; without it ``official`` does not judge tasks with
            reference texts.
    """
    if references is None:
        return None
    if isinstance(references, Whitelist):
        return float(_MATCH[scorer](answer, references))
    if scorer == "mat":
        return None
    if similarity is not None:
        return max(max(similarity(answer, text), 0.0) for text in references) if answer else 0.0
    return max(word_f1(answer, text) for text in references) if scorer == "fixed" else None


def official_match(answer: str, references: Whitelist) -> bool:
    """See ``official`` in the module's docstring."""

    def found(aliases: tuple[str, ...]) -> bool:
        pattern = r"\b(?:" + "|".join(map(re.escape, aliases)) + r")\b"
        return re.search(pattern, answer, re.IGNORECASE) is not None

    return all(map(found, references.groups)) and not any(map(found, references.blacklist))


def mat_match(answer: str, references: Whitelist) -> bool:
    """See ``mat`` in the module's docstring."""
    text = answer.lower()
    return all(any(alias.lower() in text for alias in group) for group in references.groups)


def fixed_match(answer: str, references: Whitelist) -> bool:
    """See ``fixed`` in the module's docstring."""
    text = _plain(answer)

    def found(aliases: tuple[str, ...]) -> bool:
        return any(re.search(_whole(_plain(alias)), text, re.IGNORECASE) for alias in aliases)

    return all(map(found, references.groups)) and not any(map(found, references.blacklist))


_MATCH = {"official": official_match, "mat": mat_match, "fixed": fixed_match}


def _plain(text: str) -> str:
    text = " ".join(text.replace("\u2212", "-").split())
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _whole(alias: str) -> str:
    """A pattern for the alias where it is no part of a longer word or number."""
    body = re.escape(alias)
    if re.fullmatch(r"[-+]?[$€£]?\d+", alias):
        body += r"(?:\.0+)?"
    elif re.fullmatch(r"[-+]?[$€£]?\d*\.\d+", alias):
        body += "0*"
    before = after = ""
    if re.match(r"\w", alias):
        before = r"(?<!\w)"
    if re.match(r"\d", alias):  # nor the rest of a number, nor one with another sign
        before += r"(?<!\d[.,:])(?<!\.)(?<!\W-)(?<!^-)"
    if re.search(r"\w$", alias):
        after = r"(?!\w)"
    if re.search(r"\d$", alias):
        after += r"(?![.,:]\d)"
    return before + body + after


def word_f1(answer: str, reference: str) -> float:
    """F1 of the words that two texts share, as in SQuAD but with articles."""
    given, expected = (Counter(re.findall(r"\w+", t.lower())) for t in (answer, reference))
    shared = (given & expected).total()
    return 2 * shared / (given.total() + expected.total()) if shared else 0.0


def gaia_match(answer: str, expected: str) -> bool:
    """GAIA's quasi exact match (arXiv 2311.12983).

    A number is compared as one, without ``$``, ``%`` and ``,``; a list (``,`` or ``;``) element by
    element; anything else without white space, punctuation and case.
    """
    number = _number(expected)
    if number is not None:
        return _gaia_number(answer) == number
    if not re.search("[,;]", expected):
        return _bare(answer) == _bare(expected)
    given, wanted = (re.split("[,;]", text) for text in (answer, expected))
    return len(given) == len(wanted) and all(map(_same_element, given, wanted))


def _same_element(given: str, wanted: str) -> bool:
    number = _number(wanted)
    if number is not None:
        return _gaia_number(given) == number
    return "".join(given.lower().split()) == "".join(wanted.lower().split())


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _gaia_number(text: str) -> float | None:
    return _number(re.sub("[$%,]", "", text))


def _bare(text: str) -> str:
    return "".join(text.lower().split()).translate(str.maketrans("", "", string.punctuation))


def embedding_similarity(model: str) -> Similarity:
    """The cosine of mean-pooled sentence embeddings, as sentence-transformers computes it.

    Args:
        model: Hugging Face name or folder, such as sentence-transformers/all-mpnet-base-v2.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(model)
        encoder = AutoModel.from_pretrained(model).eval()

    @torch.no_grad()
    def similarity(first: str, second: str) -> float:
        inputs = tokenizer([first, second], padding=True, truncation=True, return_tensors="pt")
        hidden = encoder(**inputs).last_hidden_state
        weights = inputs["attention_mask"][..., None].to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        return float(torch.cosine_similarity(pooled[0], pooled[1], dim=0))

    return similarity
