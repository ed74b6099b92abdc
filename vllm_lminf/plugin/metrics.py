"""What operators ask of a running server: blocks pinned, blocks given back, tokens out of sight.

The numbers are read in the engine's process, travel with vLLM's own statistics of a step, and are
shown by the process that answers ``/metrics``, beside vLLM's own. `install` wraps what that takes:

- `Scheduler.make_stats`. A step's statistics are the one thing that travels from the engine's
  process to the API server's at every step, whatever the number of either. They have no place for
  a plugin's numbers, and the scheduler's class is the user's to choose. So they travel in a field
  that maps names to counts, `CARRIER`, under names that no reader of vLLM knows; the logger takes
  them out before vLLM's own see them.
- `StatLoggerManager.__init__`. A class in the entry point group vllm.stat_logger_plugins is loaded
  into every server of the environment, LMINF selected or not, and turns the statistics on that
  --disable-log-stats turned off; offline engines never load it.
- `Scheduler.update_from_output`, for what a worker counts: that arrives with a step's output, to
  which the worker adds it (`vllm_lminf.plugin.patches.wrap_outputs`).
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerManager
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats
from vllm.v1.request import Request

from vllm_lminf.pattern import num_seen
from vllm_lminf.plugin.archive import ArchiveManager
from vllm_lminf.plugin.config import BACKEND_NAME, LambdaConfig
from vllm_lminf.plugin.kv_cache import LambdaManager
from vllm_lminf.plugin.wrapping import path_of, wrap

BLOCKS_PINNED = "lminf_kv_blocks_pinned"
BLOCKS_FREED = "lminf_kv_blocks_freed"
TOKENS_OUTSIDE = "lminf_tokens_outside_window"
ARCHIVE_HELD = "lminf_archive_blocks_held"
ARCHIVE_SIZE = "lminf_archive_blocks"
SEARCHES = "lminf_archive_searches"
SEARCHES_REPEATED = "lminf_archive_searches_repeated"
NAMES = (
    BLOCKS_PINNED,
    BLOCKS_FREED,
    TOKENS_OUTSIDE,
    ARCHIVE_HELD,
    ARCHIVE_SIZE,
    SEARCHES,
    SEARCHES_REPEATED,
)

_COUNTED = (SEARCHES, SEARCHES_REPEATED)
_OF_THE_LAMBDA = ("n_global", "n_local", "distance_limit")
_OF_THE_MIDDLE = (
    "middle_top_k",
    "middle_rows",
    "middle_from_layer",
    "middle_distance",
    "middle_unit",
)

CARRIER = "num_kv_fetch_reqs_by_stage"
"""The field of `SchedulerStats` that the numbers travel in."""

COUNTS = "lminf_search_counts"
"""What a worker that counts searches adds to a step's output: searches so far, and those of them
that weren't certain at once."""

INTERVAL_S = 0.1
"""Least time between two readings of an engine that is busy."""


