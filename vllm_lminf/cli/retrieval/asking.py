"""The child process of ``vllm-lminf eval passkey`` and ``eval ruler``: one system is asked
everything.

A system is a vLLM engine in this process, or a server elsewhere. Prompts are made when they are
due: those of a long evaluation would not fit in memory together.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

from vllm_lminf.cli.child import serve_job
from vllm_lminf.cli.engines import start_engine
from vllm_lminf.cli.openai_server import Server
from vllm_lminf.cli.retrieval.task import Prompts, Task, find_task

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class AskingJob:
    """What one system is asked.

    Attributes:
        task: name of the measure.
        model: folder of the checkpoint; of a server, the tokenizer is read there.
        max_num_seqs: requests that run at once.
        cells: the questions as plain lists, in the order in which they are asked.
        dtype, compile, hf_overrides, lminf: of the engine, see `start_engine`.
        window: tokens in every layer's window; None for what the model has.
        kv_cache_bytes: size of the KV cache on a CPU; a GPU's memory is left to vLLM.
        url: where a server's ``/completions`` is; None for an engine.
        served_model: the server's name for the model; None to ask for it.
    """

    task: str
    model: str
    max_num_seqs: int
    cells: list[list[Any]] = field(default_factory=list)
    dtype: str = "auto"
    compile: bool | None = None
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    lminf: dict[str, Any] | None = None
    window: int | None = None
    kv_cache_bytes: int = 0
    url: str | None = None
    served_model: str | None = None

    def questions(self, task: Task) -> list[Any]:
        """Return the questions as the task knows them."""
        return [task.cell(*cell) for cell in self.cells]


def start(job: AskingJob) -> LLM:
    """Start the engine; raise where it has no such window as was asked for."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.platforms import current_platform

    options = {}
    if current_platform.is_cpu():
        options["kv_cache_memory_bytes"] = job.kv_cache_bytes
    llm = start_engine(
        model=job.model,
        dtype=job.dtype,
        max_model_len=max(cell.length for cell in job.questions(find_task(job.task))),
        max_num_seqs=job.max_num_seqs,
        compile=job.compile,
        hf_overrides=job.hf_overrides,
        lminf=job.lminf,
        **options,
    )
    if job.window is not None:
        layers = get_layers_from_vllm_config(llm.llm_engine.vllm_config, AttentionLayerBase)
        others = [
            name
            for name, layer in layers.items()
            if getattr(layer, "sliding_window", None) != job.window
        ]
        if others or not layers:
            raise RuntimeError(
                f"vLLM gives this model no window of {job.window} tokens in "
                f"{', '.join(others) or 'any layer'}: leave window out of --systems"
            )
    return llm


def ask_engine(llm: LLM, job: AskingJob, task: Task, prompts: Prompts) -> Iterator[tuple[Any, str]]:
    """Yield the answers of an engine, in the order in which they are ready."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    waiting = enumerate(job.questions(task))
    running: dict[str, Any] = {}
    while True:
        while len(running) < 2 * job.max_num_seqs and (following := next(waiting, None)):
            number, cell = following
            prompt = {"prompt_token_ids": prompts.prompt(cell)}
            running[str(number)] = cell
            params = SamplingParams(
                temperature=0.0,
                max_tokens=task.answer_tokens(cell),
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            llm.llm_engine.add_request(str(number), prompt, params)
        if not running:
            return
        for output in llm.llm_engine.step():
            yield running.pop(output.request_id), output.outputs[0].text


def ask_server(job: AskingJob, url: str, task: Task, prompts: Prompts) -> Iterator[tuple[Any, str]]:
    """Yield the answers of a server, in the order in which they arrive."""
    server, lock = Server(url, job.served_model), Lock()

    def ask(cell: Any) -> str:
        with lock:  # tokenizers are not for several threads at once
            prompt = prompts.prompt(cell)
        return server.complete(prompt, task.answer_tokens(cell))

    pool = ThreadPoolExecutor(job.max_num_seqs)
    try:
        asked = {pool.submit(ask, cell): cell for cell in job.questions(task)}
        for answer in as_completed(asked):
            yield asked[answer], answer.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def main() -> None:
    """Read an ``AskingJob`` from stdin and send every answer."""
    with serve_job() as (data, answers):
        from vllm.tokenizers import get_tokenizer

        job = AskingJob(**data)
        answers.send("phase", text="starting")
        task = find_task(job.task)
        prompts = task.prompts(get_tokenizer(job.model))
        # A length that can't be filled is refused before an engine starts.
        for cell in {c.length: c for c in job.questions(task)}.values():
            prompts.prompt(cell)
        if job.url is None:
            replies = ask_engine(start(job), job, task, prompts)
        else:
            replies = ask_server(job, job.url, task, prompts)
        answers.send("phase", text="asking")
        for cell, text in replies:
            answers.send("answer", cell=astuple(cell), text=text)
        answers.send("result", result=None)


if __name__ == "__main__":
    main()
