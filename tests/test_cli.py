"""The command line: inputs of installed plugins in their order, JSON for scripts, and one line for what is wrong."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kit import MODEL, NUMBERS, Site, make_branch
from transformers.utils import logging

import xblip
from xblip import cli, plugins
from xblip.model import XBlip
from xblip.testing import ModalityContract, small_qformer

FILES = {"a.txt": "1 2 3 4", "b.txt": "4 3 2 1 0 0 1 1", "bad.txt": "words, not numbers", "empty.txt": ""}


@pytest.fixture(scope="module")
def world(llm, tmp_path_factory):
    """Two installed modalities, a bundle over both, and some files."""
    root = tmp_path_factory.mktemp("cli")
    site = Site(root / "site")
    bar_was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # as `main` does for a process of its own
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site.folder)
        patch.setenv("XBLIP_PLUGINS", "touch,depth_map,broken_one,tiny_model")
        for name in ("touch", "depth_map"):
            site.install(name, NUMBERS.format(name=name))
        site.install("tiny_model", MODEL.format(folder=root / "bundle"))
        branches = {
            name: make_branch(plugins.get("modality", name), llm, seed=len(name)) for name in ("touch", "depth_map")
        }
        XBlip(llm=llm, branches=branches, generation={"max_new_tokens": 6}).eval().save_pretrained(root / "bundle")
        for name, text in FILES.items():
            (root / name).write_text(text)
        yield root
        site.close()
    if bar_was_on:
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model(world) -> XBlip:
    return xblip.load(world / "bundle")


@pytest.fixture
def run(world, monkeypatch, capsys):
    """Runs a command in this process, in the folder of the files; returns status, what it printed, and its errors."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("XBLIP_MODEL", "bundle")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, lines: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["xblip", *arguments])
        answers = iter(lines.splitlines())

        def read(prompt=""):
            try:
                return next(answers)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        return status, *capsys.readouterr()

    return run


def process(*arguments: str, cwd: Path, lines: str = "") -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(cwd / "site"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "XBLIP_MODEL": "bundle", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "xblip.cli", *arguments],
        cwd=cwd, env=environment, input=lines, capture_output=True, text=True, check=False,
    )  # fmt: skip


