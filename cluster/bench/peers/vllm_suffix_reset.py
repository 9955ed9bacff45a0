"""Forgetting earlier answers in vLLM's suffix decoding, which vLLM itself never does.

vLLM mixes the class into its worker (`worker_extension_cls`), whose process has no other way in.
"""

from __future__ import annotations

from typing import Any


class SuffixReset:
    model_runner: Any

    def forget_suffixes(self) -> None:
        """Only while nothing runs: an empty cache in place of the one with the trees of earlier requests."""
        drafter = self.model_runner.drafter
        old = drafter.suffix_cache
        drafter.suffix_cache = type(old)(
            max_tree_depth=old.max_tree_depth, max_cached_requests=old.max_cached_requests
        )
