"""Values out of range: an error that names the key, what was given and what is expected."""

import re
from urllib.parse import urlsplit


def require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}: got {value!r}; expected {expected}")


def require_url(name: str, url: str | None) -> None:
    """The address of an endpoint, or None."""
    parts = urlsplit(url or "http://host")
    known = parts.scheme in ("http", "https") and bool(parts.hostname)
    require(known, name, url, "http://... or https://...")
    # Both would be stored with the configuration.
    if parts.username or parts.query or parts.fragment:
        raise ValueError(f"{name}: expected no user, password or query in it")


def require_variable(name: str, variable: str | None) -> None:
    """The name of an environment variable that holds a key, or None."""
    if variable is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", variable):
        raise ValueError(
            f"{name}: expected the name of an environment variable, in capitals; not the key"
        )
