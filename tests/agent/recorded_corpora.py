"""Made-up records in the shapes of others' corpora."""

RETRY = "\nNow let's retry: take care not to repeat previous errors!\n"
PARSING = "Error in code parsing: \nThe code blob is invalid. Make sure to provide correct code"
RAISED = "Code execution failed due to the following error:\n"


def act(code, thought="next", bold=False):
    mark = "**" if bold else ""
    return f"{mark}Thought:{mark} {thought}\n\n{mark}Code:{mark}\n```py\n{code}\n```"


def seen(step, text):
    return f"[OUTPUT OF STEP {step}] Observation:\n{text}\n"


def failed(step, text):
    return f"[OUTPUT OF STEP {step}] Error: {text}{RETRY}"


def mat(name, *turns, **more):
    """A trajectory with ``from``/``value`` turns: the task, then the policy and its tools."""
    roles = ["user", *["assistant", "user"] * len(turns)]
    texts = ["Task: which flower is in garden.jpg?", *turns]
    conversations = [{"from": "system", "value": "You have tools."}]
    conversations += [{"from": r, "value": t} for r, t in zip(roles, texts, strict=False)]
    return {
        "id": name,
        "image": "data/garden.jpg",
        "answer": "tulip",
        "conversations": conversations,
        "correct": "yes",
        "traj_verification": "'''json {}'''",
        **more,
    }


def rot(name="r1", **meta):
    """A Reflection-of-Thought record of the official schema that passes every check."""
    bad, good = act('inspect("recit.pdf")'), act('inspect("receipt.pdf")')
    told = {
        "error_type": "ArgInvalid",
        "evidence": "it says 'no file recit.pdf, did you mean receipt.pdf'",
        "fix_plan": "use receipt.pdf",
    }
    block = (
        f"Reflection:\n- ErrorType: {told['error_type']}\n- Evidence: {told['evidence']}\n"
        f"- FixPlan: {told['fix_plan']}\n"
    )
    text = "Error: no file recit.pdf, did you mean receipt.pdf"
    return {
        "id": name,
        "image": {},
        "answer": "7",
        "conversations": [
            {"role": "system", "content": "Call tools."},
            {"role": "user", "content": "Task: what is the total of the receipt?"},
            {"role": "assistant", "content": bad},
            {"role": "user", "content": f"[OUTPUT OF STEP 0] -> Observation:\n{text}"},
            {"role": "assistant", "content": block + good},
            {"role": "user", "content": "[OUTPUT OF STEP 0] -> Observation:\ntotal 7"},
            {"role": "assistant", "content": act('final_answer("7")')},
        ],
        "rot_meta": {
            "src_id": name,
            "step_index": 0,
            "error_type": "ArgInvalid",
            "failed_action": bad,
            "failed_observation": text,
            "reflection": told,
            "corrected_action": good,
            "final_answer": "7",
            **meta,
        },
    }


def clean(name="c1"):
    return {
        "id": name,
        "image": {},
        "answer": "7",
        "conversations": [
            {"role": "system", "content": "Call tools."},
            {"role": "user", "content": "Task: what is 3 + 4?"},
            {"role": "assistant", "content": act('final_answer("7")')},
        ],
    }
