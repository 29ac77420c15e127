"""Rollouts with a scripted policy: what is executed, what is trained, when a trajectory ends."""

import pytest

from regrpo.prompts import REFLECTION_OPENER, observation_turn, opening
from regrpo.rollout import run, same_answer, task_start
from regrpo.sampling import Sample
from regrpo.segments import ChatFormat
from regrpo.tasks import Step, Task
from regrpo.tool_calls import Reflection, ToolCall, Turn
from regrpo.tools import Status
from regrpo.trajectory import Start
from regrpo.workspace import TextFile
from regrpo_kernels import Segment

TASK = Task(
    "t",
    "formats",
    "What is the number in oak.csv?",
    "number 7",
    (TextFile("oak.txt", "number 7"), TextFile("pine.txt", "number 8")),
    (Step(ToolCall("read_file", ("oak.txt",))), Step(ToolCall("final_answer", ("number 7",)))),
)
REFLECTION = Reflection("ArgInvalid", "oak.txt", "use oak.txt")
REST = REFLECTION.render().removeprefix(REFLECTION_OPENER)


def act(tool, argument, reflection=None):
    return Turn(reflection, f"I will call {tool}.", ToolCall(tool, (argument,))).render()


READ, READ_WRONG = act("read_file", "oak.txt"), act("read_file", "oak.csv")
READ_OTHER, ANSWER = act("read_file", "pine.txt"), act("final_answer", "number 7")
REPAIR = REST + READ


class Scripted:
    """Replays turns, a list a trajectory; a turn that ends in `...` runs into its limit."""

    def __init__(self, tokenizer, *scripts):
        self.chat = ChatFormat(tokenizer)
        self.scripts = [list(script) for script in scripts]
        self.prompts = []

    def session(self):
        return self

    def generate(self, prompts, numbers):
        self.prompts.append([list(p) for p in prompts])
        waiting = [script for script in self.scripts if script][: len(prompts)]
        assert len(waiting) == len(prompts), "asked for a turn that the script does not hold"
        samples = []
        for script in waiting:
            text = script.pop(0)
            ids = self.chat.encode(text.removesuffix("..."))
            if not text.endswith("..."):
                ids.append(self.chat.end_id)
            samples.append(Sample(ids, [-0.5 - i for i in range(len(ids))]))
        return samples


LOCAL = Start(TASK, tuple(opening(TASK.question)), step=0, expected="number 7")
FORCED = Start(
    TASK,
    (
        *opening(TASK.question),
        {"role": "assistant", "content": READ_WRONG},
        {"role": "user", "content": observation_turn(0, "FileNotFoundError")},
    ),
    expected="number 7",
    failed=True,
    error_type="ArgInvalid",
)
LAST = Start(TASK, FORCED.messages, step=1, expected="number 7")


@pytest.fixture(params=["small", "llama"])
def tok(request, tokenizer, llama_tokenizer):
    return {"small": tokenizer, "llama": llama_tokenizer}[request.param]


def roll(tok, environment, script, start=LOCAL, reflect=True, whole=False, **kwargs):
    policy = Scripted(tok, script)
    (trajectory,) = run(policy, environment, [start], reflect=reflect, whole=whole, **kwargs)
    assert not any(policy.scripts), "the trajectory ended too early"
    assert trajectory.done
    tokens = trajectory.tokens
    assert len(tokens.input_ids) == len(tokens.segment_ids) == len(tokens.log_probs)
    return trajectory


def pieces(tok, trajectory):
    found = []
    tokens = trajectory.tokens
    for token, kind, log_prob in zip(
        tokens.input_ids, tokens.segment_ids, tokens.log_probs, strict=True
    ):
        if found and found[-1][0] == kind:
            found[-1][1].append(token)
        else:
            found.append((kind, [token]))
        assert (log_prob != 0.0) == (kind in (Segment.ACTION, Segment.REFLECTION))
    return [(Segment(kind), tok.decode(ids)) for kind, ids in found]


def test_one_shot_success(tok, environment):
    trajectory = roll(tok, environment, [READ])
    assert trajectory.success
    assert trajectory.reflection_tokens == 0
    (turn,) = trajectory.turns
    assert (turn.text, turn.correction, turn.observation.text) == (READ, False, "number 7")
    assert pieces(tok, trajectory)[1:] == [(Segment.ACTION, READ + tok.eos_token)]


def test_recovery_is_trained_without_its_opener(tok, environment):
    trajectory = roll(tok, environment, [READ_WRONG, REPAIR])
    assert trajectory.success
    first, second = trajectory.turns
    assert (first.correction, first.observation.status) == (False, Status.ERROR)
    assert (second.correction, second.text) == (True, REFLECTION_OPENER + REPAIR)
    assert (first.step, second.step) == (0, 0)
    found = pieces(tok, trajectory)
    trained = [piece for piece in found if piece[0] in (Segment.ACTION, Segment.REFLECTION)]
    assert trained == [
        (Segment.ACTION, READ_WRONG + tok.eos_token),
        (Segment.REFLECTION, REST),
        (Segment.ACTION, READ + tok.eos_token),
    ]
    # The trigger wrote the opener: context, behind the observation.
    assert found[-3][0] in (Segment.CONTEXT, Segment.OBSERVATION)
    assert found[-3][1].endswith(REFLECTION_OPENER)
    assert "FileNotFoundError" in "".join(t for k, t in found if k is Segment.OBSERVATION)
    assert second.reflection_tokens == trajectory.reflection_tokens
    assert trajectory.reflection_tokens == len(ChatFormat(tok).encode(REST))


def test_a_failed_recovery_ends_the_trajectory(tok, environment):
    for whole in (False, True):
        trajectory = roll(tok, environment, [READ_WRONG, REST + READ_WRONG], whole=whole)
        assert not trajectory.success
        assert [t.correction for t in trajectory.turns] == [False, True]


