"""An OpenAI-compatible server on loopback that answers as a script says, for tests of whoever asks one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROBE = "Hi"  # what Endpoint.check asks


class ChatServer:
    """script(question, body) gives the answer's text, (status, text), or (status, text, headers); bytes are sent as
    they are. asked: (path, body, Authorization header) of every request."""

    def __init__(self, host: str, script: Callable[[str, dict], Any]):
        self.script, self.asked = script, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, body, self.headers.get("Authorization")))
                said = outer.script(body["messages"][-1]["content"], body)
                status, text, headers = (*said, *[{}][: 3 - len(said)]) if isinstance(said, tuple) else (200, said, {})
                message = (
                    {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]} if status == 200 else {}
                )
                sent = text if isinstance(text, bytes) else json.dumps(message | {"usage": {"completion_tokens": 3}})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(sent if isinstance(sent, bytes) else sent.encode())

            def log_message(self, *given):
                pass

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self.url = f"http://{host}:{self._server.server_port}/v1#a-model"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def questions(self) -> list[str]:
        """What was asked, without the probe."""
        found = [body["messages"][-1]["content"] for _, body, _ in self.asked]
        return [question for question in found if question != PROBE]
