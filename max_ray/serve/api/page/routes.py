"""The routes of the page: `/`, and its files below `/page`. They need no key; what the page asks for does."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from starlette.exceptions import HTTPException

from max_ray.serve.api.page.assets import INDEX, Asset, assets

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def add_page(api: FastAPI) -> None:
    """Adds the page. Its links are relative, so it works below a route prefix."""
    get = partial(api.api_route, methods=["GET", "HEAD"])

    @get("/")
    async def page(request: Request) -> Response:
        raw_path: bytes = request.scope.get("raw_path") or b"/"
        if not raw_path.partition(b"?")[0].endswith(b"/"):  # relative links need the slash behind a prefix
            return RedirectResponse(raw_path.rpartition(b"/")[2].decode("latin-1") + "/")
        return _answer(request, assets()[INDEX])

    @get("/page/{name}")
    async def page_file(request: Request, name: str) -> Response:
        if name not in assets():
            raise HTTPException(404)
        return _answer(request, assets()[name])


def _answer(request: Request, asset: Asset) -> Response:
    """The file, or 304 where the browser has it."""
    headers = {**_HEADERS, "ETag": asset.etag}
    known = request.headers.get("if-none-match", "")
    if asset.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")) or known.strip() == "*":
        return Response(status_code=304, headers=headers)
    return Response(asset.content, headers=headers, media_type=asset.media_type)
