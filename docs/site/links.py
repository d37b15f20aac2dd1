"""MkDocs hook: links that lead out of docs/ go to the repository, since only docs/ is on the site."""

import re
from typing import Any

OUT = re.compile(r"\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """`](../X)` -> the repository's page of X; every page lies directly in docs/."""
    return OUT.sub(rf"]({config.repo_url}/blob/main/\1)", markdown)
