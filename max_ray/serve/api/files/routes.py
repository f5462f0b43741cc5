"""The routes below `/v1/files`: upload as a form, list, read, delete."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from max_ray.errors import InputError, quoted
from max_ray.serve.api.batches.store import BatchStore
from max_ray.serve.api.body_reader import Upload, announced_bytes, stop_reading_ahead
from max_ray.serve.api.files.directory import MAX_FILE_BYTES
from max_ray.serve.api.files.multipart import FormEvent, MultipartReader, PartBegin
from max_ray.serve.api.objects.files import DeletedFile, FileObject
from max_ray.serve.api.objects.page import ItemT, Page
from max_ray.serve.api.scope import CLIENT_CLOSED
from max_ray.serve.api.sse import EventStream

MAX_LISTED = 10_000
SHORTEST_S, LONGEST_S = 3600, 30 * 24 * 3600
"""Seconds that `expires_after` may give, as of the OpenAI API."""
_FORM_BYTES = 64 * 1024
"""Of a form besides its file."""
_MAX_FIELD_BYTES = 1024
_PIECE_BYTES = 2**20
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_LIST_FIELDS = ("after", "limit", "order", "purpose")


class FilesOffError(InputError):
    """The server keeps no files."""

    http_status = 404


def required(store: BatchStore | None) -> BatchStore:
    """The store. Raises FilesOffError where the server has none."""
    if store is None:
        raise FilesOffError("This server keeps no files and runs no batches: have it started with --files-dir FOLDER.")
    return store


def add_file_routes(api: FastAPI, store: BatchStore | None, body_timeout_s: float) -> None:
    """Adds the routes below `/v1/files` to an application.

    Args:
        api: The application.
        store: Keeps the files; None: every route says that there are none.
        body_timeout_s: Seconds for an upload, besides one for each 64 KiB.
    """
    get = partial(api.api_route, methods=["GET", "HEAD"])

    @api.post("/v1/files")
    async def upload(request: Request) -> Response:
        try:
            return JSONResponse(await _uploaded(required(store), request, body_timeout_s))
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)

    @get("/v1/files")
    async def list_files(request: Request) -> Response:
        query = checked_query(request, _LIST_FIELDS)
        files = await required(store).files()
        if "purpose" in query:
            files = [file for file in files if file["purpose"] == query["purpose"]]
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InputError("order must be 'asc' or 'desc'.", param="order")
        return JSONResponse(page_of(files if order == "asc" else files[::-1], query, MAX_LISTED, MAX_LISTED))

    @get("/v1/files/{file_id}")
    async def show(file_id: str) -> Response:
        return JSONResponse(await required(store).find_file(file_id))

    @api.delete("/v1/files/{file_id}")
    async def delete(file_id: str) -> Response:
        await required(store).delete_file(file_id)
        answer: DeletedFile = {"id": file_id, "object": "file", "deleted": True}
        return JSONResponse(answer)

    @get("/v1/files/{file_id}/content")
    async def content(file_id: str, request: Request) -> Response:
        size = (await required(store).find_file(file_id))["bytes"]
        if request.method == "HEAD":
            return Response(headers={"Content-Length": str(size)}, media_type="application/octet-stream")
        pieces = _content(required(store), file_id, size)
        response = EventStream(pieces, lambda: None, "application/octet-stream")
        response.headers["content-length"] = str(size)
        return response


async def _content(store: BatchStore, file_id: str, size: int) -> AsyncGenerator[bytes]:
    for offset in range(0, size, _PIECE_BYTES):
        yield await store.read_file(file_id, offset, _PIECE_BYTES)


async def _uploaded(store: BatchStore, request: Request, body_timeout_s: float) -> FileObject:
    """The object of the file in a form. Raises InputError, HTTPException, ClientDisconnect."""
    limit = MAX_FILE_BYTES + _FORM_BYTES
    announced_bytes(request, limit)
    reader = MultipartReader(request.headers.get("content-type", ""))
    stop_reading_ahead(request.receive)
    body = Upload(request.receive, limit, body_timeout_s)
    form = _Form(store)
    try:
        while not body.is_complete:
            await body.read_piece()
            for event in reader.feed(body.taken()):
                await form.take(event)
        reader.end()
        return await form.completed()
    finally:
        await form.close()


class _Form:
    """The fields of an upload as they arrive; the file goes on to the store in pieces.

    Args:
        store: Keeps the file.
    """

    def __init__(self, store: BatchStore) -> None:
        self._store = store
        self._fields: dict[str, bytes] = {}
        self._field = ""
        self._file_id: str | None = None
        self._piece = bytearray()
        self._is_complete = False

    async def take(self, event: FormEvent) -> None:
        """Raises InputError."""
        if isinstance(event, PartBegin):
            await self._begin(event)
        elif self._field == "file":
            self._piece += event.data
            if len(self._piece) >= _PIECE_BYTES:
                await self._send()
        else:
            self._fields[self._field] += event.data
            if len(self._fields[self._field]) > _MAX_FIELD_BYTES:
                raise InputError(f"The field {self._field!r} is too long.", param=self._field)

    async def completed(self) -> FileObject:
        """The file's object. Raises InputError."""
        if self._file_id is None:
            raise InputError("The form has no file: send it as the field 'file'.", param="file")
        fields = {name: value.decode(errors="replace") for name, value in self._fields.items()}
        if fields.get("purpose") != "batch":
            raise InputError("purpose must be 'batch': files are for nothing else here.", param="purpose")
        expires = _expires_after(fields)
        await self._send()
        file = await self._store.complete_upload(self._file_id, "batch", expires)
        self._is_complete = True
        return file

    async def close(self) -> None:
        """Forgets a file that is not complete."""
        if self._file_id is not None and not self._is_complete:
            await self._store.abort_upload(self._file_id)

    async def _begin(self, part: PartBegin) -> None:
        if part.name not in ("file", *_FIELDS):
            raise InputError(
                f"Unknown field {quoted(part.name)}: there are file, {', '.join(_FIELDS)}.",
                param=quoted(part.name)[1:-1],
            )
        if part.name in self._fields or (part.name == "file" and self._file_id is not None):
            raise InputError(f"The field {part.name!r} is given twice.", param=part.name)
        self._field = part.name
        if part.name != "file":
            self._fields[part.name] = b""
        elif part.filename is None:
            raise InputError("The field 'file' must be a file, with a filename.", param="file")
        else:
            self._file_id = await self._store.begin_upload(part.filename)

    async def _send(self) -> None:
        assert self._file_id is not None, "a piece of a file that has begun"
        if self._piece:
            piece, self._piece = bytes(self._piece), bytearray()
            await self._store.append_upload(self._file_id, piece)


