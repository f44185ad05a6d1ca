"""A peer that answers /v1/completions, for `python -m benchmarks serve`: llama.cpp's own server out of the xllamacpp
wheel, or transformers' generate, one request after the other, as it comes without a server.

Not for measuring (serve.py).
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def llama_server(spec: Mapping[str, Any]) -> None:
    import xllamacpp

    from tunelet.infer import gguf_export

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf_export.ready(spec["model"], spec["quant"]).file)
    params.n_parallel, params.n_ctx = spec["slots"], spec["slots"] * spec["context"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec["threads"]
    params.verbosity = -1
    server = xllamacpp.Server(params)
    print(f"Ready: {server.listening_address}", flush=True)
    threading.Event().wait()


def transformers(spec: Mapping[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(spec["threads"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"])).eval()
    one = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ids = torch.tensor([asked["prompt"]])
            most = asked["max_tokens"]
            with one, torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=most,
                    min_new_tokens=most,
                    do_sample=False,
                    pad_token_id=0,
                )
            told = json.dumps({"usage": {"completion_tokens": out.shape[1] - ids.shape[1]}}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, *given: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"Ready: http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    {"llama-server": llama_server, "transformers": transformers}[sys.argv[1]](json.loads(sys.argv[2]))
