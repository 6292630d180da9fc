"""The page of a server, by Gradio: an upload for each modality that the model has, a conversation, examples.

It is made from the model's branches, so that another modality has its upload with nothing to write. Gradio carries files and
shows them, and reads none: what is read goes to the server's workers, since a visitor's file may be hostile.
"""

import glob
import mimetypes
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr
from fastapi.responses import RedirectResponse, Response
from gradio.data_classes import FileData
from gradio.processing_utils import move_files_to_cache, save_file_to_cache
from gradio.route_utils import XSS_SAFE_MIMETYPES

from xblip.errors import InputError, MediaError, XBlipError
from xblip.records import raw_records, read_record
from xblip.sample import Media, media_of
from xblip.serve_gate import Gate
from xblip.serve_talk import Exchange, Given, answers

if TYPE_CHECKING:
    from xblip.serve import Server

PATH = "/ui"
KEPT_SECONDS = 3600
"""How long a visitor's file stays."""
SWEPT_SECONDS = 300
CACHE = "GRADIO_TEMP_DIR"
PREVIEW = ".preview"
ASK, STOP = "Ask", "Stop"
VIEWERS = {viewer.__name__.lower(): viewer for viewer in (gr.Image, gr.Audio, gr.Video)}
"""What shows files, by the first part of their MIME type."""
SETTINGS = {
    gr.Image: {"height": 150, "buttons": ["fullscreen"]},
    gr.Audio: {"buttons": []},
    gr.Video: {"height": 150, "autoplay": True, "loop": True, "buttons": []},
}
CSS = """
.gradio-container {max-width: 1280px !important; margin: 0 auto}
footer {display: none !important}
#head h1 {font-size: 1.4rem; font-weight: 600; margin: 0} #head p {opacity: .75; margin: 2px 0 0}
#uploads {gap: 10px; align-items: start} .upload {gap: 6px} .wrong {font-size: .9rem; padding: 4px 8px}
.upload .icon-wrap {display: none} .upload button .wrap {font-size: .85rem; line-height: 1.3}
[aria-label="Share"] {display: none}
#talk .message img, #talk .message video {max-height: 130px; width: auto; border-radius: 8px}
#examples button {font-size: .85rem}
"""
WORDS = "Give it files and ask about them together. What was given stays in the conversation until a new one begins."
THEME = {"primary_hue": "teal", "neutral_hue": "slate", "font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}


class Example(NamedTuple):
    """A question to try a model on, and files by modality."""

    question: str
    files: dict[str, list[str]]


def add_page(server: "Server", *, examples: Path | None = None) -> None:
    """Adds the page to a server's application, at `PATH`, to which `/` leads.

    Uploads lie in a folder of their own, which goes when the server ends.

    Args:
      server: that answers.
      examples: a manifest of questions to try its model on, see `xblip.plugins.examples`.

    Raises:
      InputError, ConfigError: the examples are none.
    """
    asked = read_examples(examples, server.model.branches) if examples else []
    folder = Path(tempfile.mkdtemp(prefix="xblip-page-"))
    server.exits.callback(shutil.rmtree, folder, ignore_errors=True)
    os.environ[CACHE] = str(folder)
    page = build(server, asked)
    page.has_launched = True  # else Gradio, mounted, believes whatever path a visitor names
    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = partial(
            _only_uploaded, folder, block.async_move_resource_to_block_cache
        )
    gr.mount_gradio_app(
        server.app,
        page,
        PATH,
        show_error=False,
        max_file_size=server.config.max_part_bytes,
        footer_links=[],
        run_history=False,
        mcp_server=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        theme=gr.themes.Soft(**THEME),
        css=CSS,
    )
    mount = server.app.routes[-1]
    server.leaving.callback(mount.app.stop_event.set)  # which ends the heartbeats of pages that are open
    mount.app = Gate(mount.app, server, folder)
    for own in ("/", "/manifest.json", "/favicon.ico"):  # Gradio's page looks for these there, wherever it is
        server.app.add_route(own, _leads_to(f"{PATH}{own}"), include_in_schema=False)


def _leads_to(url: str) -> Callable[[Any], Response]:
    return lambda _: RedirectResponse(url)


def read_examples(manifest: Path, modalities: Collection[str]) -> list[Example]:
    """Reads questions to try a model on: rows with `question` and inputs, as `xblip.sample.media_of` takes them.

    Raises:
      InputError, ConfigError: they are no such rows.
    """
    found = []
    for raw in raw_records(manifest):
        origin, row, _ = read_record(manifest, raw)
        if not isinstance(row.get("question"), str):
            raise InputError(
                f"{origin}: an example of a model has a `question`; this has {', '.join(row) or 'nothing'}."
            )
        files: dict[str, list[str]] = {}
        for part in media_of(row, modalities=modalities, root=manifest.parent):
            if isinstance(part, Media):
                files.setdefault(part.modality, []).append(str(part.source))
        found.append(Example(row["question"], files))
    return found


def build(server: "Server", examples: Sequence[Example]) -> gr.Blocks:
    """Returns the page; files that Gradio keeps lie where its environment says when this is called."""
    names = [*server.model.branches]
    kept = (SWEPT_SECONDS, KEPT_SECONDS)
    with gr.Blocks(title=f"{server.name} · xblip", analytics_enabled=False, delete_cache=kept) as page:
        gr.Markdown(f"# {server.name}\n\n{WORDS}", elem_id="head")
        exchanges = gr.State([], time_to_live=KEPT_SECONDS)
        with gr.Row():
            with gr.Column(scale=5, min_width=300), gr.Row(elem_id="uploads"):
                uploads = [_upload(server, name) for name in names]
            with gr.Column(scale=6, min_width=300):
                talk = gr.Chatbot(
                    show_label=False, height=430, elem_id="talk", buttons=["copy"], allow_file_downloads=False,
                    feedback_options=None, placeholder="Answers stand here.",
                )  # fmt: skip
                question = gr.Textbox(
                    show_label=False, placeholder="A question about the files", submit_btn=ASK, elem_id="question",
                    max_lines=6, autofocus=True,
                )  # fmt: skip
                with gr.Row():
                    new = gr.Button("New conversation", size="sm", elem_id="new", scale=0, min_width=160)
                if examples:
                    _show_examples(examples, names, question, uploads)

        async def ask(request: gr.Request, text: str, done: list[Exchange], *given: list[str] | None):
            if not text.strip():
                gr.Warning("Write a question first.")
                return
            files = [Given(name, Path(path)) for name, paths in zip(names, given, strict=True) for path in paths or ()]
            exchange = Exchange(text, tuple(files))
            caller, earlier = server.caller(request.request), [*done]
            done.append(exchange)  # in place: what was said of an answer that is stopped stays, and can be gone on from
            asked = {question: gr.Textbox("", submit_btn=False, stop_btn=STOP), **dict.fromkeys(uploads)}
            yield {talk: _messages(done), **asked}
            async for _ in answers(server, exchange, earlier, caller=caller, path=PATH):
                yield {talk: _messages(done)}
            again = {question: _idle(value=text), **dict(zip(uploads, given, strict=True))}
            yield {talk: _messages(done), **(again if exchange.error else {question: _idle()})}

        def forget():
            return {exchanges: [], talk: [], question: _idle(value=""), **dict.fromkeys(uploads)}

        common = {"api_visibility": "private", "show_progress": "hidden"}
        asking = question.submit(
            ask, [question, exchanges, *uploads], [talk, question, *uploads],
            concurrency_limit=None, **common | {"show_progress": "minimal", "show_progress_on": talk},
        )  # fmt: skip
        question.stop(_idle, None, question, cancels=asking, **common)
        for begin in (new.click, talk.clear):
            begin(forget, None, [exchanges, talk, question, *uploads], cancels=asking, **common)
        page.queue(max_size=server.config.max_requests, default_concurrency_limit=None, api_open=False)
    return page


def _upload(server: "Server", name: str) -> gr.File:
    """An upload for a modality, and below it what shows the files."""
    modality = server.model.branches[name].modality
    with gr.Column(min_width=220, elem_classes="upload"):
        upload = gr.File(
            label=name.replace("_", " ").capitalize(),
            file_count="multiple",
            file_types=[*modality.suffixes] or None,
            height=104,
            elem_id=f"upload-{name}",
        )

        @gr.render(inputs=upload, show_progress="hidden", concurrency_limit=None)
        def show(paths: list[str] | None) -> None:
            for path in map(Path, paths or ()):
                try:
                    _show(preview(server, name, path))
                except XBlipError as error:
                    gr.Markdown(str(error), elem_classes="wrong")

    return upload


async def _only_uploaded(folder: Path, move: Callable[[Any], Awaitable[Any]], path: str | Path | None) -> str | None:
    """Lets Gradio take what was uploaded; it else takes any file, and fetches any URL, that a visitor names."""
    if path is not None and not Path(path).resolve().is_relative_to(folder):
        raise gr.Error("Upload the file: this page takes nothing else.", print_exception=False)
    return await move(path)


def preview(server: "Server", name: str, path: Path) -> Path:
    """Has a visitor's file read by a worker; returns the file that shows it: itself, or what its modality made of it.

    Raises:
      MediaError: it cannot be read.
    """
    try:
        tensors = server.pool.load(name, path)
    except MediaError as error:
        raise MediaError(str(error).replace(str(path), path.name)) from None
    made = server.model.branches[name].modality.preview(tensors)
    if made is None:
        return path
    shown = path.with_name(f"{path.name}{PREVIEW}{made[0]}")
    shown.write_bytes(made[1])
    return shown


def _shown(path: Path) -> Path:
    """The preview of a file that was made already, or the file itself."""
    return next(path.parent.glob(f"{glob.escape(path.name)}{PREVIEW}.*"), path)


def _show(path: Path) -> None:
    """Adds what shows a file, if browsers show such; its name stands in the upload anyway."""
    mime_type = mimetypes.guess_type(path.name)[0] or ""
    viewer = VIEWERS.get(mime_type.partition("/")[0])
    if viewer is None or mime_type not in XSS_SAFE_MIMETYPES:
        return
    shown = viewer(show_label=False, interactive=False, elem_classes="preview", **SETTINGS.get(viewer, {}))
    # Given when it is made, it would be read, and converted with what the machine has for that.
    file = FileData(path=str(path), orig_name=path.name, mime_type=mime_type)
    shown.value = move_files_to_cache(file.model_dump(), shown, postprocess=True)


def _show_examples(
    examples: Sequence[Example], names: Sequence[str], question: gr.Textbox, uploads: Sequence[gr.File]
) -> None:
    """Adds examples to choose from, each of which fills in the question and the files."""
    samples = [[f"{one.question} ({', '.join(one.files)})".replace("_", " ")] for one in examples]
    shown = gr.Dataset(
        label="Examples", components=[gr.Textbox(visible=False)], samples=samples, type="index",
        samples_per_page=6, layout="gallery", elem_id="examples",
    )  # fmt: skip

    def fill(index: int):
        files = examples[index].files
        own = [
            [save_file_to_cache(file, cache_dir=os.environ[CACHE]) for file in files.get(name, ())] for name in names
        ]
        return [examples[index].question, *own]

    shown.click(fill, shown, [question, *uploads], api_visibility="private", show_progress="hidden")


def _idle(**text: str) -> gr.Textbox:
    return gr.Textbox(submit_btn=ASK, stop_btn=False, **text)


def _messages(exchanges: Sequence[Exchange]) -> list[dict[str, Any]]:
    """A conversation as Gradio shows it."""
    found: list[dict[str, Any]] = []
    for one in exchanges:
        for given in one.files:  # which may not be shown, where they were refused
            content = given.path.name if one.error else {"path": str(_shown(given.path))}
            found.append({"role": "user", "content": content})
        found.append({"role": "user", "content": one.question})
        if one.answer:
            found.append({"role": "assistant", "content": one.answer})
        if one.error:
            found.append({"role": "assistant", "content": one.error, "metadata": {"title": "Not answered"}})
    return found