class TestAsk:
    def test_it_answers(self, run, model, world):
        status, out, err = run("ask", "what is this ?", "--touch", "a.txt")
        assert (status, out, err) == (0, model.ask("what is this ?", touch=world / "a.txt").text + "\n", "")

    def test_json_is_for_scripts(self, run, model, world):
        status, out, err = run("ask", "what is this ?", "--touch", "b.txt", "--json")
        answer = model.ask("what is this ?", touch=world / "b.txt")
        assert (status, err) == (0, "")
        assert json.loads(out) == {
            "answer": answer.text,
            "num_prompt_tokens": answer.num_prompt_tokens,
            "num_new_tokens": answer.num_new_tokens,
        }

    def test_inputs_keep_their_order_and_may_repeat(self, monkeypatch, run):
        seen = {}

        def ask(self, question, *, media, **options):
            seen.update(question=question, media=media, options=options)
            return xblip.Answer("yes", 1, 1)

        monkeypatch.setattr(XBlip, "ask", ask)
        inputs = ["--touch", "b.txt", "--depth-map", "a.txt", "--touch=a.txt"]
        media = [("touch", "b.txt"), ("depth_map", "a.txt"), ("touch", "a.txt")]
        for arguments in (
            ["ask", "which ?", *inputs],
            ["ask", *inputs, "which ?"],
            ["ask", *inputs[:2], "which ?", *inputs[2:]],
            [
                "ask",
                *inputs[:2],
                "--json",
                "which ?",
                *inputs[2:],
                "-m",
                "bundle",
                "max_new_tokens=3",
                "do_sample=false",
            ],
        ):
            assert run(*arguments)[0] == 0
            assert (seen["question"], seen["media"]) == ("which ?", media)
        assert seen["options"] == {"max_new_tokens": 3, "do_sample": False}

    def test_text_alone_and_options(self, run):
        status, out, _ = run("ask", "is 1=1 ?", "--json", "max_new_tokens=2")
        assert status == 0 and json.loads(out)["num_new_tokens"] <= 2

    def test_an_installed_bundle_is_found_by_name(self, run, model, world):
        _, out, _ = run("ask", "what ?", "--model", "tiny_model", "--touch", "a.txt")
        assert out == model.ask("what ?", touch=world / "a.txt").text + "\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["", "--touch", "a.txt"], "The instruction is empty"),
            (["what ?", "--touch", "none.txt"], "Cannot read touch 'none.txt': no such file"),
            (["what ?", "--touch", "."], "Cannot read touch '.': it is a folder"),
            (["what ?", "--touch", ""], "Cannot read touch ''"),
            (["what ?", "--touch", "empty.txt"], "Cannot read touch 'empty.txt': the file is empty"),
            (["what ?", "--touch", "bad.txt"], "Cannot read touch 'bad.txt': it is damaged or of another format"),
            (["what ?", "--touch"], '"--touch" needs a file after it'),
            (
                ["what ?", "--tuoch", "a.txt"],
                'No such option "--tuoch". Did you mean "--touch"?.*pip install xblip-tuoch',
            ),
            (["--tuoch", "a.txt", "what ?"], 'No such option "--tuoch". Did you mean "--touch"?'),
            (["what ?", "--josn"], 'No such option "--josn". Did you mean "--json"'),
            (["--josn", "what ?"], 'No such option "--josn". Did you mean "--json"'),
            (["what ?", "a.txt"], 'Do not know what to do with "a.txt": inputs are given as --modality FILE'),
            (["what ?", "max_new_token=3"], 'Unknown generation option "max_new_token". Did you mean "max_new_tokens"'),
            (["what ?", "max_new_tokens=many"], "max_new_tokens must be a whole number"),
            (["what ?", "max_new_tokens="], "max_new_tokens must be a whole number"),
            (["what ?", "streamer=x"], "streamer takes an object, which only Python can give"),
            (["what ?", "zzz=1"], r'Unknown generation option "zzz"\. They are those of transformers'),
            (["what ?", "--touch", "--depth-map", "a.txt"], '"--touch" needs a file after it'),
            (
                ["what ?", "--zzz", "1"],
                r'No such option "--zzz"\. Known: --depth-map, --explain, --help, --json, --model, --touch, -m\.',
            ),
            (["a\udcff b"], "The instruction holds a character that is not valid Unicode"),
            (["--", "--json?", "--more"], 'No such option "--more"|Do not know what to do with "--more"'),
            ([], "Missing argument 'question'.* See .* ask --help"),
            (["--touch", "a.txt", "what ?", "--model"], "Option '--model' requires an argument"),
            (["what ?", "--model"], "Option '--model' requires an argument"),
            (["what ?", "--json=1"], "Option '--json' does not take a value"),
            (["what ?", "max_new_tokens=[1,"], "Cannot use max_new_tokens"),
            (["what ?", "media=a.txt"], 'Unknown generation option "media"'),
            (["what ?", "touch=a.txt"], 'Unknown generation option "touch"'),
            (["what ?", "--model", "tiny_modle"], 'No model is called "tiny_modle". Did you mean "tiny_model"'),
            (["what ?", "--model", "./none"], 'There is no bundle "./none"'),
            (["what ?", "--model", "."], "There is no bundle in .: it lacks config.yaml"),
            (["what ?", "--tiny-model", "a.txt"], 'This model has no branch for "tiny_model"'),
            (["what ? " * 200, "--touch", "a.txt"], "text positions with 6 new tokens exceed its context of 256"),
        ],
    )
    def test_what_is_wrong_is_one_line_and_status_2(self, run, arguments, message):
        status, out, err = run("ask", *arguments)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1 and err.startswith("error: ") and re.search(message, err), err

    def test_two_dashes_end_the_options(self, run, model, world):
        for question, words in (("--json ?", ["--touch", "a.txt", "--", "--json ?"]), ("-m ?", ["--", "-m ?"])):
            inputs = {"touch": world / "a.txt"} if "--touch" in words else {}
            status, out, _ = run("ask", *words, "max_new_tokens=3")
            assert (status, out) == (0, model.ask(question, **inputs, max_new_tokens=3).text + "\n")

    def test_words_the_llm_does_not_know_are_one_warning(self, run):
        status, _, err = run("ask", "is the glorp larger ?", "max_new_tokens=2")
        assert status == 0 and err.count("\n") == 1
        assert err.startswith('warning: The LLM does not know "glorp" in "is the glorp larger ?"')

    def test_help_lists_the_inputs(self, run):
        status, out, _ = run("ask", "--help")
        assert status == 0 and "--touch FILE (.txt)" in out and "--depth-map FILE (.txt)" in out


