"""The command `python -m benchmarks VERB`: options and exit codes (0 done, 2 a user's mistake, 130 interrupted)."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from benchmarks import evals, ladder, plan_grid, plot, process, report, rows, serve, settings, shapes, train
from tunelet.errors import TuneletError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="tunelet beside its peers, measured.")
    verbs = top.add_subparsers(dest="verb", required=True)
    t = verbs.add_parser("train", help="the training step beside a peer's, in turns on the same rows")
    t.add_argument(
        "--method", choices=train.METHODS, default="sft", help="lora: sft of a rank-16 adapter on all layers"
    )
    t.add_argument("--peer", choices=sorted(train.PEERS), help="default: tunelet alone")
    t.add_argument("--rows", choices=sorted(rows.KINDS), default="long", help="lengths of rows: see benchmarks/rows.py")
    t.add_argument("--shape", choices=list(shapes.SHAPES), default="135M")
    t.add_argument("--pairs", type=_positive, default=5)
    t.add_argument("--steps", type=_positive, default=3, help="timed optimizer steps of each contestant in each pair")
    t.add_argument("--warm", type=_positive, default=1, help="steps before the clock starts")
    t.add_argument("--only", action="append", default=[], metavar="CONTESTANT", help="leave the others out")
    _common(t)
    t.add_argument("--peer-set", action="append", default=[], metavar="KEY=JSON", help="a setting of the peer's config")
    t.add_argument("--batch-size", type=_positive, default=8, help="rows of an optimizer step")
    t.add_argument("--compile", action="store_true", help="the same as --set train.compile=true")
    t.set_defaults(run=train.run)

    e = verbs.add_parser("eval", help="scoring of benchmark items beside a peer's, item by item")
    e.add_argument("--model", required=True, metavar="M", help=f"a folder, starter, or {', '.join(shapes.SHAPES)}")
    e.add_argument("--task", required=True, action="append", metavar="T", help="as tunelet eval has it; repeatable")
    e.add_argument("--data", action="append", default=[], metavar="D", help="a folder or file with the task's rows")
    e.add_argument("--subset", action="append", default=[], metavar="NAME", help="of mmlu: this one; repeatable")
    e.add_argument("--num-fewshot", type=int, metavar="N", help="default: the task's own")
    e.add_argument("--limit", type=int, default=0, metavar="N", help="the first so many items of each subset")
    e.add_argument("--peer", choices=sorted(evals.PEERS), help="default: tunelet alone")
    e.add_argument("--pairs", type=_positive, default=3)
    e.add_argument("--batch-size", type=_positive, default=16, help="sequences of one forward, for both")
    e.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    _common(e)
    e.set_defaults(run=evals.run)

    v = verbs.add_parser("serve", help="the server beside a peer's, for one client and for many")
    v.add_argument("--model", default="135M", metavar="M", help=f"a folder, starter, or {', '.join(shapes.SHAPES)}")
    v.add_argument("--engine", choices=("torch", "llama.cpp"), default="llama.cpp", help="tunelet's")
    v.add_argument("--quant", default="q8_0", metavar="Q", help="of llama.cpp's file, for both")
    v.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of transformers")
    v.add_argument("--peer", choices=serve.PEERS, help="default: tunelet alone")
    v.add_argument("--pairs", type=_positive, default=3)
    v.add_argument("--clients", type=_positive, nargs="+", default=[1, 4, 16, 32])
    v.add_argument("--prompt", type=_positive, default=64, help="tokens of a prompt")
    v.add_argument("--shared", type=int, default=0, help="tokens in front of it that all prompts share")
    v.add_argument("--answer", type=_positive, default=64, help="tokens of an answer")
    v.add_argument("--rounds", type=_positive, default=2, help="requests of each client, one after the other")
    v.add_argument("--vocabulary", type=_positive, default=2000, help="prompts are made of token ids below it")
    _common(v)
    v.set_defaults(run=serve.run)

    s = verbs.add_parser("settings", help="which settings make the peer fastest on this machine")
    s.add_argument("--method", choices=("sft", "lora"), default="sft")
    s.add_argument("--peer", choices=sorted(train.PEERS), default="trl")
    s.add_argument("--rows", choices=sorted(rows.KINDS), default="long")
    s.add_argument("--shape", choices=list(shapes.SHAPES), default="135M")
    s.add_argument("--steps", type=_positive, default=2, help="timed optimizer steps of each")
    s.add_argument("--warm", type=_positive, default=1, help="steps before the clock starts")
    s.add_argument("--only", default="", metavar="TEXT", help="try those with this in their names")
    _common(s)
    s.set_defaults(run=settings.run, batch_size=8, compile=False)

    ladder_ = verbs.add_parser("ladder", help="tunelet's rate and memory over sizes, ways to train, and rows")
    ladder_.add_argument("--shape", nargs="+", choices=list(shapes.SHAPES), default=["135M", "360M", "1.7B"])
    ladder_.add_argument("--mode", nargs="+", choices=list(ladder.MODES), default=["full", "lora", "lora-int8"])
    ladder_.add_argument(
        "--rows", nargs="+", default=["long"], metavar="KIND", help="long, short, or a number of tokens"
    )
    ladder_.add_argument("--batch-size", nargs="+", type=_positive, default=[8], help="rows of an optimizer step")
    ladder_.add_argument("--steps", type=_positive, default=1, help="timed optimizer steps of each rung")
    ladder_.add_argument("--warm", type=_positive, default=1, help="steps before the clock starts")
    _common(ladder_)
    ladder_.set_defaults(run=ladder.run)

    grid = verbs.add_parser("plan", help="predicted and actual time and memory over a grid of configurations")
    grid.add_argument("--shape", nargs="+", choices=list(plan_grid.BATCH), default=["135M", "360M", "1.7B"])
    grid.add_argument("--mode", nargs="+", choices=list(plan_grid.MODES), default=list(plan_grid.MODES))
    grid.add_argument("--rows", nargs="+", choices=sorted(rows.KINDS), default=["long", "short"])
    grid.add_argument("--steps", type=_positive, default=3, help="optimizer steps of each; the first does not count")
    _common(grid)
    grid.set_defaults(run=plan_grid.run)

    for name, module, told in (
        ("report", report, "the tables of docs/benchmarks.md, from the results beside it"),
        ("plot", plot, "pictures of the results"),
    ):
        verb = verbs.add_parser(name, help=told)
        verb.add_argument("--results", default=str(report.RESULTS), metavar="FOLDER")
        if name == "report":
            verb.add_argument("--page", default=str(report.PAGE), metavar="FILE")
            verb.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is old")
        verb.set_defaults(run=module.run)
    return top


def _common(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--threads", type=_positive, default=1)
    verb.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe key for tunelet")
    verb.add_argument("--json", metavar="FILE", help="write the results here")
    verb.add_argument("--scratch", metavar="FOLDER", help=f"for checkpoints and logs; default {process.SCRATCH}")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        return options.run(options)
    except TuneletError as error:
        process.show(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        kept = (
            f"; the pairs that were done are in {options.json}" if options.json and os.path.exists(options.json) else ""
        )
        process.show(f"interrupted{kept}")
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop from outside takes the contestant along, too
    sys.exit(main())
