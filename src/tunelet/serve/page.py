"""The chat page: one HTML file that holds its style and script. Not for what it says (words.py)."""

from __future__ import annotations

import json
import secrets
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tunelet.serve import words

HERE = Path(__file__).parent


@lru_cache(1)
def _parts() -> tuple[Any, str, str]:
    import jinja2

    page, css, js = ((HERE / name).read_text(encoding="utf-8") for name in ("page.html.j2", "page.css", "page.js"))
    return jinja2.Environment(autoescape=True).from_string(page), css, js


def render(query: bytes, accepted: bytes) -> tuple[bytes, dict[str, str]]:
    """(the page, its headers). Nothing runs in it or is loaded by it but what it brings itself."""
    asked = parse_qs(query.decode("latin-1")).get("lang", [""])[0]
    lang = words.language(asked, accepted.decode("latin-1"))
    template, css, js = _parts()
    nonce = secrets.token_urlsafe(12)
    said = words.WORDS[lang]
    told = json.dumps(said, ensure_ascii=False).replace("<", "\\u003c")
    text = template.render(lang=lang, languages=words.LANGUAGES, words=said, told=told, nonce=nonce, css=css, js=js)
    allowed = f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
    allowed += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return text.encode(), {"Content-Security-Policy": allowed, "Referrer-Policy": "no-referrer"}
