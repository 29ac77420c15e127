"""The documentation says what the code does: its Python runs, and public names say what they take.

Links and API pages are checked by `mkdocs build --strict`, in `make docs`.
"""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import regrpo_kernels

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/quickstart.md", "docs/kernels.md", "docs/add_tool.md")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMED = [
    name
    for page in sorted((ROOT / "docs/api").glob("*.md"))
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("page", PAGES)
def test_python_of_a_page_runs(page):
    blocks = BLOCK.findall((ROOT / page).read_text())
    assert blocks
    names = {"__name__": "page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def find(name):
    """The object of a dotted name: a module, or what is in it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, last = name.rpartition(".")
        return getattr(importlib.import_module(module), last)


def public(thing):
    """`(name, object)` of what an API page shows of a module or an object: its public functions and
    classes, and their public methods.
    """
    if inspect.ismodule(thing):
        names = getattr(thing, "__all__", None) or [
            name
            for name, value in vars(thing).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == thing.__name__
        ]
        for name in names:
            yield from public(getattr(thing, name))
    elif inspect.isclass(thing):
        yield thing.__qualname__, thing
        for name, value in vars(thing).items():
            value = getattr(value, "fget", getattr(value, "__func__", value))
            if not name.startswith("_") and inspect.isfunction(value):
                yield value.__qualname__, value
    elif inspect.isfunction(thing):
        yield thing.__qualname__, thing


@pytest.mark.parametrize("name", NAMED)
def test_public_names_have_docstrings(name):
    bare = []
    for title, thing in public(find(name)):
        doc = thing.__doc__ or ""
        generated = inspect.isclass(thing) and doc.startswith(f"{thing.__name__}(")
        if not doc or generated or doc == "An enumeration.":
            bare.append(title)
    assert not bare


def test_the_kernels_api_is_complete():
    shown = [name.rpartition(".")[2] for name in NAMED]
    assert set(regrpo_kernels.__all__) <= set(shown)


@pytest.mark.parametrize("name", regrpo_kernels.__all__)
def test_arguments_and_errors_of_kernels_are_documented(name):
    thing = getattr(regrpo_kernels, name)
    doc = thing.__doc__
    if inspect.isfunction(thing) and "other arguments" not in doc:
        missing = [p for p in inspect.signature(thing).parameters if f"{p}" not in doc]
        assert not missing
        assert not inspect.signature(thing).parameters or "Raises" in doc
    fields = getattr(thing, "_fields", ())
    assert not [field for field in fields if field not in doc]
