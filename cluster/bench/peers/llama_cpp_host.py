"""llama.cpp behind `host_protocol`: continuous batching over the library's sequences, greedy.

Runs in the environment of llama-cpp-python. One `llama_decode` a step takes the next token of every running
request (with its prompt lookup drafts, if any) and fills the rest of the batch with prompts, as llama.cpp's
own server does. Flash attention and memory mapping are left at the library's defaults.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

if TYPE_CHECKING:
    from cluster.bench.peers.host_protocol import Channel, Message
    from cluster.bench.peers.llama_cpp_library import Library
    from cluster.bench.peers.llama_cpp_scheduler import Scheduler
else:
    from host_protocol import Channel, Message
    from llama_cpp_library import Library
    from llama_cpp_scheduler import Scheduler


def serve(scheduler: Scheduler, inbox: queue.Queue[Message]) -> None:
    while True:
        with contextlib.suppress(queue.Empty):
            while True:
                message = inbox.get(block=not scheduler.busy)
                if message["op"] == "stop":
                    return
                scheduler.handle(message)
        scheduler.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--unified", action="store_true", help="one KV buffer for all sequences")
    parser.add_argument("--prompt-lookup", type=int, default=0, help="draft tokens; 0 for none")
    parser.add_argument("--ngram", type=int, default=2, help="longest n-gram that is looked up")
    args = parser.parse_args()
    channel = Channel()
    # A draft may reach past the last token that is emitted.
    width = args.max_model_len + args.prompt_lookup
    library = Library(args.model, args.slots, width, args.threads, args.unified)
    draft: Any = None
    if args.prompt_lookup:
        draft = LlamaPromptLookupDecoding(args.ngram, args.prompt_lookup)
    inbox: queue.Queue[Message] = queue.Queue()
    channel.listen(inbox.put)
    versions = {"python": sys.version.split()[0], "llama-cpp-python": version("llama-cpp-python")}
    lookup = {"prompt_lookup": args.prompt_lookup, "ngram": args.ngram} if args.prompt_lookup else {}
    channel.hello(versions, library.options | lookup)
    serve(Scheduler(library, channel, args.slots, args.max_model_len, draft), inbox)


if __name__ == "__main__":
    main()
