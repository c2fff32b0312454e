"""The page at ``/``: a chat, and how the server is. Plain files, nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from fastapi.responses import Response

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/page/live.js": ("live.js", "text/javascript; charset=utf-8"),
}
"""Path to a file beside this one and what it is."""
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""The page runs its own scripts, speaks to its own server, and stands in nobody's frame."""


def page() -> APIRouter:
    """The routes of its files."""
    router = APIRouter(include_in_schema=False)
    for path, (name, kind) in FILES.items():
        content = resources.files(__name__).joinpath(name).read_bytes()
        answer = _Static(content, kind)
        router.add_api_route(path, answer.get, methods=["GET"])
    return router


class _Static:
    """A file that was read when the server started."""

    def __init__(self, content: bytes, kind: str) -> None:
        self._content, self._kind = content, kind

    async def get(self) -> Response:
        return Response(self._content, media_type=self._kind, headers=HEADERS)
