"""``python -m vllm_lminf`` is ``vllm-lminf``, for where the scripts of an environment aren't on the
path."""

import sys

from vllm_lminf.cli.main import main

sys.exit(main())
