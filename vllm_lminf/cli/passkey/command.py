"""Hide numbers in long texts and ask for them: the paper's passkey task, at several lengths and
depths.

Each system is a real vLLM engine in a process of its own, one after the other:

  lminf    LMINF as it is
  middle   LMINF that recalls the middle: with --middle-top-k
  window   vLLM's own sliding window of n_local tokens
  full     vLLM's own attention, as the model has it

or, with --url, a server that is running. What is generated greedily behind "What is the pass key?
The pass key is" counts as found when its first five digits in a row are the key.

Written to the output folder: answers.jsonl, from which the same command goes on after an
interruption, passkey.json, a heat map per system, and the engines' logs.
"""

from __future__ import annotations

import argparse

from vllm_lminf.cli.lengths import parse_lengths
from vllm_lminf.cli.passkey.task import TASK, cells_of, even_depths
from vllm_lminf.cli.retrieval import command

HELP = "hide numbers in long texts, and count those that a model can repeat"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``eval passkey``."""
    command.add_arguments(parser)
    command.add_number(
        parser, "depths", 10, "places of the key, the middles of as many equal parts of the text"
    )
    command.add_number(parser, "keys", 10, "keys for each length and depth")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the evaluation; raises ``CliError`` for what the user can put right."""
    lengths = parse_lengths(",".join(args.lengths))
    depths = even_depths(args.depths)
    cells = list(cells_of(lengths, depths, args.keys, args.seed))
    return command.run_task(args, TASK, cells, depths, args.keys)
