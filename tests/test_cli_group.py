"""A command that is one of several processes started together leaves their group, see pytorch/pytorch#179291."""

import pytest
import torch.distributed as dist

from xblip import cli
from xblip.errors import InputError


@pytest.fixture
def end(tmp_path, monkeypatch):
    """Runs a command that joined a group of this backend, and tells whether it is still in it afterwards."""
    asked = []

    def ended(backend: str, error: Exception | None = None) -> bool:
        def app(**_):
            dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
            asked.append(dist.is_initialized())
            if error:
                raise error

        monkeypatch.setattr(cli, "app", app)
        monkeypatch.setattr(dist, "get_backend", lambda: backend)
        with pytest.raises(SystemExit) as ending:
            cli.main()
        assert asked == [True] and ending.value.code == (2 if error else None)
        return dist.is_initialized()

    yield ended
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_it_is_left_at_the_end(end, backend):
    assert not end(backend)


def test_an_error_leaves_one_of_gloo_whose_threads_would_abort(end, capsys):
    assert not end("gloo", InputError("so it is"))
    assert capsys.readouterr().err == "error: so it is\n"


def test_an_error_leaves_one_of_nccl_alone_which_would_wait_for_the_others(end):
    assert end("nccl", InputError("so it is"))
