"""`python -m benchmarks.serve_lm_eval MODEL --task NAME --data FILE`: lm-eval through `tunelet serve` against torch.

lm-eval's own local-completions client asks the server for the log-likelihoods of a task's items; the evaluator computes
them with torch in this process, both in float32. Tells how far they differ, and how many items the two choose
otherwise. lm-eval may be installed elsewhere: --python names its interpreter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from benchmarks.serve_load import Server

THEIRS = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
told = json.load(sys.stdin)
model = LocalCompletionsAPI(model=told["model"], base_url=told["url"], tokenizer=told["tokenizer"],
    tokenizer_backend="huggingface", max_length=told["length"], batch_size=16, num_concurrent=1)
asked = [Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=n)
    for n, pair in enumerate(told["pairs"])]
json.dump([[float(value), bool(greedy)] for value, greedy in model.loglikelihood(asked, disable_tqdm=True)], sys.stdout)
"""


def ours(model: str, task: str, data: str, limit: int) -> tuple[Any, list[list[tuple[str, str]]], list[list[Any]]]:
    """(engine, pairs of each item, their likelihoods)."""
    from tunelet.commands.common import open_engine
    from tunelet.evals import likelihood, prompts, suite

    engine = open_engine(model, device="auto", dtype="float32", trust=False, template=None)
    [prepared] = suite.prepare([task], [data], limit=limit).tasks
    asked = suite.asked(engine, prepared, prompts.Style())
    requests = suite.encoded(engine, prepared, asked)
    found = iter(likelihood.score(engine.model, [request for of_item in requests for request in of_item]))
    pairs = [list(zip(one.contexts, one.continuations, strict=True)) for one in asked]
    return engine, pairs, [[next(found) for _ in of_item] for of_item in requests]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--python", default=sys.executable)
    options = parser.parse_args()
    engine, pairs, expected = ours(options.model, options.task, options.data, options.limit)
    server = Server([f"model={options.model}", "--dtype", "float32"])
    try:
        told = {
            "model": "model",
            "url": f"http://{server.host}:{server.port}/v1/completions",
            "tokenizer": engine.tokenizer.name_or_path,
            "length": engine.max_length,
            "pairs": [pair for of_item in pairs for pair in of_item],
        }
        line = [options.python, "-c", THEIRS]
        answer = subprocess.run(line, input=json.dumps(told), capture_output=True, text=True)
    finally:
        server.process.terminate()
    if answer.returncode:
        print(answer.stderr[-2000:], file=sys.stderr)
        return 1
    found = iter(json.loads(answer.stdout.splitlines()[-1]))
    theirs = [[next(found) for _ in of_item] for of_item in pairs]
    flat = [(a, b) for one, other in zip(expected, theirs, strict=True) for a, b in zip(one, other, strict=True)]
    chosen = [
        max(range(len(one)), key=lambda place: one[place].logprob)
        != max(range(len(one)), key=lambda place: other[place][0])
        for one, other in zip(expected, theirs, strict=True)
    ]
    figures = {
        "task": options.task,
        "items": len(pairs),
        "likelihoods": len(flat),
        "largest_difference": max(abs(a.logprob - b[0]) for a, b in flat),
        "greedy_differs": sum(a.greedy != b[1] for a, b in flat),
        "choice_differs": sum(chosen),
    }
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
