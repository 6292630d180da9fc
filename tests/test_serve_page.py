"""The page: made from a model's branches, and used in a browser as a visitor does."""

import base64
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from served import KEY, running
from visits import Visit, needs_a_browser, opened

from xblip import cli_serve
from xblip.errors import ConfigError, InputError
from xblip.serve_config import ServeConfig
from xblip.serve_page import PATH, Example, build, read_examples

FILE = ("a.txt", b"1 2 3 4")


def page_of(model, examples=()):
    """The config of a model's page, its components by their ids in it."""
    server = SimpleNamespace(model=model, name="toys", config=ServeConfig())
    config = build(server, examples).get_config_file()
    return config, {one["props"].get("elem_id"): one["props"] for one in config["components"]}


class TestMadeFromTheModel:
    def test_every_modality_has_its_upload_whatever_it_is(self, model):
        config, found = page_of(model)
        assert [name for name in found if name and name.startswith("upload-")] == ["upload-toy", "upload-beads"]
        assert found["upload-toy"]["label"] == "Toy" and found["upload-toy"]["file_types"] == [".txt"]
        assert found["upload-beads"]["file_count"] == "multiple"
        assert "examples" not in found and config["analytics_enabled"] is False

    def test_nothing_can_be_called_by_name(self, model):
        config, _ = page_of(model, [Example("what ?", {})])
        assert "public" not in {one["api_visibility"] for one in config["dependencies"]}

    def test_examples_are_questions_with_their_kinds_of_files(self, model):
        _, found = page_of(model, [Example("what ?", {"toy": ["a.txt"], "beads": ["b.txt"]})])
        assert found["examples"]["samples"] == [["what ? (toy, beads)"]]


def test_without_the_extra_it_is_said_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "xblip.serve_page")
    with pytest.raises(ConfigError, match=r"xblip serve --ui needs .*: pip install 'xblip\[ui\]'\. \(.*gradio"):
        cli_serve.serve("no-such-model", ui=True)


class TestExamples:
    def test_rows_are_questions_about_files_beside_the_manifest(self, tmp_path):
        rows = [{"question": "what ?", "media": [["toy", "a.txt"], "and", ["toy", "b.txt"]], "answer": "red"}]
        (tmp_path / "asked.json").write_text(json.dumps(rows))
        [found] = read_examples(tmp_path / "asked.json", ["toy"])
        assert found == Example("what ?", {"toy": [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]})

    @pytest.mark.parametrize(
        ("text", "error", "message"),
        [
            ('{"instruction": "what ?"}', InputError, "line 1: an example of a model has a `question`; .*instr"),
            ('{"question": "what ?", "media": [["tor", "a"]]}', InputError, 'Unknown modality "tor".*"toy"'),
            ("{", InputError, "line 1: not JSON"),
        ],
    )  # fmt: skip
    def test_what_is_none_is_refused(self, tmp_path, text, error, message):
        (tmp_path / "asked.jsonl").write_text(text)
        with pytest.raises(error, match=message):
            read_examples(tmp_path / "asked.jsonl", ["toy"])

    def test_a_manifest_that_is_not_there(self, tmp_path):
        with pytest.raises(ConfigError, match=r"Cannot read the manifest .*asked\.jsonl"):
            read_examples(tmp_path / "asked.jsonl", ["toy"])


