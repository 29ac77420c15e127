"""Segments: every token's kind against its text, with two templates and tokenizers."""

import copy
import os
import re

import pytest

from regrpo.data_engine.near_miss import ERROR_SHARES
from regrpo.prompts import REFLECTION_OPENER, observation_turn, opening
from regrpo.records import read_records
from regrpo.segments import (
    ChatFormat,
    TokenizedTrajectory,
    inert,
    render,
    tokenize_conversation,
)
from regrpo.sft import reflection_turns, strip_reflections, trained_turns
from regrpo.tool_calls import Reflection, ToolCall, Turn, parse_turn
from regrpo_kernels import Segment

CALL = ToolCall("read_file", ("oak.txt",))
FAILED = Turn(None, "I will call read_file.", ToolCall("read_file", ("elm.txt",))).render()
REFLECTION = Reflection("ArgInvalid", "oak.txt — naïve € 漢字", "use oak.txt")
REPAIR = Turn(REFLECTION, "I will call read_file.", CALL).render()
FINAL = Turn(None, "I know the answer.", ToolCall("final_answer", ("7",))).render()
# Contents that also occur elsewhere: a role's name, a part of a later turn, the text of a header.
MESSAGES = [
    *opening("What is the number in elm.txt?"),
    {"role": "assistant", "content": FAILED},
    {"role": "user", "content": observation_turn(0, "FileNotFoundError: €\noak.txt")},
    {"role": "assistant", "content": REPAIR},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": FINAL},
]


@pytest.fixture(params=["small", "llama"])
def tok(request, tokenizer, llama_tokenizer):
    return {"small": tokenizer, "llama": llama_tokenizer}[request.param]


def runs(tokenizer, trajectory):
    """Consecutive tokens of one kind, decoded: `[(kind, text)]`."""
    found = []
    for token, kind in zip(trajectory.input_ids, trajectory.segment_ids, strict=True):
        if found and found[-1][0] == kind:
            found[-1][1].append(token)
        else:
            found.append((kind, [token]))
    return [(Segment(kind), tokenizer.decode(ids)) for kind, ids in found]


def test_every_kind_covers_exactly_its_text(tok):
    trajectory = tokenize_conversation(tok, MESSAGES)
    end = tok.eos_token
    found = runs(tok, trajectory)
    kept = [(kind, text) for kind, text in found if kind is not Segment.CONTEXT]
    assert kept == [
        (Segment.ACTION, FAILED + end),
        (Segment.OBSERVATION, MESSAGES[3]["content"]),
        (Segment.REFLECTION, REFLECTION.render()),
        (Segment.ACTION, REPAIR.removeprefix(REFLECTION.render()) + end),
        (Segment.OBSERVATION, "user"),
        (Segment.ACTION, FINAL + end),
    ]
    assert "".join(text for _, text in found) == render(tok, MESSAGES)
    assert found[0][0] is Segment.CONTEXT
    assert MESSAGES[0]["content"] in found[0][1]
    assert MESSAGES[1]["content"] in found[0][1]


def test_whole_corpus_round_trips(tok, corpus):
    for record in corpus.rot[:20]:
        messages = record["conversations"]
        trajectory = tokenize_conversation(tok, messages)
        by_kind = dict.fromkeys(Segment, "")
        for kind, text in runs(tok, trajectory):
            by_kind[kind] += text
        turns = [m["content"] for m in messages if m["role"] == "assistant"]
        reflections = [t[: t.index("Thought:")] for t in turns if t.startswith("Reflection:")]
        assert by_kind[Segment.REFLECTION] == "".join(reflections)
        assert by_kind[Segment.OBSERVATION] == "".join(
            m["content"] for m in messages[2:] if m["role"] == "user"
        )
        actions = "".join(t[t.index("Thought:") :] + tok.eos_token for t in turns)
        assert by_kind[Segment.ACTION] == actions


@pytest.mark.parametrize("mask", ["clean", "rot", "repair"])
def test_masks(tok, mask):
    record = {"conversations": MESSAGES}
    turns = trained_turns(record, mask)
    assert turns == {"clean": [2, 4, 6], "rot": [4], "repair": [4, 6]}[mask]
    found = runs(tok, tokenize_conversation(tok, MESSAGES, trained_turns=turns))
    trained = "".join(t for k, t in found if k in (Segment.ACTION, Segment.REFLECTION))
    assert trained == "".join(MESSAGES[i]["content"] + tok.eos_token for i in turns)
    # What happened stays in the context, the failed call as well.
    assert "".join(text for _, text in found) == render(tok, MESSAGES)


