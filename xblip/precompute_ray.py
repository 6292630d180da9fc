"""Features stored by the actors of a Ray cluster, each of which holds the encoder.

A task is what fills one shard, and writes it itself: a task that Ray repeats, after a machine was lost, writes items a
second time at worst, and a store counts them once. All machines must see the data and the store at the same paths.
"""

import logging
import pickle
from collections.abc import Sequence
from typing import Any

from xblip.encoding import Encoding, Job, best_device
from xblip.errors import PluginError, XBlipError
from xblip.store import Skip

TASKS = 4
"""For each actor at least, so that those that are done early help."""


class _Encoder:
    """An actor: a process with the encoder and, where the cluster has them, an accelerator."""

    def __init__(self, job: Job):
        self.encoding = Encoding(job, best_device(job))
        self.encoding.open(create=False)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"outcome": [pickle.dumps(self._write(pickle.loads(sources))) for sources in batch["sources"]]}

    def _write(self, sources: Sequence[Any]) -> tuple[int, list[Skip]] | XBlipError:
        """Fills a shard; an error comes as a value, since Ray would try again what a user must mend."""
        try:
            with self.encoding.writer(0) as writer:
                skipped = self.encoding.write(sources, writer)
        except XBlipError as error:
            return error
        return writer.num_written, skipped


def encode(
    job: Job, sources: Sequence[Any], *, bytes_each: float, max_skipped: float, show: bool
) -> tuple[int, list[Skip]]:
    """Encodes sources on the cluster that `ray.init` finds (RAY_ADDRESS), or else on this machine.

    Args:
      job: the run's; its store is there.
      sources: what is missing in it.
      bytes_each: what an item takes, by which tasks are cut.
      max_skipped: how many may be broken; no more tasks are waited for once there are more.
      show: show a bar.

    Returns:
      How many items were written, and what was skipped.

    Raises:
      PluginError: Ray is not installed.
      XBlipError: what an actor met.
    """
    try:
        import ray
        from ray.data import DataContext
    except ImportError as cause:
        raise PluginError(
            f'--engine ray needs Ray Data, which cannot be imported ({cause}): pip install "xblip[ray]", or leave it out.'
        ) from cause
    from tqdm.auto import tqdm

    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")
    logging.getLogger("ray.data").setLevel("ERROR")
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    resources = ray.cluster_resources()
    gpus, cores = 0 if job.use_cpu else int(resources.get("GPU", 0)), 1 + job.dataloader_num_workers
    actors = gpus or max(1, int(resources.get("CPU", 1)) // cores)
    at_once = max(1, min(int(job.shard_bytes / max(bytes_each, 1)), -(-len(sources) // (TASKS * actors))))
    blocks = [{"sources": pickle.dumps(sources[at : at + at_once])} for at in range(0, len(sources), at_once)]
    if not blocks:
        return 0, []
    done = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
        _Encoder,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(blocks))),
        num_cpus=cores,
        num_gpus=1 if gpus else 0,
    )
    written, skipped = 0, []
    for row in tqdm(done.iter_rows(), desc="shards", total=len(blocks), disable=not show):
        outcome = pickle.loads(row["outcome"])
        if isinstance(outcome, XBlipError):
            raise outcome
        written, skipped = written + outcome[0], skipped + outcome[1]
        if len(skipped) > max_skipped:
            break
    return written, skipped
