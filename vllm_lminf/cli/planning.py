"""The child process of ``vllm-lminf plan``: what a request takes, by the specs that an engine's
pool is planned from.

For each kind of attention vLLM's configuration is made as a server makes it, and its model as an
outline. The layers' caches, the plan of the pool and the bound on what a request holds are then the
engine's own; nothing is loaded or allocated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_lminf.cli import outline
from vllm_lminf.cli.child import serve_job
from vllm_lminf.errors import SettingsError, UnsupportedError
from vllm_lminf.pattern import cdiv
from vllm_lminf.plugin.config import BACKEND_NAME, SECTION, is_backend_name

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

SHARES_OF_TRAINED = (1, 2, 4)
"""Default windows: the trained length divided by these."""

FULL, LMINF, MIDDLE = "full", "lminf", "middle"


@dataclass(frozen=True)
class PlanJob:
    """What is to be planned.

    Attributes:
        model: folder or name of the checkpoint.
        max_model_len: tokens of a request.
        memory: bytes for the KV cache, of all devices together.
        n_local: windows; empty for shares of the trained length.
        settings: LMINF's others.
        middle_top_k: of the rows that recall the middle; 0 for no such rows.
        engine: options of vLLM's engine.
    """

    model: str
    max_model_len: int
    memory: int
    n_local: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    middle_top_k: int = 0
    engine: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One kind of attention.

    Attributes:
        attention: "full", "lminf" or "middle".
        settings: LMINF's, as they are resolved; None without LMINF.
        block_size: tokens of a block.
        block_bytes: what a block of the pool takes, in all layers that share it.
        request_blocks: the most that a request of this length holds at once.
        pool_blocks: in the memory, vLLM's null block aside.
        archive_page_bytes: on the host, for a block of tokens; 0 without an archive.
        archive_request_pages, archive_pages: as for blocks.
        refused: why it can't be served; everything else is then 0.
    """

    attention: str
    settings: dict[str, Any] | None
    block_size: int = 0
    block_bytes: int = 0
    request_blocks: int = 0
    pool_blocks: int = 0
    archive_page_bytes: int = 0
    archive_request_pages: int = 0
    archive_pages: int = 0
    refused: list[str] = field(default_factory=list)

    @property
    def request_bytes(self) -> int:
        """Of KV cache, on the devices."""
        return self.request_blocks * self.block_bytes

    @property
    def archive_request_bytes(self) -> int:
        """On the host."""
        return self.archive_request_pages * self.archive_page_bytes

    @property
    def requests(self) -> int:
        """How many of them fit at once."""
        if self.refused:
            return 0
        on_devices = self.pool_blocks // self.request_blocks
        if not self.archive_request_pages:
            return on_devices
        return min(on_devices, self.archive_pages // self.archive_request_pages)


@dataclass(frozen=True)
class Plan:
    """All rows, and what they have in common.

    Attributes:
        trained_length: in tokens; None if the model's configuration doesn't tell.
        max_in_flight_tokens: of a request, with LMINF; its bound depends on it.
        device: what vLLM would run on.
    """

    trained_length: int | None
    max_in_flight_tokens: int
    device: str
    rows: list[Row]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild it from what ``dataclasses.asdict`` made of it."""
        return cls(**{**data, "rows": [Row(**row) for row in data["rows"]]})


def make_plan(job: PlanJob) -> Plan:
    """Plan every row.

    Raises:
        ValueError: an option isn't known, or isn't one to plan with.
    """
    from vllm_lminf.plugin import trained_length

    arguments = outline.parse_engine_arguments(
        job.model, ["--max-model-len", str(job.max_model_len), *job.engine]
    )
    for size, name in (
        (arguments.tensor_parallel_size, "--tensor-parallel-size"),
        (arguments.pipeline_parallel_size, "--pipeline-parallel-size"),
    ):
        if size > 1:
            raise ValueError(
                f"leave {name} out: --memory, and all that is shown, are of all devices together"
            )
    stock = configure(arguments, None)
    drafter = stock.speculative_config
    if drafter is not None and drafter.uses_draft_kv_cache():
        raise ValueError(
            f"speculative decoding with method {drafter.method!r}: the drafter has a KV cache too, "
            "which isn't planned here; leave it out"
        )
    trained = trained_length.of(stock.model_config).length
    windows = job.n_local or _default_windows(trained)
    planner = _Planner(job, arguments)
    rows = [planner.row(FULL, None)]
    rows += [planner.row(LMINF, {**job.settings, "n_local": n_local}) for n_local in windows]
    if job.middle_top_k:
        recalling = {**job.settings, "middle_top_k": job.middle_top_k}
        rows += [planner.row(MIDDLE, {**recalling, "n_local": n_local}) for n_local in windows]
    device = stock.device_config.device_type
    return Plan(trained, stock.max_in_flight_tokens, device, rows)


def _default_windows(trained: int | None) -> list[int]:
    if trained is None:
        raise ValueError("the model's config names no trained length: give --n-local")
    return [trained // share for share in SHARES_OF_TRAINED if trained >= share]


def configure(arguments: EngineArgs, settings: Mapping[str, Any] | None) -> VllmConfig:
    """An engine's configuration, with LMINF and these settings, or with vLLM's own attention."""
    given = copy.deepcopy(arguments)
    if settings is None:
        if is_backend_name(str(given.attention_backend)):
            given.attention_backend = None
    else:
        given.attention_backend = BACKEND_NAME
        given.additional_config = {**(given.additional_config or {}), SECTION: dict(settings)}
    return outline.configure(given)


class _Planner:
    """Plans one row after the other; the outline of a model with LMINF serves all of its rows,
    which differ in their settings alone."""

    def __init__(self, job: PlanJob, arguments: EngineArgs) -> None:
        self._job = job
        self._arguments = arguments
        self._with_lminf: VllmConfig | None = None
        self._models: list[Any] = []  # vLLM's configurations know their layers, not the models

    def row(self, attention: str, settings: Mapping[str, Any] | None) -> Row:
        """One row, or why there is none."""
        try:
            config = configure(self._arguments, settings)
            if settings is None or self._with_lminf is None:
                self._models.append(outline.build(config))
            if settings is not None:
                outlined = self._with_lminf or config
                self._with_lminf = outlined
                resolved = config.additional_config
                config = copy.copy(outlined)
                config.additional_config = resolved
            return self._planned(attention, config)
        except UnsupportedError as error:
            refused = error.reasons
        except SettingsError as error:
            refused = error.problems
        return Row(attention, None if settings is None else dict(settings), refused=refused)

    def _planned(self, attention: str, config: VllmConfig) -> Row:
        from vllm_lminf.plugin import archive, versions
        from vllm_lminf.plugin.config import LambdaConfig

        resolved = None if attention == FULL else LambdaConfig.of(config)
        specs = dict(_specs(config, with_lminf=resolved is not None))
        (pool,) = versions.plan_pools(config, [specs], [outline.AMPLE])
        block_bytes = pool.kv_cache_tensors[0].size // pool.num_blocks
        pages = None if resolved is None else archive.pages_of(config, [pool])
        of_archive: dict[str, Any] = {}
        if resolved is not None and pages is not None:
            of_archive = {
                "archive_page_bytes": pages.bytes_in_all_layers,
                "archive_request_pages": cdiv(self._job.max_model_len, pages.page.block_size),
                "archive_pages": max(0, pages.num_within(resolved.archive_gib) - 1),
            }
        return Row(
            attention,
            None if resolved is None else asdict(resolved),
            block_size=next(iter(specs.values())).block_size,
            block_bytes=block_bytes,
            request_blocks=_blocks_of_request(config, pool),
            pool_blocks=max(0, self._job.memory // block_bytes - 1),
            **of_archive,
        )


def _specs(config: VllmConfig, with_lminf: bool) -> Iterator[tuple[str, KVCacheSpec]]:
    """The cache of each layer, as a worker's model runner gathers them."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_lminf.plugin.backend import kept_by_its_pattern

    for name, layer in get_layers_from_vllm_config(config, AttentionLayerBase).items():
        if getattr(layer, "kv_sharing_target_layer_name", None):
            continue
        spec = layer.get_kv_cache_spec(config)
        if spec is None:
            continue
        if isinstance(spec, AttentionSpec):
            if with_lminf:
                spec = kept_by_its_pattern(config, spec)
            else:
                spec = layer.get_attn_backend().customize_spec(spec)
        yield name, spec


def _blocks_of_request(config: VllmConfig, pool: KVCacheConfig) -> int:
    """Of the pool, which all groups of layers take theirs from; as vLLM counts them where it says
    how many requests there is room for."""
    return sum(
        cdiv(
            group.kv_cache_spec.max_memory_usage_bytes(config),
            group.kv_cache_spec.page_size_bytes,
        )
        for group in pool.kv_cache_groups
    )


def main() -> None:
    """Read a ``PlanJob`` from stdin and answer with a ``Plan``."""
    with serve_job() as (data, answers):
        answers.send("result", result=asdict(make_plan(PlanJob(**data))))


if __name__ == "__main__":
    main()
