"""Route /dashboard: a page that shows the running platform. It asks /admin/ps twice a second, and keeps what it saw itself. Chapter 11.

The page and what it is drawn with come from here and from nowhere else (its Content-Security-Policy says so), and hold nothing of anybody's: they are
given without a key, and the page asks its reader for one where /admin wants it. Looking wakes no model.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

FILES = {"/dashboard": ("page.html", "text/html"), "/dashboard/page.css": ("page.css", "text/css"), "/dashboard/page.js": ("page.js", "text/javascript")}
"""By path: the file here, and its type."""
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache",
}  # fmt: skip
router = APIRouter()


def _add(path: str, name: str, kind: str) -> None:
    data = (files(__name__) / name).read_bytes()

    @router.get(path, include_in_schema=False)
    async def answer() -> Response:
        return Response(data, media_type=kind, headers=_HEADERS)


for _path, (_name, _kind) in FILES.items():
    _add(_path, _name, _kind)