def install() -> None:
    """Has the numbers read, carried and shown in every engine that selects LMINF.

    Raises:
        RuntimeError: what carries them isn't there in this vLLM.
    """
    _check_carrier()
    meters: WeakKeyDictionary[Scheduler, Meter] = WeakKeyDictionary()

    def meter_of(scheduler: Scheduler) -> Meter:
        if scheduler not in meters:
            managers = scheduler.kv_cache_manager.coordinator.single_type_managers
            meters[scheduler] = Meter(managers)
        return meters[scheduler]

    def load(original: Callable[..., Any], self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        stats = original(self, *args, **kwargs)
        if stats is not None:
            getattr(stats, CARRIER).update(meter_of(self).read(self.requests))
        return stats

    def update(
        original: Callable[..., Any],
        self: Scheduler,
        scheduler_output: Any,
        model_runner_output: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        counts = getattr(model_runner_output, COUNTS, None)
        if counts is not None:
            meter_of(self).searches = counts
        return original(self, scheduler_output, model_runner_output, *args, **kwargs)

    wrap(Scheduler, "make_stats", load)
    wrap(Scheduler, "update_from_output", update)
    wrap(StatLoggerManager, "__init__", _add_logger)


def _check_carrier() -> None:
    carriers = [field for field in dataclasses.fields(SchedulerStats) if field.name == CARRIER]
    if not carriers or carriers[0].default_factory is not dict:
        raise RuntimeError(
            f"{path_of(SchedulerStats, CARRIER)} isn't the dict of names and counts that LMINF's "
            "metrics travel in: install a vLLM that this version of vllm-lminf knows"
        )


def unload(stats: SchedulerStats) -> dict[str, int]:
    """Takes the numbers out of a step's statistics; empty where they carry none."""
    carrier = getattr(stats, CARRIER)
    return {name: carrier.pop(name) for name in NAMES if name in carrier}


def _add_logger(
    original: Callable[..., None],
    self: StatLoggerManager,
    vllm_config: VllmConfig,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Ours comes before vLLM's, where LMINF is selected."""
    original(self, vllm_config, *args, **kwargs)
    if vllm_config.attention_config.backend is AttentionBackendEnum[BACKEND_NAME]:
        self.stat_loggers.insert(0, LambdaStatLogger(vllm_config, self.engine_indexes))


class Meter:
    """Reads the numbers of one engine, in the engine's process.

    A reading takes time in proportion to the requests that run, and nobody looks after every step:
    it is taken `INTERVAL_S` after the last one, or as soon as no request holds a block any more.

    Attributes:
        searches: `COUNTS`, as they came last.
    """

    def __init__(self, managers: Iterable[object]) -> None:
        """
        Args:
            managers: those of all the engine's KV cache groups; others than ours are left out.
        """
        of_all = list(managers)
        self._managers = [m for m in of_all if isinstance(m, LambdaManager)]
        self._archives = [m for m in of_all if isinstance(m, ArchiveManager)]
        # Layers with a window of their own have a Λ of their own; a token is out of sight once
        # none of them sees it.
        self._patterns = {m.pattern for m in self._managers}
        self._last_reading = -INTERVAL_S
        self.searches: Sequence[int] = (0, 0)
        self._searches_told: Sequence[int] = (0, 0)

    def read(self, requests: Mapping[str, Request]) -> dict[str, int]:
        """The state at the end of a step; empty where it isn't time for a reading.

        Example: n_global 2, n_local 4, one request with 10 tokens computed. The next query, at 10,
        sees 0 and 1, and 7, 8, 9: five of the ten tokens are outside.

        Args:
            requests: the scheduler's requests by their id.

        Returns:
            Blocks pinned now, each once however many requests share it; blocks that left a window
            and went back to the pool since the last reading; tokens, summed over the requests that
            hold blocks, that no later query sees; where the middle is recalled, also the blocks of
            the archive that requests hold, and how many it has, and since the last reading the
            searches that kernels counted and how many of them weren't certain at once.
        """
        now = time.monotonic()
        is_early = now < self._last_reading + INTERVAL_S
        if not self._managers or (is_early and any(m.req_to_blocks for m in self._managers)):
            return {}
        self._last_reading = now
        pinned = 0
        freed = 0
        for manager in self._managers:
            num_pinned = manager.num_pinned_blocks
            lists = manager.req_to_blocks.values()
            pinned += len({block.block_id for blocks in lists for block in blocks[:num_pinned]})
            freed += manager.take_num_freed_blocks()
        outside = 0
        for request_id in self._managers[0].req_to_blocks:  # every group has the same requests
            request = requests.get(request_id)
            if request is not None:
                computed = request.num_computed_tokens
                outside += computed - num_seen(self._patterns, computed)
        numbers = {BLOCKS_PINNED: pinned, BLOCKS_FREED: freed, TOKENS_OUTSIDE: outside}
        for archive in self._archives:
            numbers |= {ARCHIVE_HELD: archive.num_pages_held, ARCHIVE_SIZE: archive.num_pages}
        if self._archives:
            told, self._searches_told = self._searches_told, self.searches
            for name, count, before in zip(_COUNTED, self.searches, told, strict=True):
                numbers[name] = count - before
        return numbers


class LambdaStatLogger(AggregateStatLoggerBase):
    """Shows the numbers of every engine that this process fronts, labelled as vLLM's own are.

    With several API servers each step's statistics reach one of them: gauges are those of the
    server that heard last, counters add up, and so each adds what is new and no more.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        labels = ["model_name", "engine"]
        model = vllm_config.model_config.served_model_name
        pinned = Gauge(
            f"vllm:{BLOCKS_PINNED}",
            "KV cache blocks held for the global tokens of LM-Infinite (n_global), for as long as "
            "their requests run; a block that several requests share counts once.",
            labels,
            multiprocess_mode="mostrecent",
        )
        freed = Counter(
            f"vllm:{BLOCKS_FREED}",
            "KV cache blocks given back to the pool because a window (LM-Infinite's n_local, or a "
            "layer's own) moved past them while their request ran.",
            labels,
        )
        outside = Gauge(
            f"vllm:{TOKENS_OUTSIDE}",
            "Tokens, of requests that hold KV cache blocks, that no later query sees in any layer: "
            "behind the window of LM-Infinite and not global.",
            labels,
            multiprocess_mode="mostrecent",
        )
        # As vLLM does for its own: prometheus_client has no Info for several processes.
        resolved = LambdaConfig.of(vllm_config)
        names = _OF_THE_LAMBDA + (() if resolved.middle is None else _OF_THE_MIDDLE)
        settings = {name: getattr(resolved, name) for name in names}
        info = Gauge(
            "vllm:lminf_config_info",
            "Settings of LM-Infinite, as labels: every token sees the first n_global tokens and "
            "the last n_local, and no distance counts as more than distance_limit; middle_top_k "
            "and what belongs to it say what is recalled of the rest.",
            [*labels, *settings],
            multiprocess_mode="mostrecent",
        )
        for index in engine_indexes:
            info.labels(model, str(index), *settings.values()).set(1)
        self._pinned = {index: pinned.labels(model, str(index)) for index in engine_indexes}
        self._freed = {index: freed.labels(model, str(index)) for index in engine_indexes}
        self._outside = {index: outside.labels(model, str(index)) for index in engine_indexes}
        self._archives: dict[str, dict[int, Gauge]] = {}
        self._searches: dict[str, dict[int, Counter]] = {}
        if resolved.middle is not None:
            what = {
                ARCHIVE_HELD: "that requests hold; one that several requests share counts once",
                ARCHIVE_SIZE: "in all",
            }
            for name, which in what.items():
                gauge = Gauge(
                    f"vllm:{name}",
                    f"Blocks of LM-Infinite's archive of the middle, in host memory, {which}.",
                    labels,
                    multiprocess_mode="mostrecent",
                )
                by_engine = {index: gauge.labels(model, str(index)) for index in engine_indexes}
                self._archives[name] = by_engine
            which_searches = {
                SEARCHES: "one for each head of a query that looks, in each layer",
                SEARCHES_REPEATED: "that weren't certain at once, and went over a part again",
            }
            for name, which in which_searches.items():
                counter = Counter(
                    f"vllm:{name}",
                    f"Searches of LM-Infinite's archive of the middle, {which}, in one of the "
                    "engine's workers; 0 for kernels that don't count them.",
                    labels,
                )
                by_index = {index: counter.labels(model, str(index)) for index in engine_indexes}
                self._searches[name] = by_index

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats and (numbers := unload(scheduler_stats)):
            self._pinned[engine_idx].set(numbers[BLOCKS_PINNED])
            self._freed[engine_idx].inc(numbers[BLOCKS_FREED])
            self._outside[engine_idx].set(numbers[TOKENS_OUTSIDE])
            for name, gauges in self._archives.items():
                gauges[engine_idx].set(numbers[name])
            for name, counters in self._searches.items():
                counters[engine_idx].inc(numbers[name])

    def log_engine_initialized(self) -> None:
        """Nothing to say: `LambdaMetadataBuilder` logs the settings in each worker."""
