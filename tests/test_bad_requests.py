"""The same bad requests on every route: each is refused by the field's name, and the server goes on."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest

from nemobuild.errors import UsageError
from nemobuild.triton.client import stream
from tests.bad_requests import BAD, BAD_FOR_TRITON, as_openai
from tests.gateway_road import HI, MODEL, OFF_ANSWER, served, write_road

pytestmark = pytest.mark.xdist_group("triton")


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    with served(write_road(tmp_path_factory.mktemp("road"), 4000), tmp_path_factory.mktemp("logs")) as road:
        yield road
        fields = {"messages": json.dumps(HI), "reasoning_mode": "off"}
        text = "".join(r["text_output"] for r in stream(road.triton.grpc_url, fields, timeout_s=60))
        assert text == OFF_ANSWER  # after all of it, the server still answers


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_list_is_long_enough():
    assert len({json.dumps(fields) for fields, _ in BAD}) == len(BAD) >= 60


@pytest.mark.parametrize(("fields", "named"), BAD + BAD_FOR_TRITON)
def test_over_grpc(road, fields, named):
    with pytest.raises(UsageError) as refused:
        list(stream(road.triton.grpc_url, fields, timeout_s=60))
    assert refused.value.why.startswith(f"{named}: ")


@pytest.mark.parametrize(("fields", "named"), BAD + BAD_FOR_TRITON)
def test_over_generate(road, fields, named):
    status, text = post(f"{road.triton.http_url}/v2/models/chat/generate", {"stream": False, **fields})
    assert status == 400 and f"{named}: " in json.loads(text)["error"]


@pytest.mark.parametrize(("fields", "named"), BAD)
@pytest.mark.parametrize("streamed", [False, True])
def test_over_the_gateway(road, fields, named, streamed):
    path, body, param = as_openai(fields, named)
    status, text = post(road.url + path, {"model": MODEL, "stream": streamed, **body})
    error = json.loads(text)["error"]
    assert status == 400 and error["param"] == param and error["message"].startswith(f"{param}: ")
    assert error["type"] == "invalid_request_error"
