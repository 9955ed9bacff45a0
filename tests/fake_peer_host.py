"""A peer's script for tests: counts up from the last prompt token, one token every `--step` seconds.

Prompts choose what happens: [13] crashes, [0] never answers, [7] answers with an error, [99] breaks the
protocol. "reset" is answered with the cancellations seen so far.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import time

import host_protocol
from host_protocol import Channel, SpeculationTally


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", type=float, default=0.001)
    parser.add_argument("--fail", choices=("start", "silent", "deaf"))
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--grace", type=float, default=10.0)
    args = parser.parse_args()
    host_protocol.EXIT_GRACE_S = args.grace
    channel = Channel()
    print("this goes to standard error", flush=True)
    versions = {}
    if args.child:
        versions["child"] = str(subprocess.Popen(["sleep", "60"]).pid)
        print(versions["child"], flush=True)
    if args.fail == "start":
        print("no such weights", file=sys.stderr)
        raise SystemExit(3)
    if args.fail == "silent":
        time.sleep(60)
    inbox: queue.Queue[dict] = queue.Queue()
    channel.listen(inbox.put)
    channel.hello(versions, {"step": args.step})
    if args.fail == "deaf":
        time.sleep(60)
    running: dict[str, tuple[int, int]] = {}
    cancelled: list[str] = []
    while True:
        try:
            while True:
                message = inbox.get(timeout=args.step)
                if message["op"] == "stop":
                    return
                if message["op"] == "cancel":
                    running.pop(message["id"], None)
                    cancelled.append(message["id"])
                elif message["op"] == "reset":
                    channel.send({"event": "tokens", "id": "nobody", "token_ids": [1]})
                    channel.send({"event": "reset", "id": message["id"]})
                    print(json.dumps(cancelled), file=sys.stderr)
                elif message["prompt_ids"] == [13]:
                    print("assertion failed: unlucky", file=sys.stderr)
                    sys.stderr.flush()
                    raise SystemExit(9)
                elif message["prompt_ids"] == [7]:
                    channel.error(message["id"], "seven is refused")
                elif message["prompt_ids"] == [99]:
                    channel.send({"event": "tokens"})
                elif message["prompt_ids"] != [0]:
                    running[message["id"]] = (message["prompt_ids"][-1], message["max_tokens"])
        except queue.Empty:
            pass
        for request_id, (last, left) in list(running.items()):
            channel.send({"event": "tokens", "id": request_id, "token_ids": [last + 1]})
            running[request_id] = (last + 1, left - 1)
            if left == 1:
                del running[request_id]
                tally = SpeculationTally()
                tally.record(4, 2)
                tally.record(0, 0)
                tally.record(4, 3)
                done = {"event": "done", "id": request_id, "finish_reason": "length"}
                channel.send({**done, "speculation": tally.as_message()})


if __name__ == "__main__":
    main()