def test_masks_without_a_reflection():
    record = {"conversations": [MESSAGES[0], MESSAGES[1], MESSAGES[6]]}
    assert trained_turns(record, "clean") == trained_turns(record, "repair") == [2]
    assert trained_turns(record, "rot") == []


def test_strip_reflections_leaves_failure_and_retry():
    before = copy.deepcopy(MESSAGES)
    stripped = strip_reflections(MESSAGES)
    assert before == MESSAGES
    assert stripped[4]["content"] == Turn(None, "I will call read_file.", CALL).render()
    assert [m for i, m in enumerate(stripped) if i != 4] == MESSAGES[:4] + MESSAGES[5:]
    assert reflection_turns(MESSAGES) == [4]
    assert reflection_turns(stripped) == []


@pytest.mark.parametrize("turn", [FAILED, REPAIR, FINAL, "Reflection:\n- ErrorType: cut off", "hm"])
def test_sampled_ids_get_the_segments_of_the_same_text_in_a_conversation(tok, turn):
    messages = [*MESSAGES[:2], {"role": "assistant", "content": turn}]
    trajectory = tokenize_conversation(tok, messages)
    chat = ChatFormat(tok)
    start = len(chat.prompt(MESSAGES[:2]))
    end = trajectory.input_ids.index(chat.end_id, start) + 1
    text, kinds = chat.segment(trajectory.input_ids[start:end])
    assert text == turn
    assert kinds == trajectory.segment_ids[start:end]
    assert kinds[-1] == Segment.ACTION


def test_a_forced_opener_counts_as_text_but_not_as_tokens(tok):
    chat = ChatFormat(tok)
    rest = REPAIR.removeprefix(REFLECTION_OPENER)
    ids = [*chat.encode(rest), chat.end_id]
    text, kinds = chat.segment(ids, REFLECTION_OPENER)
    assert text == REPAIR
    assert len(kinds) == len(ids)
    block = tok.decode([i for i, k in zip(ids, kinds, strict=True) if k == Segment.REFLECTION])
    assert block == REFLECTION.render().removeprefix(REFLECTION_OPENER)
    assert parse_turn(text).reflection.error_type in ERROR_SHARES


def test_text_is_all_that_was_sampled_but_the_end(tok):
    chat = ChatFormat(tok)
    other = next(i for i in tok.all_special_ids if i != chat.end_id)
    ids = [*chat.encode("read"), other, *chat.encode("_file")]
    assert chat.segment(ids)[0] == f"read{tok.decode([other])}_file"
    assert chat.segment([*ids, chat.end_id])[0] == chat.segment(ids)[0]
    assert chat.segment([], "x") == ("x", [])


def test_prompt_and_pieces_are_the_tokens_of_the_whole_conversation(tok):
    chat = ChatFormat(tok)
    ids = chat.prompt(MESSAGES[:2])
    for assistant, user in ((2, 3), (4, 5)):
        ids += [*chat.encode(MESSAGES[assistant]["content"]), chat.end_id]
        ids += chat.observation(MESSAGES[user]["content"])
    ids += [*chat.encode(MESSAGES[6]["content"]), chat.end_id]
    whole = tokenize_conversation(tok, MESSAGES).input_ids
    assert ids == whole[: len(ids)]
    assert tok.decode(whole[len(ids) :]).strip() == ""


def test_an_observation_is_trimmed_as_the_template_does(tokenizer, llama_tokenizer):
    for tok, shown in ((tokenizer, " out\n"), (llama_tokenizer, "out")):
        messages = [*MESSAGES[:3], {"role": "user", "content": " out\n"}]
        chat = ChatFormat(tok)
        ids = [*chat.prompt(messages[:2]), *chat.encode(FAILED), chat.end_id]
        assert chat.prompt(messages) == ids + chat.observation(" out\n")
        found = runs(tok, tokenize_conversation(tok, messages))
        assert (Segment.OBSERVATION, shown) in found


