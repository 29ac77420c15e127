"""Identifiers of the generated tasks: files, columns, documents and fields bear these names.

Each is one token of the small tokenizer, so that copying an identifier is copying one symbol.
"""

NAMES: tuple[str, ...] = (
    "agate", "alder", "amber", "anise", "aspen", "aster", "basil", "beech",
    "birch", "bison", "camel", "cedar", "clove", "cobra", "coral", "crane",
    "daisy", "eagle", "ember", "fern", "finch", "flint", "gecko", "ginger",
    "goose", "hazel", "heron", "holly", "ibis", "iris", "jade", "koala",
    "larch", "lemon", "lilac", "lotus", "mango", "maple", "newt", "oak",
    "olive", "onyx", "otter", "pearl", "quail", "raven", "tulip", "zebra",
)  # fmt: skip
