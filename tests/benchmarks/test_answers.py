import pytest

from regrpo.benchmarks.answers import (
    Whitelist,
    answer_score,
    fixed_match,
    gaia_match,
    mat_match,
    official_match,
)

# answer, aliases, official, mat, fixed
CASES = [
    ("It is 12.", ["12"], True, True, True),
    ("It is 112.", ["12"], False, True, False),
    ("It is 2.5", ["2"], True, True, False),
    ("It is -2", ["2"], True, True, False),
    ("x = -2", ["-2"], False, True, True),
    ("x=\u22122", ["-2"], False, False, True),
    ("5-2", ["2"], True, True, True),
    ("50%", ["50%"], False, True, True),
    ("It costs $2,697.", ["$2697"], False, False, True),
    ("$2697", ["2697"], True, True, True),
    ("2.0", ["2"], True, True, True),
    ("4.50", ["4.5"], False, True, True),
    ("4.51", ["4.5"], False, True, False),
    ("at 2:30", ["2"], True, True, False),
    ("1.2", ["2"], True, True, False),
    ("a GOLDEN  retriever", ["golden retriever"], False, False, True),
    ("the catalogue", ["cat"], False, True, False),
    ("-\\sqrt{2}", ["-\\sqrt{2}", "-sqrt(2)"], False, True, True),
    ("three", ["3", "three"], True, True, True),
    ("", ["3"], False, False, False),
]


@pytest.mark.parametrize(("answer", "aliases", "official", "mat", "fixed"), CASES)
def test_whitelists(answer, aliases, official, mat, fixed):
    references = Whitelist((tuple(aliases),))
    assert official_match(answer, references) is official
    assert mat_match(answer, references) is mat
    assert fixed_match(answer, references) is fixed


def test_every_group_must_occur_and_nothing_of_the_blacklist():
    references = Whitelist((("40HX",), ("90HX",)), (("30HX",), ("50HX",)))
    for match in (official_match, fixed_match):
        assert match("one 40hx, one 90HX", references)
        assert not match("one 40HX", references)
        assert not match("40HX, 90HX, 50HX", references)
    assert mat_match("40HX, 90HX, 50HX", references)


def test_texts_are_compared_by_words_or_by_what_is_given():
    texts = ("a cat sleeps", "the dog")
    assert answer_score("fixed", "a cat sleeps", texts) == 1
    assert answer_score("fixed", "the cat", texts) == pytest.approx(0.5)
    assert answer_score("fixed", "", texts) == 0
    assert answer_score("official", "the cat", texts) is None
    assert answer_score("mat", "the cat", texts, lambda a, b: 1.0) is None
    scores = {"a cat sleeps": 0.3, "the dog": -0.5}
    assert answer_score("official", "x", texts, lambda a, b: scores[b]) == 0.3
    assert answer_score("official", "x", texts[1:], lambda a, b: scores[b]) == 0
    assert answer_score("fixed", "x", None) is None


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("$1,234.50", "1234.5", True),
        ("12 %", "12", True),
        ("twelve", "12", False),
        ("Red; Blue", "red, blue", True),
        ("red", "red, blue", False),
        ("1, 2.0", "1,2", True),
        ("1, 3", "1,2", False),
        ("ada  love-lace!", "Ada Lovelace", True),
        ("Ada", "Ada Lovelace", False),
        ("", "x", False),
        ("nan", "3", False),
    ],
)
def test_gaia(answer, expected, right):
    assert gaia_match(answer, expected) is right
