"""A language model's server, of one answer, with spans under the trace of who asks.

python answering.py FILE: says its address, answers until Ctrl-C, and leaves its spans in FILE.
"""

import json
import signal
import sys
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from moddiff.telemetry import joined, recorded, span

CAPTION = "a red circle moving left on a black background"


class Answering(BaseHTTPRequestHandler):
    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with joined(self.headers["traceparent"]), span("serve chat", kind="server"):
            with span("complete", **{"gen_ai.request.model": question["model"]}):
                message = {"role": "assistant", "content": CAPTION}
                body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def main(file):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background takes away
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    with recorded(file, service="chat server"), suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
