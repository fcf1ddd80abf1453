"""Sixteen runs of a chapter: on two workers against one after the other, and the second start of a finished sweep.

    python benchmarks/sweep.py [--runs 16] [--workers 2] [--chapter 00_why_compact] [-p epochs 1 -p seeds 1]

Both times include everything from the command's start to its end, the Dask cluster too. Bars: ratio at most 0.6, second
start below 5 s. Each single run may use all cores; in the sweep the workers share them. On a machine that does other
work at the same time the ratio says little.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

from fishlib.rerun.sweep import cores


def seconds(*words: str) -> float:
    """How long a `fishlib` command takes; an error if it fails."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fishlib.rerun.cli", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chapter", default="00_why_compact")
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("-p", dest="given", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    arguments = parser.parse_args()
    fixed = [word for name, value in arguments.given for word in ("-p", name, value)]
    print(f"{arguments.runs} runs of {arguments.chapter} {' '.join(fixed)}; {cores()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as out:
        # One run first, so that files are in the page cache and libraries byte-compiled for both sides.
        seconds("run", arguments.chapter, *fixed, "--out", f"{out}/warm")
        single = sum(seconds("run", arguments.chapter, *fixed, "-p", "seed", str(seed), "--out", f"{out}/single/{seed}")
                     for seed in range(arguments.runs))
        print(f"one after the other: {single:.1f} s ({single / arguments.runs:.1f} s a run), "
              f"load {os.getloadavg()[0]:.1f}", flush=True)
        sweep = ["sweep", arguments.chapter, *fixed, "-g", f"seed=0..{arguments.runs - 1}", "--workers",
                 str(arguments.workers), "--out", f"{out}/sweep"]
        together = seconds(*sweep)
        print(f"on {arguments.workers} workers: {together:.1f} s, load {os.getloadavg()[0]:.1f}", flush=True)
        again = seconds(*sweep)
    print(f"ratio {together / single:.2f} (bar 0.6); second start {again:.1f} s (bar 5 s)")


if __name__ == "__main__":
    main()
