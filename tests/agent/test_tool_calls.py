import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrpo.tool_calls import (
    ERROR_TYPES,
    Reflection,
    ToolCall,
    ToolCallError,
    Turn,
    parse_call,
    parse_turn,
    reflection_span,
)

REFLECTION = (
    "Reflection:\n- ErrorType: ArgInvalid\n- Evidence: no such column: b\n- FixPlan: use c\n"
)
ACTION = 'Thought: look\n\nCode:\n```py\nread_file("a.txt")\n```'

names = st.from_regex(r"[a-z][a-z_]{0,8}_", fullmatch=True)  # the last "_": never a keyword
literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
calls = st.builds(
    ToolCall,
    names,
    st.lists(literals, max_size=3).map(tuple),
    st.dictionaries(names, literals, max_size=3),
)
single_lines = st.text().map(lambda text: text.replace("\n", "").strip())
thoughts = st.text().map(str.strip)


def is_thought(text):
    return not any(
        line.lstrip(" \t").startswith(("Reflection:", "Thought:", "Code:", "```"))
        for line in text.split("\n")
    )


turns = st.builds(
    Turn,
    st.none() | st.builds(Reflection, st.sampled_from(ERROR_TYPES), single_lines, single_lines),
    thoughts.filter(is_thought),
    calls,
)


def test_layout_is_that_of_the_official_records():
    turn = Turn(
        Reflection("ArgInvalid", "no such column: b", "use c"),
        "look",
        ToolCall("read_file", ("a.txt",)),
    )
    assert turn.render() == REFLECTION + ACTION
    assert Turn(None, "look", turn.call).render() == ACTION


@settings(deadline=None)
@given(calls)
def test_calls_round_trip(call):
    assert "\n" not in call.render()
    assert parse_call(call.render()) == call


@settings(deadline=None)
@given(turns)
def test_turns_round_trip(turn):
    assert parse_turn(turn.render()) == turn


@settings(deadline=None)
@given(turns)
def test_reflection_span_is_the_rendered_reflection(turn):
    span = reflection_span(turn.render())
    if turn.reflection is None:
        assert span is None
    else:
        assert span == (0, len(turn.reflection.render()))


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *("Reflection:", "- ErrorType: ", "- Evidence:", "- FixPlan: x", "Thought:"),
                *("Code:", "```py\n", "```", "\n", 'sql("a")', "f(", "'", '"', "\\", "\0"),
                *("(", "[{", "**", "*a"),
            ]
        )
        | st.text(max_size=5)
    ).map("".join)
)
def test_any_text_parses_or_is_a_tool_call_error(text):
    for parse in (parse_turn, parse_call):
        with contextlib.suppress(ToolCallError):
            parse(text)
    span = reflection_span(text)
    assert span is None or text[span[0] : span[1]].startswith("Reflection:")


@pytest.mark.parametrize(
    "text",
    [
        'Code:\n```py\nread_file("a.txt")\n```',
        '  Thought: look\nCode:\n\n```python\n\nread_file("a.txt")\n\n```\n<end>',
        'I look.\nCode:```\nread_file(\n  "a.txt",\n)\n```',
        "Code:\n```py\nread_file('a.txt') # comment\n```",
    ],
)
def test_tolerated_forms(text):
    assert parse_turn(text).call == ToolCall("read_file", ("a.txt",))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "exactly one call"),
        ("x = f(1)", "exactly one call"),
        ("f(1); f(2)", "exactly one call"),
        ("print", "exactly one call"),
        ("a.f(1)", "exactly one call"),
        ("f(1", "was never closed"),
        ("f(x)", "literals"),
        ("f(g(1))", "literals"),
        ("f(*[1])", "literals"),
        ("f({1, 2})", "literals"),
        ("f(b'x')", "literals"),
        ("f(1 + 2j)", "literals"),
        ("f(f'{x}')", "literals"),
        ("f(**{'a': 1})", "name=value"),
        ("f(a=1, a=2)", "repeated: a"),
        ("f('\0')", "null"),
        ("f('\ud800')", "surrogates"),
        ("f(" + "[" * 5000, "nested"),
        ("f(" + "-" * 9000 + "1)", "nested|recursion|stack"),
        ("f(" + "1" * 5000 + ")", "digits"),
        ("f('" + "a" * 30_000 + "')", "characters"),
    ],
)
def test_calls_that_are_refused(code, message):
    with pytest.raises(ToolCallError, match=message):
        parse_call(code)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Thought: look", "no code block"),
        ("read_file('a')", "no code block"),
        ("Code:\n```py\nf(1)", "no code block"),
        (ACTION + "\n" + ACTION, "more than one"),
        ("Thought: a\nThought: b\nCode:\n```py\nf(1)\n```", "one Thought"),
        ("Reflection:\n- ErrorType: x\n" + ACTION, "FixPlan"),
        ("Thought: a\n" + REFLECTION + ACTION, "comes first"),
        (REFLECTION + REFLECTION + ACTION, "one Thought"),
    ],
)
def test_turns_that_are_refused(text, message):
    with pytest.raises(ToolCallError, match=message):
        parse_turn(text)


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("Reflection:\n- ErrorType", "Reflection:\n- ErrorType"),
        ("Reflection: Thought: \nThought: x", "Reflection: Thought: \n"),
        ("so\n Reflection:\nCode:", "Reflection:\nCode:"),
        ("Thought: no Reflection: here", None),
    ],
)
def test_reflection_span_of_malformed_text(text, span):
    found = reflection_span(text)
    assert (None if found is None else text[slice(*found)]) == span


def test_parts_that_would_not_round_trip_are_refused():
    with pytest.raises(ValueError, match="evidence"):
        Reflection("ArgInvalid", "two\nlines", "")
    with pytest.raises(ValueError, match="thought"):
        Turn(None, "a\nCode: b", ToolCall("f"))
    with pytest.raises(TypeError, match="literal"):
        ToolCall("f", (object(),)).render()
    with pytest.raises(ValueError, match="nan"):
        ToolCall("f", (float("nan"),)).render()
