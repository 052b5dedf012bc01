"""The merges of mergekit's own tests, each made by pxmerge too, and compared.

    git clone https://github.com/arcee-ai/mergekit
    python benchmarks/mergekit_tests.py mergekit --peer path/to/venv                          # with mergekit and pytest
    python benchmarks/mergekit_tests.py mergekit --peer path/to/venv --page docs/mergekit.md

Runs the tests of a clone in mergekit's environment. Every config that they merge goes to `pxmerge run` as well, while
the models that the test made are there, computed in float32 and with nothing that depends on chance. ``--page`` puts
the table between the marks of a page.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from mergekit_configs import TOLERANCE, certain, compare, merge_here, put, read

HOOK = """
import json, os, re, shutil, sys
import pytest
from mergekit.config import MergeConfiguration
import mergekit.merge
merge, work = mergekit.merge.run_merge, sys.argv[1]
answers = os.fdopen(int(sys.argv[2]), "w"), os.fdopen(int(sys.argv[3]))

def merged(config, out_path, options, *rest, **named):
    test = re.sub(r".*::(\\\\S+) .*", r"\\\\1", os.environ["PYTEST_CURRENT_TEST"])
    answers[0].write(json.dumps([test, config.to_yaml()]) + "\\\\n")
    answers[0].flush()
    changed = json.loads(answers[1].readline())
    error = None
    try:
        merge(MergeConfiguration.model_validate(changed), work + "/there", options)
    except BaseException as failure:
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300]
    answers[0].write(json.dumps(error) + "\\\\n")
    answers[0].flush()
    answers[1].readline()
    return merge(config, out_path, options, *rest, **named)

mergekit.merge.run_merge = merged
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--no-header", *sys.argv[4:]]))
""".replace("\\\\", "\\")
"""What runs in mergekit's environment: it tells of a merge, makes the one that it is answered, then the test's own."""


def compare_renamed(here: Path, there: Path) -> tuple[str, str]:
    """The same, whatever the models within a model are called; mergekit writes the names that its tables give."""
    ours, theirs = (
        {".".join(part for part in name.split(".") if not part.endswith("model")): value for name, value in tensors}
        for tensors in (read(here).items(), read(there).items())
    )
    if not theirs.keys() <= ours.keys():
        return compare(here, there)
    worst = max(
        ((ours[name] - value).abs().max() / value.abs().max().clamp(min=1e-9)).item() for name, value in theirs.items()
    )
    less = len(ours) - len(theirs)
    lost = f"; mergekit leaves out {less} of {len(ours)} tensors" if less else ""
    return ("equal" if worst <= TOLERANCE else "differs"), f"{worst:.0e} of the largest value; other names{lost}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="a clone of mergekit")
    parser.add_argument(
        "--peer",
        type=Path,
        required=True,
        help="a virtual environment with mergekit and pytest",
    )
    parser.add_argument("--tests", nargs="+", help="arguments of pytest, for some of them")
    parser.add_argument("--page", type=Path, help="a page that takes the table")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="pxmerge-tests-"))
    (here, there), config = (work / "here", work / "there"), work / "config.yml"
    told, tell = os.pipe()
    asked, answer = os.pipe()
    command = [
        options.peer.absolute() / "bin/python",
        "-P",
        "-c",
        HOOK,
        work,
        str(tell),
        str(asked),
        *(options.tests or ["tests"]),
    ]
    peer = subprocess.Popen(command, cwd=options.clone, pass_fds=(tell, asked), stdout=subprocess.DEVNULL)
    os.close(tell)
    os.close(asked)
    rows: dict[tuple[str, str, str], list[str]] = {}
    with os.fdopen(told) as questions, os.fdopen(answer, "w") as answers:

        def reply(document: object) -> None:
            answers.write(json.dumps(document) + "\n")
            answers.flush()

        for line in questions:
            test, text = json.loads(line)
            document = certain(yaml.safe_load(text)) | {"dtype": "float32"}
            document.pop("out_dtype", None)
            config.write_text(yaml.safe_dump(document, sort_keys=False))
            for folder in (here, there):
                shutil.rmtree(folder, ignore_errors=True)
            ours = merge_here(config, here)
            reply(document)
            theirs = json.loads(questions.readline())
            if ours is None and theirs is None:
                verdict, cause = compare(here, there)
                if verdict == "other names":
                    verdict, cause = compare_renamed(here, there)
            else:
                verdict = "neither runs it" if ours and theirs else "refused here" if ours else "only here"
                cause = (ours or f"mergekit: {theirs}").replace("|", "/")
            print(
                test,
                document["merge_method"],
                verdict,
                cause,
                file=sys.stderr,
                flush=True,
            )
            rows.setdefault((test, document["merge_method"], verdict), []).append(cause)
            reply(None)
    peer.wait()
    shutil.rmtree(work, ignore_errors=True)
    lines = [
        "| test | method | merges | outcome | difference or cause |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (test, method, verdict), causes in rows.items():
        worst = max(
            causes,
            key=lambda cause: float(cause.split()[0]) if verdict == "equal" else 0,
        )
        lines.append(f"| {test} | {method} | {len(causes)} | {verdict} | {worst} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if options.page is not None:
        put(options.page, "tests", table)


if __name__ == "__main__":
    main()
