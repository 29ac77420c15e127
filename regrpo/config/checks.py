"""Values out of range: an error that names the key, what was given and what is expected."""


def require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}: got {value!r}; expected {expected}")