class TestChat:
    def conversation(self, model: XBlip, *turns) -> list[str]:
        """What the model says to turns, each media and words, with all that came before."""
        messages, said = [], []
        for media, words in turns:
            parts = [{"type": name, "source": model.branches[name].read(source)} for name, source in media]
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": words}]})
            said.append(model.chat(messages).text)
            messages.append({"role": "assistant", "content": said[-1]})
        return said

    def test_it_keeps_media_and_words_over_turns(self, run, model, world):
        lines = "what is this ?\n\n  describe it  \n/depth-map b.txt\nwhich one ?\n/quit\nnever asked"
        status, out, err = run("chat", "--touch", "a.txt", lines=lines)
        expected = self.conversation(
            model,
            ([("touch", world / "a.txt")], "what is this ?"),
            ([], "describe it"),
            ([("depth_map", world / "b.txt")], "which one ?"),
        )
        assert (status, out.splitlines(), err) == (0, expected, "")

    def test_options_are_passed_on(self, run, model, world):
        _, out, _ = run("chat", "--touch", "a.txt", "max_new_tokens=1", lines="what ?")
        assert out.strip() == model.ask("what ?", touch=world / "a.txt", max_new_tokens=1).text

    def test_answers_are_shown_as_they_are(self, run, monkeypatch):
        for text in ("[/red] [bold]three[/bold] :smile:", "word " * 100):
            monkeypatch.setattr(XBlip, "chat", lambda self, messages, text=text, **options: xblip.Answer(text, 1, 1))
            assert run("chat", lines="what ?") == (0, f"{text}\n", "")

    def test_a_bad_file_is_told_at_once_and_forgotten(self, run, model, world):
        lines = "/touch none.txt\n/tuoch a.txt\n/touch\n/touch bad.txt\n/touch a.txt\nwhat ?"
        status, out, err = run("chat", lines=lines)
        errors = err.splitlines()
        assert status == 0 and all(line.startswith("error: ") for line in errors) and len(errors) == 4
        assert "'none.txt': no such file" in errors[0] and "'bad.txt': it is damaged" in errors[3]
        assert 'Cannot add "/tuoch a.txt": write /touch, /depth_map with a FILE after it' in errors[1]
        assert 'Cannot add "/touch ": write' in errors[2]
        assert out.splitlines() == self.conversation(model, ([("touch", world / "a.txt")], "what ?"))

    def test_a_question_that_fails_is_not_remembered(self, run, model, world):
        status, out, err = run("chat", "--touch", "a.txt", lines="what ? " * 200 + "\nwhat ?")
        assert status == 0 and "exceed its context" in err and err.count("\n") == 1
        assert out.splitlines() == self.conversation(model, ([("touch", world / "a.txt")], "what ?"))

    def test_a_line_that_is_no_text_is_told_and_forgotten(self, run, model):
        status, out, err = run("chat", lines="a\udcff b\nwhat ?")
        assert status == 0 and "not valid Unicode" in err and err.count("\n") == 1
        assert out.splitlines() == self.conversation(model, ([], "what ?"))

    @pytest.mark.parametrize("arguments", [["--touch", "none.txt"], ["--model", "none"], ["--tuoch", "a.txt"]])
    def test_a_bad_start_is_one_line_and_status_2(self, run, arguments):
        status, out, err = run("chat", *arguments, lines="what ?")
        assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


class TestPlugins:
    @pytest.fixture
    def broken(self, world):
        site = Site(world / "site")
        module = site.install("broken_one", "raise RuntimeError('no [/red] camera')")
        yield
        site.remove(module)

    def test_all_are_listed_and_broken_ones_say_why(self, run, broken):
        status, out, _ = run("plugins")
        assert status == 0
        for words in ("touch", "xblip-depth-map 1.0", "modality depth_map", "model tiny_model", "no [/red] camera"):
            assert words in out
        status, out, _ = run("plugins", "--json")
        listed = {plugin["name"]: plugin for plugin in json.loads(out)}
        expected = {"name": "touch", "distribution": "xblip-touch 1.0", "offers": ["modality touch"], "error": ""}
        assert status == 0 and listed["touch"] == expected
        assert "RuntimeError: no [/red] camera" in listed["broken_one"]["error"]

    def test_a_broken_one_leaves_the_others_alone(self, run, broken):
        status, out, err = run("check", "broken_one")
        assert (status, out) == (2, "") and "failed on import: RuntimeError" in err and err.count("\n") == 1
        assert run("ask", "what ?", "--touch", "a.txt")[0] == 0
        status, out, _ = run("ask", "--help")
        assert status == 0 and "--touch" in out

    @pytest.mark.slow
    def test_check_runs_the_contract(self, run):
        status, out, _ = run("check", "touch", "--json")
        promises = json.loads(out)
        assert status == 0 and len(promises) >= 10 and not any(promises.values())
        assert "two instructions give two soft prompts" in promises

    def test_check_ends_with_1_when_a_promise_is_broken(self, run, monkeypatch):
        modality = plugins.get("modality", "touch")
        monkeypatch.delattr(ModalityContract, "test_importing_the_plugin_stays_light")  # it starts a process
        monkeypatch.setattr(modality, "load", lambda self, source: {"values": torch.randn(1, 4)})
        status, out, _ = run("check", "touch")
        assert status == 1 and "loading twice gives two values" in out and "yes" in out

    def test_check_of_an_unknown_name_is_one_line(self, run):
        status, out, err = run("check", "tuoch")
        assert (
            (status, out) == (2, "")
            and 'No modality is called "tuoch". Did you mean "touch"' in err
            and err.count("\n") == 1
        )