def test_a_recovery_that_reads_something_else_is_no_success(tok, environment):
    trajectory = roll(tok, environment, [READ_WRONG, REST + READ_OTHER])
    assert not trajectory.success
    assert trajectory.turns[-1].observation.status is Status.OK
    assert not roll(tok, environment, [READ_OTHER]).success


def test_a_forced_start_is_a_correction_at_once(tok, environment):
    trajectory = roll(tok, environment, [REPAIR], start=FORCED)
    assert trajectory.success
    assert [t.correction for t in trajectory.turns] == [True]
    assert pieces(tok, trajectory)[0][1].endswith(REFLECTION_OPENER)
    assert not roll(tok, environment, [REST + READ_WRONG], start=FORCED).success


def test_without_reflect_there_is_no_opener(tok, environment):
    trajectory = roll(tok, environment, [READ_WRONG, READ], reflect=False)
    assert trajectory.success
    assert REFLECTION_OPENER not in "".join(t for _, t in pieces(tok, trajectory))
    assert trajectory.reflection_tokens == 0
    # One that it writes all the same is counted.
    trajectory = roll(tok, environment, [REFLECTION.render() + READ], reflect=False)
    assert trajectory.success
    chat = ChatFormat(tok)
    assert trajectory.turns[0].reflection_tokens == len(chat.encode(REFLECTION.render()))


def test_a_premature_or_missing_final_answer_is_no_success(tok, environment):
    premature = roll(tok, environment, [ANSWER])
    assert premature.turns[-1].observation.text == LOCAL.expected  # and yet
    assert not premature.success
    late = roll(tok, environment, [READ], start=LAST)
    assert late.turns[-1].observation.text == LAST.expected
    assert not late.success
    assert roll(tok, environment, [ANSWER], start=LAST).success
    assert not roll(tok, environment, [act("final_answer", "8")], start=LAST).success


def test_a_turn_that_runs_into_its_limit_is_closed_untrained(tok, environment):
    trajectory = roll(tok, environment, ["Thought: I will...", REPAIR])
    assert trajectory.success
    assert trajectory.turns[0].observation.text.startswith("SyntaxError: no code block")
    found = pieces(tok, trajectory)
    assert found[1] == (Segment.ACTION, "Thought: I will")
    assert found[2][0] is Segment.CONTEXT
    assert found[2][1].startswith(tok.eos_token)
    whole = tok.decode(trajectory.tokens.input_ids)
    assert whole.count(tok.eos_token) == 5  # system, user, two turns of the model, observation


def test_a_code_block_without_an_end_of_turn_is_executed(tok, environment):
    assert roll(tok, environment, [READ + "..."]).success


@pytest.mark.parametrize("reflect", [True, False])
def test_whole_episodes(tok, environment, reflect):
    script = [READ_WRONG, REPAIR if reflect else READ, ANSWER]
    start = task_start(TASK)
    trajectory = roll(tok, environment, script, start=start, whole=True, reflect=reflect)
    assert trajectory.success
    assert [(t.step, t.correction) for t in trajectory.turns] == [(0, False), (0, True), (1, False)]
    text = tok.decode(trajectory.tokens.input_ids)
    assert text.count("[OUTPUT OF STEP 0]") == 2
    assert "[OUTPUT OF STEP 1]" not in text
    assert not roll(
        tok, environment, [act("final_answer", "8")], start=start, whole=True, reflect=reflect
    ).success
    # A read that gives the answer as its observation is no answer.
    endless = roll(tok, environment, [READ] * 3, start=start, whole=True, max_steps=3)
    assert not endless.success
    assert [t.step for t in endless.turns] == [0, 1, 2]


def test_at_most_one_reflection_a_step_but_one_in_each(tok, environment):
    script = [READ_WRONG, REPAIR, READ_WRONG, REPAIR, ANSWER]
    trajectory = roll(tok, environment, script, start=task_start(TASK), whole=True)
    assert trajectory.success
    assert [t.step for t in trajectory.turns] == [0, 0, 1, 1, 2]
    assert tok.decode(trajectory.tokens.input_ids).count(REFLECTION_OPENER) == 2


def test_the_tokens_are_those_of_the_rendered_conversation(tok, environment):
    trajectory = roll(tok, environment, [READ_WRONG, READ, ANSWER], task_start(TASK), False, True)
    messages = opening(TASK.question)
    for turn in trajectory.turns:
        messages.append({"role": "assistant", "content": turn.text})
        messages.append(
            {"role": "user", "content": observation_turn(turn.step, turn.observation.text)}
        )
    whole = ChatFormat(tok).prompt(messages)
    assert trajectory.tokens.input_ids == whole[: len(trajectory.tokens)]


def test_trajectories_of_different_length_do_not_mix(tok, environment):
    scripts = [[READ], [READ_WRONG, REPAIR], [READ_WRONG, REST + READ_WRONG], [READ_OTHER]]
    policy = Scripted(tok, *scripts)
    trajectories = run(policy, environment, [LOCAL] * 4, reflect=True, whole=False)
    assert [t.success for t in trajectories] == [True, True, False, False]
    assert [len(t.turns) for t in trajectories] == [1, 2, 2, 1]
    assert [len(p) for p in policy.prompts] == [4, 2]
    for trajectory, script in zip(trajectories, scripts, strict=True):
        alone = roll(tok, environment, list(script))
        assert alone.tokens == trajectory.tokens
    assert run(policy, environment, [], reflect=True, whole=True) == []


def test_same_answer():
    assert same_answer(" Seven\n", "seven")
    assert not same_answer("7", "77")
