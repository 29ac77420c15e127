"""Identifiers of the generated tasks: files, columns, documents and fields bear these names.

Each is one token of the small tokenizer, so that copying an identifier is copying one symbol.
"""

NAMES: tuple[str, ...] = (
    "agate", "alder", "amber", "aspen", "basil", "birch", "camel", "cedar",
    "clove", "coral", "crane", "daisy", "eagle", "ember", "fern", "finch",
    "flint", "gecko", "ginger", "hazel", "heron", "iris", "jade", "larch",
    "lemon", "lotus", "maple", "oak", "olive", "pearl", "raven", "tulip",
)  # fmt: skip
