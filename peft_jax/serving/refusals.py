"""Errors as HTTP answers."""

import math

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from peft_jax.serving import answers
from peft_jax.serving.requests import Refused


def unknown(name: str) -> Refused:
    """A model that is not there."""
    return Refused(f"The model {name!r} is not served here.", status=404, param="model", code="model_not_found")


def refusal(refused: Refused) -> Response:
    """OpenAI's error, with what to do about it in the headers."""
    headers = {} if refused.retry_after is None else {"Retry-After": str(max(1, math.ceil(refused.retry_after)))}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(answers.error(refused), refused.status, headers)


async def on_refused(request: Request, error: Exception) -> Response:
    """What was refused on purpose."""
    assert isinstance(error, Refused)
    return refusal(error)


async def on_http(request: Request, error: Exception) -> Response:
    """No such path, or not by this method."""
    assert isinstance(error, HTTPException)
    what = {404: "does not exist", 405: f"does not take {request.method}"}.get(error.status_code, error.detail)
    answer = refusal(Refused(f"{request.url.path} {what}.", status=error.status_code))
    answer.headers.update(error.headers or {})
    return answer


async def on_error(request: Request, error: Exception) -> Response:
    """What nobody foresaw; Starlette raises it again, for the log."""
    return refusal(Refused(f"The server failed ({type(error).__name__}; see its log).", status=500))
