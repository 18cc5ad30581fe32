#!/usr/bin/env python3
"""Draws the memory of a node while it imports a model.

    timeline.py COEL MODEL [MEMORY]

COEL is the program, MODEL a checkpoint folder, MEMORY the node's budget (32GiB unless given). Starts a mesh of one node in a
temporary folder, which must have room for the slices, and reads the node's resident memory four times a second until the
import is over. Prints one line for each tenth of it, and the most there was.
"""
import subprocess
import sys
import tempfile
import time

COEL, MODEL = sys.argv[1:3]
MEMORY = sys.argv[3] if len(sys.argv) > 3 else "32GiB"
BAR_MB = 10


def resident_mb(pid):
    lines = open(f"/proc/{pid}/status").read().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))


def main():
    with tempfile.TemporaryDirectory() as data:
        flags = ["--api", "127.0.0.1:0", "--memory", MEMORY, "--listen", "/ip4/127.0.0.1/tcp/0"]
        node = subprocess.Popen([COEL, "up", "--new", "--data", data, *flags], stderr=subprocess.DEVNULL)
        try:
            while subprocess.run([COEL, "status", "--data", data], capture_output=True).returncode:
                time.sleep(0.1)
            before, start, timeline = resident_mb(node.pid), time.monotonic(), []
            command = [COEL, "model", "import", MODEL, "--data", data]
            importing = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while importing.poll() is None:
                timeline.append((time.monotonic() - start, resident_mb(node.pid)))
                time.sleep(0.25)
            if importing.returncode:
                sys.exit("the import failed; run it by hand to see why")
        finally:
            node.terminate()
            node.wait()
    print(f"resident before the import: {before:.0f} MB; seconds and MB during it:")
    for tenth in range(10):
        part = timeline[len(timeline) * tenth // 10 : max(len(timeline) * (tenth + 1) // 10, 1)]
        most = max(mb for _, mb in part) if part else 0
        print(f"{part[-1][0] if part else 0:6.1f} {most:6.0f} {'#' * int(most / BAR_MB)}")
    print(f"most: {max(mb for _, mb in timeline):.0f} MB in {timeline[-1][0]:.1f} s")


main()