@pytest.mark.slow
class TestBehindAKey:
    @pytest.fixture(scope="class")
    def locked(self, rows_model):
        with running(rows_model, ui=True, api_keys=[KEY], decode_workers=1, max_part_bytes=2_000) as found:
            yield found

    @pytest.fixture(scope="class")
    def visitor(self, locked):
        key = base64.b64encode(f":{KEY}".encode()).decode()
        headers = {"Authorization": f"Basic {key}"}
        with httpx.Client(base_url=f"{locked.url}{PATH}", headers=headers, timeout=30) as client:
            yield client

    def test_no_route_of_the_page_is_a_way_around_it(self, locked):
        routes = [route for route in locked.server.app.routes if getattr(route, "path", "") == PATH]
        inner = [*routes[0].app.app.openapi()["paths"]]
        assert "/gradio_api/upload" in inner and "/gradio_api/run/{api_name}" in inner
        for path in inner:
            for method in ("GET", "POST"):
                status = httpx.request(method, f"{locked.url}{PATH}{path}", content=b"{}").status_code
                assert status in (401, 404), (method, path, status)
        assert httpx.get(f"{locked.url}/", follow_redirects=True).status_code == 401

    def test_it_opens_with_the_key(self, locked, visitor):
        assert "toys" in visitor.get("/").text
        assert httpx.get(f"{locked.url}/").headers["location"] == f"{PATH}/"
        assert httpx.get(f"{locked.url}/v1/models", headers=visitor.headers).status_code == 200

    def test_only_uploads_are_given_out_and_no_larger_ones_taken(self, locked, visitor):
        [path] = visitor.post("/gradio_api/upload", files={"files": FILE}).json()
        assert visitor.get(f"/gradio_api/file={path}").content == b"1 2 3 4"
        for other in ("/etc/passwd", __file__, f"{path}/../../../../etc/passwd", "//etc/passwd", "."):
            assert visitor.get(f"/gradio_api/file={other}").status_code in (403, 404), other
        assert visitor.post("/gradio_api/upload", files={"files": ("a.txt", b"1 " * 1_001)}).status_code == 413

    @pytest.mark.parametrize("place", [0, 2])
    @pytest.mark.parametrize("more", [{}, {"is_stream": True}, {"url": "http://example.org/a.txt"}])
    @pytest.mark.parametrize("of", ["file", "http", "upward"])
    def test_a_visitor_s_word_for_a_file_is_not_believed(self, locked, visitor, tmp_path, place, more, of):
        (tmp_path / "own.txt").write_text("1 2 3 4")
        [folder] = {Path(path).parents[1] for path in visitor.post("/gradio_api/upload", files={"files": FILE}).json()}
        path = {
            "file": str(tmp_path / "own.txt"),
            "http": "http://example.org/a.txt",
            "upward": f"{folder}/../{tmp_path.relative_to(folder.parent)}/own.txt",
        }[of]
        file = {"path": path, "meta": {"_type": "gradio.FileData"}, **more}
        data = ["what is this ?", None, None, None]
        data[place] = [file] if place else file
        config = visitor.get("/config").json()
        [ask] = [one for one in config["dependencies"] if len(one["inputs"]) == 4 and one["cancels"] == []]
        event = {"data": data, "fn_index": ask["id"], "session_hash": "abc"}
        assert visitor.post("/gradio_api/queue/join", json=event).status_code == 200
        with visitor.stream("GET", "/gradio_api/queue/data", params={"session_hash": "abc"}) as told:
            lines = [json.loads(line[6:]) for line in told.iter_lines() if line.startswith("data: ")]
        [last] = [line for line in lines if line["msg"] == "process_completed"]
        if not more.get("is_stream"):  # which Gradio takes for the name of a stream
            assert not last["success"] and last["output"]["error"] in (
                None,
                "Upload the file: this page takes nothing else.",
            )
        assert locked.server.pool.counters.loads == 0 and not list(folder.rglob("own.txt"))

    @pytest.mark.parametrize("is_old", [True, False])
    def test_uploads_go_when_they_are_old_and_when_the_server_ends(self, rows_model, monkeypatch, is_old):
        monkeypatch.setattr("xblip.serve_page.SWEPT_SECONDS", 1)
        monkeypatch.setattr("xblip.serve_page.KEPT_SECONDS", 1 if is_old else 3600)
        with running(rows_model, ui=True, decode_workers=1) as served:
            [path] = httpx.post(f"{served.url}{PATH}/gradio_api/upload", files={"files": FILE}).json()
            assert Path(path).is_file()
            deadline = time.monotonic() + (20 if is_old else 2)
            while Path(path).exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            assert Path(path).exists() is not is_old
        assert not Path(path).exists() and not Path(path).parents[1].exists()


@pytest.mark.slow
@needs_a_browser
def test_a_fifth_modality_is_shown_and_asked_about(rows_model, tmp_path):
    """`rows` and `lines` are plugins of the tests alone; the server asks for a key here too."""
    with running(rows_model, ui=True, api_keys=[KEY], decode_workers=1) as served, opened() as browser:
        visit = Visit(browser, f"{served.url}/", http_credentials={"username": "me", "password": KEY})
        (tmp_path / "numbers.txt").write_text("1 2 3 4 4 3 2 1")
        visit.give("rows", tmp_path / "numbers.txt")
        expected = rows_model.ask("what is this ?", media=[("rows", tmp_path / "numbers.txt")]).text
        assert visit.ask("what is this ?") == expected
        visit.page.close()
