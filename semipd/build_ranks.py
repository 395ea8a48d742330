"""A model on several ranks: the others build their shards while this process builds the first."""

from __future__ import annotations

from semipd.build_model import BuiltModel, build_model
from semipd.config import EngineConfig
from semipd.errors import ConfigError, WeightsError
from semipd.model.loader import ModelSource
from semipd.model.spec import ModelSpec
from semipd.parallel.executor import RankedExecutor
from semipd.parallel.ranks import Ranks, start_ranks


def build_on_ranks(config: EngineConfig, source: ModelSource, spec: ModelSpec) -> tuple[BuiltModel, RankedExecutor]:
    """The first shard, in this process, and what runs steps on all of them.

    Raises:
        ConfigError, WeightsError, Exception: what kept any rank from having its shard; the message names the rank
            unless it is this one.
    """
    ranks = start_ranks(config)
    try:
        model = build_model(config, source, spec, ranks.group, ranks.local_shard)
        try:
            ranks.wait_until_ready(model.backend.num_sms, model.backend.splits)
        except BaseException:
            ranks.kill()
            model.executor.close()
            model.backend.close()
            raise
    except BaseException as error:
        _end(ranks, error)
        raise
    return model, RankedExecutor(model.executor, ranks)


def _end(ranks: Ranks, error: BaseException) -> None:
    """End the other ranks; raise what ended one of them, if this one failed with `error` for that."""
    try:
        if isinstance(error, Exception) and not isinstance(error, ConfigError | WeightsError):
            ranks.blame(error)
    finally:
        ranks.kill()
        ranks.group.close()
        ranks.join()