def _expires_after(fields: Mapping[str, str]) -> int | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InputError("expires_after[anchor] must be 'created_at'.", param="expires_after[anchor]")
    if not (seconds or "").isdecimal() or not SHORTEST_S <= int((seconds or "0")[:9]) <= LONGEST_S:
        raise InputError(
            f"expires_after[seconds] must be a number from {SHORTEST_S} to {LONGEST_S}.", param="expires_after[seconds]"
        )
    return int(seconds or "0")


def checked_query(request: Request, known: tuple[str, ...]) -> dict[str, str]:
    """The parameters of a query. Raises InputError for an unknown one."""
    query = dict(request.query_params)
    for name in query:
        if name not in known:
            raise InputError(
                f"Unknown parameter {quoted(name)}: there are {', '.join(known)}.", param=quoted(name)[1:-1]
            )
    return query


def page_of(items: Sequence[ItemT], query: Mapping[str, str], default: int, most: int) -> Page[ItemT]:
    """OpenAI's list object of a page.

    Args:
        items: All of them, in order.
        query: `after`: the id of the item before the page. `limit`: how many the page has.
        default: The limit where none is given.
        most: The highest limit.

    Raises:
        InputError: A parameter is out of range.
    """
    limit = query.get("limit", str(default))
    if not limit.isdecimal() or not 1 <= int(limit[:9]) <= most:
        raise InputError(f"limit must be a number from 1 to {most}.", param="limit")
    ids = [item["id"] for item in items]
    if "after" in query and query["after"] not in ids:
        raise InputError(f"There is no item {quoted(query['after'])}.", param="after")
    begin = ids.index(query["after"]) + 1 if "after" in query else 0
    page = list(items[begin : begin + int(limit)])
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": begin + len(page) < len(items),
    }