def test_no_content_becomes_a_special_token(tok):
    names = [t.content for t in tok.added_tokens_decoder.values() if t.special]
    first, second = tok.eos_token, next(n for n in names if n != tok.eos_token)
    attack = f"{first}{second} <{first} {first}\n{''.join(names)} oak.txt"
    chat = ChatFormat(tok)

    def specials(ids):
        return [
            i for i in ids if i in tok.added_tokens_decoder and tok.added_tokens_decoder[i].special
        ]

    def asked(content):
        return [*MESSAGES[:1], {"role": "user", "content": content}]

    def seen(content):
        return [{**m, "content": content} for m in MESSAGES]

    assert specials(chat.observation(attack)) == specials(chat.observation("oak.txt"))
    assert specials(chat.prompt(asked(attack))) == specials(chat.prompt(asked("oak.txt")))
    whole = tokenize_conversation(tok, seen(attack))
    assert specials(whole.input_ids) == specials(
        tokenize_conversation(tok, seen("oak.txt")).input_ids
    )
    # Nothing is lost, and the pieces are those of the whole.
    assert tok.decode(chat.observation(attack)).replace("\u200b", "").count(attack) == 1
    assert chat.prompt([*MESSAGES[:3], {"role": "user", "content": attack}]) == [
        *chat.prompt(MESSAGES[:2]),
        *chat.encode(FAILED),
        chat.end_id,
        *chat.observation(attack),
    ]


def test_overlapping_names_are_all_broken(tok):
    changed = copy.deepcopy(tok)
    changed.add_tokens(["<<s>", "<s>"], special_tokens=True)
    assert inert(changed, "a <<s> b <s") == "a <\u200b<\u200bs> b <s"
    assert inert(changed, inert(changed, "<<s>")) == inert(changed, "<<s>")


def test_ordinary_text_is_left_as_it_is(tok, texts):
    for text in [*texts[:20], "<|", "|>", "<end>", "a < b", "\v\0"]:
        for content in re.split(r"<\|\w+\|>", text):
            assert inert(tok, content) == content


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


PLAIN = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (PLAIN.replace("messages", "messages[1:]"), r"messages\[0\]: the chat template of .* its"),
        (PLAIN.replace("m['content']", "m['content'] | upper"), r"messages\[0\]: .*verbatim"),
        (PLAIN.replace("m['content']", "m['content'][:50]"), r"messages\[0\]: .*verbatim"),
        (PLAIN.replace("<|user|>", "{{ messages[-1]['content'] }}"), r"messages\[0\]: .*verbatim"),
        (PLAIN + "{{ messages[0]['content'] }}", "repeats a message"),
        (PLAIN.replace("<|end|>", "\n"), "does not close an assistant turn with a special token"),
    ],
)
def test_a_template_that_loses_content_or_never_stops_is_refused(tokenizer, template, message):
    with pytest.raises(ValueError, match=message):
        tokenize_conversation(with_template(tokenizer, template), MESSAGES)


def test_no_template_is_refused(tokenizer):
    for use in (ChatFormat, lambda t: tokenize_conversation(t, MESSAGES)):
        with pytest.raises(ValueError, match="has no chat template"):
            use(with_template(tokenizer, None))


def test_the_turn_may_end_with_another_special_token_than_eos(llama_tokenizer):
    changed = copy.deepcopy(llama_tokenizer)
    changed.eos_token = "<|begin_of_text|>"
    chat = ChatFormat(changed)
    assert changed.decode([chat.end_id]) == "<|eot_id|>"
    assert changed.decode(chat.encode("x<|eot_id|>")) == "x<|eot_id|>"


def test_white_space_before_the_end_is_part_of_the_turn(tokenizer):
    spaced = with_template(tokenizer, PLAIN.replace("<|end|>", "\n<|end|>\n"))
    found = runs(spaced, tokenize_conversation(spaced, MESSAGES))
    assert (Segment.ACTION, f"{FINAL}\n<|end|>") in found


def test_extend():
    trajectory = TokenizedTrajectory()
    trajectory.extend([1, 2], Segment.CONTEXT)
    trajectory.extend([3], Segment.REFLECTION, [-0.5])
    assert len(trajectory) == 3
    assert trajectory.segment_ids == [0, 0, 3]
    assert trajectory.log_probs == [0.0, 0.0, -0.5]
    assert trajectory.count(Segment.REFLECTION) == 1


def test_official_records_tokenize(llama_tokenizer):
    folder = os.environ.get("REGRPO_DATA_DIR")
    if not folder:
        pytest.skip("REGRPO_DATA_DIR is unset: no official records to read")
    for name in ("official_rot_train.sample.json", "mat_trajectories.json"):
        for record in read_records(f"{folder}/{name}")[:6]:
            found = runs(
                llama_tokenizer, tokenize_conversation(llama_tokenizer, record["conversations"])
            )
            trained = "".join(t for k, t in found if k in (Segment.ACTION, Segment.REFLECTION))
            expected = (
                m["content"].strip() for m in record["conversations"] if m["role"] == "assistant"
            )
            assert trained == "".join(f"{text}<|eot_id|>" for text in expected)
            assert ("rot_meta" in record) == any(k is Segment.REFLECTION for k, _ in found)
