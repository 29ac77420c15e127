"""Made-up benchmark data in the schemas of GTA and GAIA, and a model that knows GTA's dialogs."""

import json

from PIL import Image

from regrpo.benchmarks.gta_dialogs import opening, reference_turns


def call(name, thought="next", **arguments):
    function = {"name": name, "arguments": arguments}
    calls = [{"type": "function", "function": function}]
    return {"role": "assistant", "tool_calls": calls, "thought": thought}


def seen(name, content, kind="text"):
    return {"role": "tool", "name": name, "content": {"type": kind, "content": content}}


def task(question, tools, turns, answer, gt_answer, files=()):
    end = [] if answer is None else [{"role": "assistant", "content": answer}]
    return {
        "tools": [{"name": name} for name in tools],
        "files": [{"type": "image", "path": path, "url": None} for path in files],
        "dialogs": [{"role": "user", "content": question}, *turns, *end],
        "gt_answer": gt_answer,
    }


def gta():
    """Four tasks: a number, a signed number, a text with references, an image."""
    shelf, note = "image/shelf.png", "image/note.png"
    return {
        "0": task(
            "What do the three jars cost?",
            ["OCR", "Calculator"],
            [
                call("OCR", image=shelf),
                seen("OCR", "(3, 4, 40, 20) jar 2.50"),
                call("Calculator", expression="2.50 * 3"),
                seen("Calculator", "7.5"),
            ],
            "7.5",
            {"whitelist": [["7.5"]], "blacklist": None},
            [shelf],
        ),
        "1": task(
            "Solve the equation on the note.",
            ["MathOCR", "Solver"],
            [
                call("MathOCR", image=note),
                seen("MathOCR", "x + 4 = 1"),
                call(
                    "Solver",
                    command="from sympy import symbols, solve\ndef solution():\n"
                    "    x = symbols('x')\n    return str(solve(x + 4 - 1, x))",
                ),
                seen("Solver", "[-3]"),
            ],
            "-3",
            {"whitelist": [["-3"]], "blacklist": [["3.5"]]},
            [note],
        ),
        "2": task(
            "What is the joke?",
            ["ImageDescription"],
            [call("ImageDescription", image=note), seen("ImageDescription", "a cat at a desk")],
            "a cat does taxes",
            ["a cat does taxes", "the cat works", "taxes"],
            [note],
        ),
        "3": task(
            "Mark the jar.",
            ["TextToBbox", "DrawBox"],
            [
                call("TextToBbox", image=shelf, text="jar", top1=True),
                seen("TextToBbox", "(3, 4, 40, 20), score 90"),
                call("DrawBox", image=shelf, bbox="(3, 4, 40, 20)"),
                seen("DrawBox", "image/dummy.jpg", "image"),
            ],
            None,
            None,
            [shelf],
        ),
    }


def write_gta(folder, tasks=None, images=True):
    (folder / "image").mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(gta() if tasks is None else tasks))
    for name in ("shelf", "note") if images else ():
        Image.new("RGB", (60, 40), "white").save(folder / f"image/{name}.png")
    return folder


GAIA = (
    ("a1", "How many lines has the file?", 1, "3", "lines.txt"),
    ("a2", "Name the two colours.", 2, "red, blue", ""),
    ("a3", "Who wrote it?", 3, "Ada Lovelace", "gone.txt"),
)


def write_gaia(folder):
    folder.mkdir(parents=True, exist_ok=True)
    keys = ("task_id", "Question", "Level", "Final answer", "file_name")
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in GAIA]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "lines.txt").write_text("a\nb\nc")
    return folder


def reference_player(tasks):
    """What the reference dialogs do next, as a function of a chat-completions request."""
    known = {opening(t)[1]["content"]: [u.render() for u in reference_turns(t)] for t in tasks}

    def content(body):
        messages = body["messages"]
        turns = known[messages[1]["content"]]
        number = sum(message["role"] == "assistant" for message in messages)
        done = 'Thought: done\n\nCode:\n```py\nfinal_answer("the image is saved")\n```'
        return turns[number] if number < len(turns) else done

    return content
