from __future__ import annotations

import argparse
import sys
from pathlib import Path

import benchmarks.quality
from benchmarks.quality.experiment import find_experiments
from benchmarks.quality.runner import run


def main() -> int:
    known = find_experiments()
    titles = ", ".join(known)
    named = [name for name, one in known.items() if not one.by_default]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=benchmarks.quality.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "experiments",
        nargs="*",
        metavar="EXPERIMENT",
        help=f"{titles}; all but {', '.join(named)} by default",
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ...; 5 by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes; 1 by default")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep what is made here, and go on with it")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="those to compare, of experiments that compare every method"
    )
    parser.add_argument("--at-scale-1", action="store_true", help="do not look for the best scale of each of them")
    given = parser.parse_args()
    if unknown := [name for name in given.experiments if name not in known]:
        parser.error(f"no such experiment: {', '.join(unknown)}; there are {', '.join(known)}")
    if given.seeds < 1 or given.jobs < 1:
        parser.error("--seeds and --jobs are at least 1")
    chosen = {name: known[name] for name in given.experiments or [name for name in known if name not in named]}
    return 0 if run(chosen, given.seeds, given.jobs, given.work, given.methods, not given.at_scale_1) else 1


if __name__ == "__main__":
    sys.exit(main())
