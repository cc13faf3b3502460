"""A process that answers for a part of a pipeline, with spans under the trace of who asks.

python answering.py text|chat FILE: prints its port, answers until its input ends, leaves its spans in FILE.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import moddiff
from moddiff.telemetry import joined, recorded, span

CAPTION = "a red circle moving left on a black background"


def main(role, file):
    answers = {"text": text, "chat": chat}[role]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            with joined(self.headers["traceparent"]), span(f"serve {role}", kind="server"):
                question = json.loads(self.rfile.read(int(self.headers["content-length"])))
                body = json.dumps(answers(question)).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with recorded(file, service=f"{role} server"):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        print(server.server_port, flush=True)
        sys.stdin.read()
        server.shutdown()


def text():
    encoder = moddiff.load("tiny").text

    def encode(prompts):
        with span("encode"):
            return [vectors.tolist() for vectors in encoder.encode(prompts)]

    encode([CAPTION])  # the first one takes longer
    return encode


def chat():
    def complete(question):
        with span("complete", **{"gen_ai.request.model": question["model"]}):
            message = {"role": "assistant", "content": CAPTION}
            return {"choices": [{"message": message, "finish_reason": "stop"}]}

    return complete


if __name__ == "__main__":
    main(*sys.argv[1:])
