#!/usr/bin/env python3
"""Raises every expert of a mesh from Q4 to Q8 in the middle of a streamed answer, and prints the gaps between tokens.

    raise.py COEL MODEL

COEL is the program, MODEL a checkpoint folder. Starts a mesh of one node in a temporary folder, imports the model, asks
for q4, begins a long answer, asks for q8 after its 50th token, and prints one JSON document: tokens before, during and
after the change, the largest gap in each, how long the change took, and the precisions that the answer's usage names.
"""
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

COEL, MODEL = sys.argv[1:]
TOKENS = 1500


def coel(*arguments, data):
    command = [COEL, *arguments, "--data", data]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def wait_until(what, done):
    for _ in range(600):
        if done():
            return
        time.sleep(0.1)
    sys.exit(f"{what}: not within a minute")


def status(data):
    return json.loads(coel("status", "--json", data=data))


def precisions(data):
    """How many experts the node holds at which precision."""
    return {name: count for name, count in status(data)["own"]["precisions"].items() if count}


def main():
    with tempfile.TemporaryDirectory() as data:
        node = subprocess.Popen(
            [COEL, "up", "--new", "--data", data, "--api", "127.0.0.1:0", "--memory", "2GiB", "--listen", "/ip4/127.0.0.1/tcp/0"], stderr=subprocess.DEVNULL
        )
        try:
            wait_until("a node", lambda: subprocess.run([COEL, "status", "--data", data], capture_output=True).returncode == 0)
            coel("model", "import", MODEL, data=data)
            coel("model", "precision", "q4", data=data)
            wait_until("q4", lambda: set(precisions(data)) == {"q4"} and status(data)["readiness"]["ready"])
            print(json.dumps(measure(data)))
        finally:
            node.terminate()
            node.wait()


def measure(data):
    api = json.load(open(f"{data}/node.json"))["api"]
    body = {
        "prompt": "Once upon a time", "max_tokens": TOKENS, "stream": True, "temperature": 1.0, "seed": 1,
        "stream_options": {"include_usage": True},
    }
    body["model"] = json.load(urllib.request.urlopen(f"{api}/v1/models"))["data"][0]["id"]
    request = urllib.request.Request(
        f"{api}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    times, usage, change = [], None, {}

    def raise_all():
        change["from"] = time.monotonic()
        coel("model", "precision", "q8", data=data)
        wait_until("q8", lambda: set(precisions(data)) == {"q8"})
        change["to"] = time.monotonic()

    raising = threading.Thread(target=raise_all)
    for line in urllib.request.urlopen(request):
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        usage = event.get("usage") or usage
        times.append(time.monotonic())
        if len(times) == 50:
            raising.start()
    raising.join()
    gaps = list(zip(times, (after - before for before, after in zip(times, times[1:]))))
    during = [gap for at, gap in gaps if change["from"] <= at <= change["to"]]
    others = [gap for at, gap in gaps if not change["from"] <= at <= change["to"]]
    return {
        "experts": sum(precisions(data).values()),
        "seconds": round(change["to"] - change["from"], 2),
        "tokens": len(times),
        "tokens_during": len(during),
        "largest_gap_ms_during": round(1e3 * max(during), 1),
        "largest_gap_ms_otherwise": round(1e3 * max(others), 1),
        "usage": usage,
    }


main()
