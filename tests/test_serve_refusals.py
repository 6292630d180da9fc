"""What a server refuses: always one clear error in OpenAI's form, with the right status, and it goes on."""

import socket

import httpx
import openai
import pytest
from served import BAD, QUESTION, ROWS, ask, asking, post, rows, user

from xblip.errors import InputError
from xblip.serve import COMPLETIONS
from xblip.serve_schema import parse

LONG_TALK = [turn for _ in range(9) for turn in ({"role": "assistant", "content": "b"}, *user(ROWS, "a"))]


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b"\xff\xfe{", 400, "The body is no JSON"),
        (b'{"model": "toys", "messages": [{"role": "user", "content": "\xff"}]}', 400, "The body is no JSON"),
        (b"[]", 400, "The request"),
        ({}, 400, "model: Field required"),
        ({**BAD, "model": "gpt-9"}, 404, 'The model "gpt-9" is not served here, but "toys" is'),
        ({**BAD, "messages": []}, 400, "messages: "),
        ({**BAD, "max_tokens": -1}, 400, "max_tokens: "),
        ({**BAD, "max_tokens": 2, "max_completion_tokens": 3}, 400, "differ: give one of them"),
        ({**BAD, "temperature": "hot"}, 400, "temperature: "),
        ({**BAD, "temprature": 1}, 400, 'Unknown setting "temprature". Did you mean "temperature"?'),
        ({**BAD, "a" * 50_000: 1}, 400, f'Unknown setting "{"a" * 80}...".'),
        ({**BAD, "tools": [{}]}, 400, 'Unknown setting "tools".'),
        ({**BAD, "messages": [{**user("a")[0], "nmae": "b"}]}, 400, '"messages[0].nmae". Did you mean "name"?'),
        ({**BAD, "stop": 5}, 400, "stop: Input should be a valid string, or a valid array."),
        ({**BAD, "messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content: Input should be a"),
        (asking("a", 5), 400, "messages[0].content[1]: Input should be an object."),
        ({**BAD, "stop": ["a", 5]}, 400, "stop[1]: Input should be a valid string"),
        ({**BAD, "metadata": {"a": 5}}, 400, "metadata: Input should be a valid string"),
        ({**BAD, "messages": [{"content": 5}, {"role": "x"}]}, 400, "messages[0].role: Field required"),
        ({**BAD, "frequency_penalty": 0.5}, 400, "frequency_penalty is not done here"),
        ({**BAD, "stop": "x" * 1_001}, 400, "stop: String should have at most 1000 characters"),
        ({**BAD, "top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
        ({**BAD, "stream_options": {}}, 400, "stream_options needs stream"),
        ({**BAD, "response_format": {"type": "json_object"}}, 400, "response_format.type"),
        ({**BAD, "n": 1000}, 400, "n: "),
        ({**BAD, "temperature": 1e-40}, 400, "temperature must be 0 or at least 1e-06"),
        ({**BAD, "repetition_penalty": 1e-40}, 400, "repetition_penalty: Input should be greater than or equal to 0.000001"),
        ({**BAD, "num_beams": 2, "logprobs": True}, 400, "logprobs are not told of beams"),
        ({**BAD, "messages": [{"role": "user", "content": [0] * 9_000}]}, 400, "messages[0].content[0]: Input should be"),
        ({**BAD, "stop": [0] * 9_000}, 400, "stop[0]: Input should be a valid string."),
        ({**BAD, **{f"a{number}": 1 for number in range(5_000)}}, 400, 'Unknown setting "a0".'),
        (b"[" + b"0," * 49_000 + b"0]", 400, "The request: "),
        (asking(*"aaaaaaa", "a" * 50_000), 400, "messages: the texts have 50007 characters, and "),
        ({**BAD, "messages": [*user(ROWS, "a"), *LONG_TALK]}, 400,
         "messages: there are 10 inputs in all, and 8 are allowed"),
        ({**BAD, "stop": ["a"] * 9}, 400, "stop has 9 texts, and 4 are allowed"),
        ({**BAD, "max_tokens": 10**9}, 400, "The prompt is too long for the LLM"),
        (asking(*"aaaaaaaaa"), 400, "messages[0].content has 9 parts, and 8 are allowed"),
        ({**BAD, "messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
        ({**BAD, "messages": [{"role": "assistant", "content": "x"}]}, 400, "user and assistant take turns"),
        ({**BAD, "messages": [{"role": "user", "content": None}]}, 400, "messages[0].content is missing"),
        (asking(ROWS), 400, "the last has no text, which would be the question"),
        (asking("  "), 400, "instruction"),
        ({**BAD, "messages": [*user("a"), {**user(ROWS)[0], "role": "assistant"}]}, 400, "only messages of role"),
        (asking({"type": "rows_ulr", "rows_ulr": {}}, QUESTION), 400, 'Did you mean "rows_url"?'),
        (asking({"type": "pictures_url"}, QUESTION), 400, 'the unknown type "pictures_url"'),
        (asking({"type": "rows_url", "rows_url": {}}, QUESTION), 400, 'must be {"url": "data:'),
        (asking(rows("data:,1"), QUESTION), 400, "base64"),
        (asking({"type": "input_rows", "input_rows": {"data": "@@@"}}, QUESTION), 400, "base64"),
        (asking(rows(b"1 " * 1500), QUESTION), 400, "larger than"),
        (asking(rows(b"red"), QUESTION), 400, "Cannot read"),
        (asking(rows("file:///etc/passwd"), QUESTION), 400, "reads no files of its own"),
        (asking(rows("http://10.0.0.1/a.txt"), QUESTION), 400, "Cannot fetch"),
        (asking(rows(b"die"), QUESTION), 400, "the process that read it died"),
        (asking(rows(b"sleep 9"), QUESTION), 400, "within the 1 s"),
        (asking("a" * 200_000), 413, "The body is larger than the 100000 bytes"),
    ],
)  # fmt: skip
def test_bad_input_has_one_clear_error_in_openai_s_form(served, client, body, status, message):
    response = post(served, body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text and "/tmp" not in response.text
    assert ask(client, QUESTION).choices[0].message.content, "it goes on"


def test_a_part_that_is_wrong_is_named(served):
    bad = rows(b"red")
    error = post(served, asking(ROWS, bad, QUESTION)).json()["error"]
    assert error["param"] == "messages[0].content[1].rows_url" and error["param"] in error["message"]


@pytest.mark.parametrize("empty", [None, [], {}])
def test_what_is_empty_asks_for_nothing(served, empty):
    """Clients send all that they know of, and messages as they came."""
    [asked] = user({**ROWS, "cache_control": empty}, QUESTION)
    messages = [asked, {"role": "assistant", "content": "a", "annotations": empty}, *user(QUESTION)]
    response = post(served, {**BAD, "messages": messages, "tools": empty, "logit_bias": empty})
    assert response.status_code == 200, response.text


def test_a_refusal_leaves_the_connection_open_and_the_log_without_tracebacks(served, caplog):
    with httpx.Client(base_url=served.url) as http:
        for _ in range(3):
            assert http.get("/v1/models/other").status_code == 404
            assert http.post("/nope", json=BAD).status_code == 404
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", "localhost.evil.example", "a:b:c.d"])
def test_who_is_asked_by_a_name_of_others_refuses(served, host):
    """A site may have its name lead to this machine, and its pages are then of one origin with the server."""
    for response in (post(served, BAD, Host=host), httpx.get(f"{served.url}/v1/models", headers={"Host": host})):
        assert response.status_code == 403 and "start it with an API key" in response.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "box", "box.local:80"])
def test_names_of_the_machine_and_its_network_are_its_own(served, host):
    assert post(served, BAD, Host=host).status_code == 200


@pytest.mark.parametrize("site, status", [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)])
def test_pages_of_other_sites_ask_nothing(served, site, status):
    headers = {"Sec-Fetch-Site": site, "Content-Type": "text/plain"}
    assert post(served, BAD, **headers).status_code == status


def test_a_declared_length_is_believed_before_anything_is_read(served):
    lines = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(served.url).port)) as own:
        own.sendall(lines.encode())
        assert b"413" in own.recv(1000)


def test_errors_are_the_client_s_exceptions(served, client):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=user(QUESTION))
    with pytest.raises(openai.BadRequestError, match="Cannot read"):
        ask(client, rows(b"red"), QUESTION)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert post(served, BAD).status_code == 200
    for path, status in (("/nope", 404), (COMPLETIONS, 405)):
        response = httpx.get(served.url + path)
        assert response.status_code == status and response.json()["error"]["type"] == "invalid_request_error"


NESTED = b"[" * 180 + b"]" * 180


@pytest.mark.parametrize("body", [b"0," * 100_001, NESTED * 600, (b'{"a":' * 180 + b"0" + b"}" * 180) * 600])
def test_more_values_than_a_request_has_are_refused_before_they_are_read(body):
    with pytest.raises(InputError, match="The body has more than 100000 commas and opening brackets, and so too many"):
        parse(b"[" + body + b"0]")


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_no_page_loads_programs_from_elsewhere(served, path):
    assert httpx.get(served.url + path).status_code == 404