class TestTrain:
    def test_a_misspelt_key_is_one_line(self, run, world):
        (world / "train.yaml").write_text("llm: {sorce: x}\nbranch: {modality: touch}\ndata: {train: a.jsonl}\n")
        status, out, err = run("train", "train.yaml")
        assert (
            (status, out) == (2, "")
            and 'Unknown key "config.llm.sorce". Did you mean "source"' in err
            and err.count("\n") == 1
        )

    @pytest.mark.slow
    def test_broken_media_in_a_worker_are_one_line(self, world):
        rows = [{"touch": "bad.txt", "instruction": "what ?", "answer": "red"}] * 4
        (world / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "llm": {"source": "bundle/llm"},
            "branch": {"modality": "touch", "bridge": small_qformer("bundle/llm")},
            "data": {"train": "bad.jsonl"},
            "training": {"output_dir": "run", "use_cpu": True, "dataloader_num_workers": 1, "max_steps": 1},
        }
        (world / "broken.yaml").write_text(json.dumps(config))
        failed = process("train", "broken.yaml", cwd=world)
        assert failed.returncode == 2 and failed.stderr.count("\n") == 1, failed.stderr
        assert re.match(
            "error: 4 rows of bad.jsonl in turn .* in bad.jsonl, line [1-4]: Cannot read touch .*bad.txt",
            failed.stderr,
        )

    def test_a_missing_config_is_one_line(self, run):
        status, out, err = run("train", "none.yaml")
        assert (status, out) == (2, "") and 'No config file at "none.yaml"' in err and err.count("\n") == 1


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["bogus"], "No such command 'bogus'"),
            (["--bogus"], "No such option"),
            (["plugins", "x"], "unexpected extra argument"),
            (["check"], "Missing argument 'name'"),
            (["train"], "Missing argument 'config'"),
            (["new"], "Missing argument 'name'"),
        ],
    )
    def test_what_is_wrong_is_one_line_and_status_2(self, run, arguments, message):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1 and err.startswith("error: ") and message in err and "--help" in err, err

    def test_no_command_shows_the_help(self, run):
        status, out, err = run()
        assert status == 2 and "Usage:" in out and err == ""


class TestProcess:
    """A few runs as a shell makes them."""

    def test_help_answers_at_once(self, world):
        spent = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            shown = process("--help", cwd=world)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            # The processor's time, since other work on this machine is not ours to answer for.
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert min(spent) < 1.5 and shown.returncode == 0
        assert all(command in shown.stdout for command in ("ask", "chat", "train", "plugins", "check", "new"))

    @pytest.mark.slow
    def test_an_error_is_one_line_on_stderr_and_status_2(self, world):
        failed = process("ask", "what ?", "--tuoch", "a.txt", cwd=world)
        assert (failed.returncode, failed.stdout) == (2, "")
        assert failed.stderr.startswith('error: No such option "--tuoch"') and failed.stderr.count("\n") == 1

    @pytest.mark.slow
    def test_a_conversation_by_pipe_has_answers_on_stdout_and_errors_on_stderr(self, world, model):
        talked = process("chat", "--touch", "a.txt", cwd=world, lines="what ?\n/touch bad.txt\n/quit\n")
        assert (talked.returncode, talked.stdout) == (0, model.ask("what ?", touch=world / "a.txt").text + "\n")
        assert talked.stderr.startswith("error: Cannot read touch 'bad.txt'") and talked.stderr.count("\n") == 1
