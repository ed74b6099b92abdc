"""Ask for what long texts hold, in five synthetic tasks of RULER (Hsieh et al. 2024):

  niah_single_1  a number in noise
  niah_multikey  one of four numbers in noise
  vt             the variables at the end of a chain of assignments
  cwe            the ten words that come more often than others
  fwe            the three words that come most often, by Zipf's law

They are made here, after the paper's description and in words of our own: figures compare systems,
and not with the paper's tables. Each system is a real vLLM engine in a process of its own:

  lminf    LMINF as it is
  middle   LMINF that recalls the middle: with --middle-top-k
  window   vLLM's own sliding window of n_local tokens
  full     vLLM's own attention, as the model has it

or, with --url, a server that is running. Answers are generated greedily, without a chat template.

Written to the output folder: answers.jsonl, from which the same command goes on after an
interruption, ruler.json, a heat map per system, and the engines' logs.
"""

from __future__ import annotations

import argparse

from vllm_lminf.cli.engines import parse_names
from vllm_lminf.cli.lengths import parse_lengths
from vllm_lminf.cli.retrieval import command
from vllm_lminf.cli.ruler.task import TASK, TASKS, cells_of

HELP = "ask for what long texts hold, in five synthetic tasks of RULER"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``eval ruler``."""
    command.add_arguments(parser)
    parser.add_argument(
        "--tasks", default=",".join(TASKS), help="which, with commas between (default: %(default)s)"
    )
    command.add_number(parser, "samples", 10, "questions for each length and task")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the evaluation; raises ``CliError`` for what the user can put right."""
    lengths = parse_lengths(",".join(args.lengths))
    tasks = parse_names("--tasks", args.tasks, TASKS)
    cells = list(cells_of(lengths, tasks, args.samples, args.seed))
    return command.run_task(args, TASK, cells, tasks, args.samples)
