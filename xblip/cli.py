"""The command line: ask, chat, convert, doctor, plugins, check, new, and the commands of the modules beside this one.

Options for inputs come from the installed plugins (`--image`, `--point-cloud`, ...), so a third party's modality is
there as soon as it is installed; they are read from the raw arguments, since their order is the order of the prompt.
Nothing heavy is imported before a command runs.
"""

import dataclasses
import io
import json
import os
import sys
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from xblip import cli_clean, cli_eval, cli_retrieve, cli_serve, cli_train, plugins
from xblip.errors import ConfigError, InputError, PluginError, XBlipError, suggest

MODEL = "XBLIP_MODEL"
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}

UsageError = typer.BadParameter.__base__
"""What typer raises for arguments it cannot parse; it has no public name there."""

app = typer.Typer(
    name="xblip",
    help="Ask one frozen language model about files of any kind; train and check the modalities it reads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class MediaCommand(TyperCommand):
    """A command that takes the inputs which the installed plugins read, and lists them at the end of its help."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """Puts inputs behind the rest, so that in `--image a.png "what?"` the file is not taken for the question."""
        parameters = [parameter for parameter in self.get_params(ctx) if parameter.param_type_name == "option"]
        own = {option for parameter in parameters for option in parameter.opts}
        valued = {option for parameter in parameters if not parameter.is_flag for option in parameter.opts}
        words: list[str] = []
        inputs: list[str] = []
        rest = iter(args)
        for argument in rest:
            option, equals, path = argument.partition("=")
            if argument == "--":
                break
            if not argument.startswith("--") or option in own:
                words.append(argument)
                continue
            _check_input(option, own)
            path = path if equals else next(rest, "--")
            if path.startswith("--") and not equals:
                raise InputError(f'"{option}" needs a file after it.')
            inputs.append(f"{option}={path}")
        lacks_value = words and words[-1] in valued
        return super().parse_args(ctx, words if lacks_value else [*words, "--", *rest, *inputs])

    def format_help(self, ctx, formatter) -> None:
        lines = [
            f"--{name.replace('_', '-')} FILE ({' '.join(plugins.get('modality', name).suffixes) or 'its own kind'})"
            for name in plugins.names("modality")
        ]
        self.epilog = "Inputs, in the order of the prompt; each may be repeated:\n\n" + "\n\n".join(lines)
        super().format_help(ctx, formatter)


Model = Annotated[
    str, typer.Option("--model", "-m", envvar=MODEL, help="An installed bundle's name, a folder, or a hub id.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command(cls=MediaCommand, context_settings=EXTRA)
def ask(
    ctx: typer.Context,
    question: Annotated[str, typer.Argument(help="The question or instruction.")],
    model: Model = "numerals",
    as_json: AsJson = False,
    explain: Annotated[
        Path | None, typer.Option(help="A new or empty folder for a page that shows what the answer came from.")
    ] = None,
) -> None:
    """Ask one question about files. Generation options may follow, e.g. max_new_tokens=20."""
    media, options = _parse_inputs(ctx.args)
    import xblip
    from xblip import explain_page

    if explain:
        explain_page.check_folder(explain)
    answer = xblip.load(model).ask(question, media=media, **options)
    said = {
        "answer": answer.text,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_new_tokens": answer.num_new_tokens,
    }
    if not as_json:
        print(answer.text, flush=True)
    if explain:
        explanation = answer.explain()
        page = explanation.save(explain)
        said["explanation"] = {name: part for name, part in explanation.to_dict().items() if name != "attention"}
        if not as_json:
            Console(highlight=False).print(explanation.table())
            print(f"wrote {page}")
    if as_json:
        print(json.dumps(said))


@app.command(cls=MediaCommand, context_settings=EXTRA)
def chat(ctx: typer.Context, model: Model = "numerals") -> None:
    """Talk about the same files: a question a line. "/image FILE" adds a file, "/quit" ends."""
    media, options = _parse_inputs(ctx.args)
    import xblip

    loaded = xblip.load(model)
    messages: list[dict[str, Any]] = []
    pending = [_chat_part(loaded, name, path) for name, path in media]
    while (line := _read_line()) is not None:
        words = line.strip()
        try:
            if words in ("/quit", "/exit"):
                return
            if words.startswith("/"):
                name, _, path = words[1:].partition(" ")
                pending.append(_chat_part(loaded, name.replace("-", "_"), path.strip()))
            elif words:
                question = {"role": "user", "content": [*pending, {"type": "text", "text": words}]}
                answer = loaded.chat([*messages, question], **options)
                messages += [question, {"role": "assistant", "content": answer.text}]
                pending = []
                print(answer.text, flush=True)
        except XBlipError as error:
            print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)


for command in (cli_train.train, cli_train.precompute, cli_retrieve.retrieve, cli_clean.augment, cli_clean.capfilt):
    app.command()(command)
app.command("eval")(cli_eval.evaluate)
app.command()(cli_eval.compare)
app.command()(cli_serve.serve)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A folder or hub id of transformers, or a file of weights.")],
    folder: Annotated[Path, typer.Argument(help="Where to write; new or empty.")],
    only: Annotated[str, typer.Option(help="The one modality to convert.")] = "",
    llm: Annotated[str, typer.Option(help="Folder or hub id of the LLM that a branch is for.")] = "",
    encoder: Annotated[str, typer.Option(help="Folder or hub id of a branch's encoder.")] = "",
    tokenizer: Annotated[str, typer.Option(help="Folder or hub id of the Q-Former's tokenizer.")] = "bert-base-uncased",
    qformer: Annotated[str, typer.Option(help="Converted folder of the Q-Former before MiniGPT-4's projector.")] = "",
    cue: Annotated[str | None, typer.Option(help='The cue a branch was trained with; "" for none.')] = None,
    to: Annotated[
        str, typer.Option(help='The way back: "transformers" makes a model of transformers of a bundle.')
    ] = "",
) -> None:
    """Convert a published model or checkpoint into a bundle, a branch, an encoder or initial weights."""
    from xblip.convert import Wanted, export
    from xblip.convert import convert as run

    if to not in ("", "transformers"):
        raise InputError(f'Bundles are converted to "transformers", not to "{to}".')
    wanted = Wanted(only=only, llm=llm, encoder=encoder, tokenizer=tokenizer, qformer=qformer, cue=cue)
    print(f"wrote {folder}: {(export if to else run)(source, folder, wanted)}")


@app.command()
def doctor(
    config: Annotated[str, typer.Argument(help="A model or training config, or a bundle; none: the environment.")] = "",
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, e.g. llm.dtype=bfloat16.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples at once; that of a training config, or 1.")] = None,
    dtype: Annotated[str, typer.Option(help="Of LLM and encoders; what the config says unless given.")] = "",
    as_json: AsJson = False,
) -> None:
    """Say what loads here, and of a config its shapes, parameters, memory and missing files, before any download."""
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    from xblip.doctor import environment, environment_table, examine, report_tables

    console = Console(highlight=False)
    checks = environment()
    if not as_json:
        console.print(environment_table(checks))
    report = examine(config, overrides or [], batch_size=batch_size, dtype=dtype) if config else None
    if as_json:
        found = {"environment": [vars(check) for check in checks]}
        print(json.dumps(found | ({"config": dataclasses.asdict(report)} if report else {}), indent=2))
        return
    for shown in report_tables(report) if report else ():
        console.print(shown)


@app.command("plugins")
def list_plugins(as_json: AsJson = False) -> None:
    """List installed plugins, what each offers, and why a broken one fails."""
    found = plugins.survey()
    if as_json:
        keys = ("name", "distribution", "offers", "error")
        print(json.dumps([{key: getattr(plugin, key) for key in keys} for plugin in found], indent=2))
        return
    table = Table()
    for column in ("plugin", "distribution", "offers", "state"):
        table.add_column(column, overflow="fold")
    for plugin in found:
        state = f"[red]{escape(_one_line(plugin.error))}[/red]" if plugin.error else "[green]ok[/green]"
        table.add_row(plugin.name, plugin.distribution, ", ".join(plugin.offers), state)
    Console().print(table)


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A modality's name.")],
    as_json: AsJson = False,
) -> None:
    """Run the contract every modality keeps; exits with 1 if it is broken."""
    plugins.get("modality", name)
    from xblip.testing import run_contract

    results = run_contract(name)
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        table = Table(title=f"Contract of {name}")
        table.add_column("promise")
        table.add_column("kept", overflow="fold")
        for promise, fault in results.items():
            table.add_row(promise, f"[red]{escape(fault)}[/red]" if fault else "[green]yes[/green]")
        Console().print(table)
    if any(results.values()):
        raise typer.Exit(1)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="The modality's name, a Python identifier such as thermal.")],
    folder: Annotated[Path | None, typer.Option(help="Where to write; ./xblip-NAME unless given.")] = None,
) -> None:
    """Write a new modality plugin: one module, one test, pyproject and README, ready to install."""
    from xblip.scaffold import write_plugin

    written = write_plugin(name, folder)
    print(f"wrote {written}\nnext: pip install -e {written} && xblip check {name.replace('-', '_')}")


def _chat_part(model: Any, name: str, path: str) -> dict[str, Any]:
    """Reads a file once for the whole conversation; a bad one is told at once and not kept."""
    if name not in model.branches or not path:
        kinds = ", ".join(f"/{kind}" for kind in model.branches)
        raise InputError(f'Cannot add "/{name} {path}": write {kinds} with a FILE after it, or /quit.')
    return {"type": name, "source": model.branches[name].read(path)}


def _check_input(option: str, own: Collection[str]) -> None:
    if option[2:].replace("-", "_") not in plugins.installed():
        inputs = [f"--{name.replace('_', '-')}" for name in plugins.names("modality")]
        raise PluginError(
            f'No such option "{option}".{suggest(option, [*inputs, *own])} If it is a modality of its own: '
            f"pip install xblip-{option[2:]}."
        )


def _parse_inputs(arguments: list[str]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Reads `--modality=FILE` and `option=value` from what is left of the arguments, in their order."""
    media: list[tuple[str, str]] = []
    overrides: list[str] = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals:
            raise InputError(f'Do not know what to do with "{argument}": inputs are given as --modality FILE.')
        if name.startswith("--"):
            media.append((name[2:].replace("-", "_"), path))
        else:
            overrides.append(argument)
    return media, _options(overrides)


def _options(overrides: list[str]) -> dict[str, Any]:
    if not overrides:
        return {}
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from xblip.generation import check_generation_options, generation_option_names

    try:
        options = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    except (OmegaConfBaseException, YAMLError) as cause:
        raise ConfigError(f"Cannot use {' '.join(overrides)}: {cause}") from cause
    check_generation_options(options)
    for name in options:
        if name not in generation_option_names(objects=False):
            raise ConfigError(f"{name} takes an object, which only Python can give: leave it out here.")
    return options


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {_one_line(message)}", file=sys.stderr, flush=True)


def _leave_group(*, failed: bool) -> None:
    """Ends this process's part in a group of processes, while Python is whole.

    Threads of gloo that outlive it abort the process now and then (pytorch/pytorch#179291). NCCL has no such threads, and
    would wait there for processes that go on after a failure of this one.
    """
    distributed = sys.modules.get("torch.distributed")  # not imported for this
    if not distributed or not distributed.is_available() or not distributed.is_initialized():
        return
    if not failed or distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def main() -> None:
    """The console script: a user's error is one line on stderr and exit status 2; a warning is one line too."""
    warnings.showwarning = _show_warning
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as arguments are; a line that is no UTF-8 is told, not fatal
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too: scripts read stderr
    try:
        status = app(standalone_mode=False)
    except XBlipError as error:
        message = str(error)
    except UsageError as error:
        if error.ctx and len(sys.argv) < 2:
            print(error.ctx.get_help())
            raise SystemExit(2) from None
        place = error.ctx.command_path if error.ctx else "xblip"
        message = f"{error.format_message()} See {place} --help."
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    else:
        _leave_group(failed=False)
        raise SystemExit(status)
    print(f"error: {_one_line(message)}", file=sys.stderr, flush=True)
    _leave_group(failed=True)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
