"""`/v1/streams/{stream_id}`: reads a resumable stream on, or ends it."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from max_ray.serve.api.respond import respond
from max_ray.serve.api.streams.stream_table import StreamTable

LAST_EVENT_ID = "last-event-id"


def add_stream_routes(api: FastAPI, streams: StreamTable) -> None:
    """Adds the routes.

    Args:
        api: The application.
        streams: Of this replica.
    """

    @api.get("/v1/streams/{stream_id}")
    async def resume_stream(request: Request, stream_id: str) -> Response:
        """An EventSource that connects again has the last id in a header, and `from` is what its URL said before."""
        last_id = request.headers.get(LAST_EVENT_ID) or request.query_params.get("from")
        answer = await streams.resume(stream_id, last_id)
        return await respond(request, answer, is_streamed=True)

    @api.delete("/v1/streams/{stream_id}")
    async def end_stream(stream_id: str) -> Response:
        await streams.end(stream_id)
        return JSONResponse({"id": stream_id, "object": "stream", "deleted": True})
