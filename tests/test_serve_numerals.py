"""The numerals model behind HTTP, asked by the official client about files of all four kinds; and by a thousand at once."""

import asyncio
import struct
import zlib

import httpx
import openai
import pytest
from served import data_url, post, running, user

import xblip
from xblip import plugins
from xblip.serve import COMPLETIONS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("numerals" not in plugins.installed(), reason="the bundle `numerals` is not installed"),
]
FILES = {"image": "six.png", "video": "seven.mp4", "audio": "four.wav", "point_cloud": "eight.ply"}
TYPES = {"image": "image/png", "video": "video/mp4", "audio": "audio/wav", "point_cloud": "application/octet-stream"}
CLIENTS = 1000


@pytest.fixture(scope="module")
def model():
    return xblip.load("numerals")


@pytest.fixture(scope="module")
def served(model):
    with running(model, "numerals") as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def demo():
    from xblip_numerals.demo import FOLDER

    return {name: FOLDER / name / file for name, file in FILES.items()}


def part(name, path):
    return {"type": f"{name}_url", f"{name}_url": {"url": data_url(path.read_bytes(), TYPES[name])}}


def asking(*content):
    return {"model": "numerals", "messages": user(*content)}


@pytest.mark.parametrize("names", [[name] for name in FILES] + [["image", "audio"], ["video", "point_cloud"], [*FILES]])
def test_all_four_modalities_plain_and_streamed(model, client, demo, names):
    question = "Which number is the largest?" if len(names) > 1 else f"Which number is in the {names[0]}?"
    expected = model.ask(question, media=[(name, demo[name]) for name in names], do_sample=False)
    given = {
        "model": "numerals",
        "messages": user(*(part(name, demo[name]) for name in names), question),
        "temperature": 0,
    }
    plain = client.chat.completions.create(**given)
    assert plain.choices[0].message.content == expected.text
    assert plain.usage.prompt_tokens == expected.num_prompt_tokens
    pieces = client.chat.completions.create(**given, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.text


def test_every_kind_s_broken_file_is_a_bad_request(client, demo):
    for name, path in demo.items():
        broken = {"type": f"{name}_url", f"{name}_url": {"url": data_url(path.read_bytes()[:100], TYPES[name])}}
        with pytest.raises(openai.BadRequestError, match=r"messages\[0\]\.content\[0\]"):
            client.chat.completions.create(**asking(broken, "Which number is it?"))


def test_ten_gigapixels_are_refused_by_their_header(served):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    response = post(served, asking({"type": "image_url", "image_url": {"url": data_url(data, "image/png")}}, "What?"))
    assert response.status_code == 400 and "pixels" in response.json()["error"]["message"], response.text


def test_ten_thousand_parts_are_refused(served):
    response = post(served, asking(*["a"] * 10_000))
    assert response.status_code == 400
    assert "messages[0].content has 10000 parts, and 64 are allowed" in response.json()["error"]["message"]


def test_a_thousand_clients_at_once(served, demo):
    body = {**asking(part("image", demo["image"]), "Which number is in the image?"), "temperature": 0}

    async def ask_all():
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(timeout=120, limits=limits) as http:
            return await asyncio.gather(*(http.post(served.url + COMPLETIONS, json=body) for _ in range(CLIENTS)))

    replies = asyncio.run(ask_all())
    assert len(replies) == CLIENTS and {reply.status_code for reply in replies} <= {200, 429}
    texts = {reply.json()["choices"][0]["message"]["content"] for reply in replies if reply.status_code == 200}
    assert len(texts) == 1
    for reply in replies:
        if reply.status_code == 429:
            assert reply.headers["Retry-After"] and reply.json()["error"]["type"] == "rate_limit_error"
    assert httpx.get(served.url + "/ready").status_code == 200
