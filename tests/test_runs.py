"""A folder of a run: one run at a time, the same run again, whole lines alone, work divided and put together."""

import json
import multiprocessing
import os
import socket
import subprocess

import pytest
from accelerate import PartialState
from kit import written_by_another

from xblip.errors import BundleError, ConfigError
from xblip.runs import differences, open_run, read_facts, read_lines

FACTS = {"model": {"name": "tiny"}, "seed": 1}


def opened(folder, facts=FACTS):
    return open_run(folder, facts=facts, command="xblip eval", use_cpu=True)


def test_lines_come_back_as_they_were_written(tmp_path):
    with opened(tmp_path / "run") as run:
        lines = run.lines("answers")
        assert lines.held == {}
        lines.add([{"id": "a", "text": "né\n"}, {"id": "b", "text": "\ud800"}])
    with opened(tmp_path / "run") as run:
        lines = run.lines("answers")
        assert list(lines.held) == ["a", "b"] and lines.held["a"]["text"] == "né\n"
        lines.add([{"id": "c"}])
        lines.finish(lambda found: [found[key] for key in sorted(found, reverse=True)])
    assert [line["id"] for line in read_lines(tmp_path / "run" / "answers.jsonl")] == ["c", "b", "a"]
    assert not list((tmp_path / "run").glob("*.part-*"))


def test_a_last_line_that_was_cut_is_dropped_and_written_anew(tmp_path):
    with opened(tmp_path) as run:
        run.lines("answers").add([{"id": "a"}, {"id": "b"}])
    part = tmp_path / "answers.part-00000.jsonl"
    part.write_bytes(part.read_bytes()[:-4])
    with opened(tmp_path) as run:
        lines = run.lines("answers")
        assert list(lines.held) == ["a"]
        lines.add([{"id": "b", "again": True}])
        lines.finish(lambda found: found.values())
    assert read_lines(tmp_path / "answers.jsonl") == [{"id": "a"}, {"id": "b", "again": True}]


def test_a_damaged_line_is_named(tmp_path):
    with opened(tmp_path) as run:
        run.lines("answers").add([{"id": "a"}, {"id": "b"}])
    part = tmp_path / "answers.part-00000.jsonl"
    part.write_text(part.read_text().replace('{"id": "a"}', '{"id": '))
    with opened(tmp_path) as run, pytest.raises(BundleError, match="part-00000.jsonl, line 1, is damaged"):
        run.lines("answers")


def test_another_run_is_refused_and_told_by_what_differs(tmp_path):
    with opened(tmp_path):
        pass
    with (
        pytest.raises(ConfigError, match="other settings: model.name was 'tiny', is 'large'; seed was 1, is 'absent'"),
        opened(tmp_path, {"model": {"name": "large"}}),
    ):
        pass
    assert read_facts(tmp_path) == FACTS
    assert differences({"a": (1, 2)}, {"a": [1, 2]}) == ["a was (1, 2), is [1, 2]"]
    assert differences({"a": [1, 2]}, {"a": (1, 2)}) == []


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"was not written by xblip eval, and holds thesis\.tex"), opened(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="Cannot write into .*file"), opened(tmp_path / "file"):
        pass
    with pytest.raises(BundleError, match="There is no run in"):
        read_facts(tmp_path)


def test_damaged_facts_are_told(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(BundleError, match=r"run\.json is damaged"), opened(tmp_path):
        pass


@pytest.mark.slow
def test_only_one_run_at_a_time(tmp_path):
    with (
        written_by_another(tmp_path, "xblip eval"),
        pytest.raises((BundleError, ConfigError), match="Another xblip eval"),
        opened(tmp_path),
    ):
        pass


def test_a_full_disk_loses_no_line_before(small_disk):
    with opened(small_disk / "run") as run:
        lines = run.lines("answers")
        lines.add([{"id": "a", "text": "x" * 1000}])
        with pytest.raises(BundleError, match="make room or mend it, and run the same command again"):
            lines.add([{"id": str(number), "text": "x" * 10_000} for number in range(200)])
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    with opened(small_disk / "run") as run:
        lines = run.lines("answers")
        assert "a" in lines.held and len(lines.held) < 200
        lines.add([{"id": "last"}])
        lines.finish(lambda found: found.values())
        assert read_lines(lines.path)[-1] == {"id": "last"}


def work(folder, rank, port, rows, crash):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    PartialState._reset_state()  # of the process that this one was forked from
    with opened(folder) as run:
        lines = run.lines("answers")
        missing = [str(row) for row in range(rows) if str(row) not in lines.held]
        for row in run.mine(missing):
            if crash and rank and int(row) > 4:
                os._exit(9)
            lines.add([{"id": row, "by": rank}])
        if crash:
            return
        lines.finish(lambda found: [found[str(row)] for row in range(rows)])
        shown = run.together(lambda: {"from": run.rank})
        (folder / f"{rank}.txt").write_text(json.dumps(shown))
        try:
            run.together(lambda: read_facts(folder / "none"))
        except BundleError as error:
            (folder / f"{rank}.err").write_text(str(error))
    run.state.destroy_process_group()


@pytest.mark.slow
def test_two_processes_divide_rows_and_go_on_after_one_was_killed(tmp_path):
    fork = multiprocessing.get_context("fork")
    for crash in (True, False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [fork.Process(target=work, args=(tmp_path, rank, port, 11, crash)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0 or crash
    lines = read_lines(tmp_path / "answers.jsonl")
    assert [line["id"] for line in lines] == [str(row) for row in range(11)]
    assert {line["by"] for line in lines} == {0, 1}
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.txt").read_text()) == {"from": 0}
        assert "There is no run in" in (tmp_path / f"{rank}.err").read_text()
