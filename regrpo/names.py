"""Identifiers of the generated tasks: files, columns, documents and fields bear these names.

Each is one token of the small tokenizer, so that copying an identifier is copying one symbol.
"""

NAMES: tuple[str, ...] = (
    "acorn", "agate", "alder", "amber", "anise", "apple", "aspen", "aster",
    "basil", "beech", "birch", "bison", "camel", "cedar", "cider", "clove",
    "cobra", "coral", "crane", "daisy", "dingo", "eagle", "egret", "ember",
    "fern", "finch", "flint", "fox", "gecko", "ginger", "goose", "grape",
    "hazel", "heron", "holly", "honey", "ibis", "iris", "ivory", "jade",
    "koala", "larch", "lemon", "lilac", "lotus", "mango", "maple", "moose",
    "newt", "oak", "olive", "onyx", "opal", "otter", "peach", "pearl",
    "pine", "quail", "quartz", "raven", "rose", "tiger", "tulip", "zebra",
)  # fmt: skip
