"""How is a language model asked that runs elsewhere?  Over HTTP, as vLLM, SGLang, mlx_lm.server,
`transformers serve`, llama.cpp and the paid services understand it.

One POST to /chat/completions, with a time limit for all tries together, a limit on the bytes of an answer,
and no trust in its form.
"""

import json
import threading
import time
from numbers import Real
from urllib.parse import urlsplit

from ..telemetry import span, traceparent
from .answers import Rewriter, Unanswered

LARGEST = 1 << 20  # bytes of an answer: a caption has a thousand, with long thoughts a hundred thousand
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # what may be over in a moment; 529: overloaded
TOKENS = 2048  # of an answer: a reasoning model spends most of them on thoughts


class Chat(Rewriter):
    """A language model behind any OpenAI-compatible server, as a component of the role "rewrite".

    base_url  such as "http://127.0.0.1:8000/v1"; without a path, /v1 is meant
    model     its name there
    api_key   sent as a bearer token, shown nowhere
    sees      True: a model that sees pictures; for i2v it is sent the first frame
    timeout   seconds for a whole rewrite, all tries and waits together
    wait      seconds before the second try; twice that before the third, and so on
    options   more fields of the request, such as {"top_k": 20}; they win over ours, and None leaves one out
    instructions, language, tries    as for every Rewriter

    A server that is dead, slow, busy or talks nonsense costs the rewriting and not the run: the original
    prompt is used and a Note says why. A request that it will never accept (a wrong key, model or address) is
    an error. Several threads may ask at once.
    """

    def __init__(
        self,
        base_url,
        model,
        api_key=None,
        *,
        instructions="wan",
        language=None,
        sees=False,
        timeout=60.0,
        tries=4,
        wait=0.5,
        options=None,
    ):
        super().__init__(instructions, language, tries)
        self.httpx = _httpx()
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"base_url={base_url!r}; expected an address such as http://127.0.0.1:8000/v1")
        if not model or not isinstance(model, str):
            raise ValueError(f"model={model!r}; expected the model's name, as GET {base_url}/models lists it")
        root = base_url.rstrip("/").removesuffix("/chat/completions")
        self.url = root + ("" if address.path.strip("/") else "/v1") + "/chat/completions"
        if not isinstance(options, dict | None) or (options and options.get("stream")):
            raise ValueError(
                f"options={options!r}; expected a dict of fields, and no stream: one answer is read"
            )
        if not isinstance(timeout, Real) or not timeout > 0:
            raise ValueError(f"timeout={timeout!r}; expected seconds, above 0")
        if not isinstance(wait, Real) or not wait >= 0:
            raise ValueError(f"wait={wait!r}; expected seconds, from 0 on")
        self.model, self.sees, self.timeout, self.wait = model, sees, timeout, wait
        self.options, self._key = options or {}, api_key
        self._rewrite = threading.local()  # its deadline: each thread has a rewrite of its own

    def __repr__(self):
        return f"Chat({self.url.removesuffix('/chat/completions')!r}, {self.model!r})"

    def __call__(self, prompt, image=None):
        self._rewrite.deadline = time.monotonic() + self.timeout
        return super().__call__(prompt, image)

    def answer(self, messages, instructions, attempt):
        body = {
            "model": self.model,
            "messages": messages,
            # The likeliest answer first. Asked again it would be the same, so later tries draw.
            "temperature": 0.0 if attempt == 0 else 0.7,
            "max_tokens": TOKENS,
        }
        body = {name: value for name, value in (body | self.options).items() if value is not None}
        with span(f"chat {self.model}", kind="client", **self._asked_for(body)) as done:
            answer = self._post(body)
            done.set(**_received(answer))
            return said(answer)

    def _asked_for(self, body):
        """The names of OpenTelemetry's conventions for generative AI. No word of a prompt is among them."""
        address = urlsplit(self.url)
        usual_port = {"http": 80, "https": 443}[address.scheme]
        return {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "openai",  # whose protocol it is; the address says who answers
            "gen_ai.request.model": self.model,
            "gen_ai.request.temperature": body.get("temperature"),
            "gen_ai.request.max_tokens": body.get("max_tokens"),
            "server.address": address.hostname,
            "server.port": address.port or usual_port,
        }

    def go_on(self, attempt, error):
        """Wait before the next try, unless there is none or no time for it."""
        pause = max(self.wait * 2**attempt, getattr(error, "retry_after", 0.0))
        if attempt + 1 == self.tries or time.monotonic() + pause >= self._rewrite.deadline:
            return False
        time.sleep(pause)
        return True

    def _post(self, body):
        """The server's answer as JSON, within the time that is left."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        if here := traceparent():
            headers["traceparent"] = here
        left, received = self._rewrite.deadline - time.monotonic(), bytearray()
        try:
            with self.httpx.stream("POST", self.url, json=body, headers=headers, timeout=left) as response:
                # httpx's limit is for each piece; a server that sends a byte a second would never reach it.
                for piece in response.iter_bytes():
                    received += piece
                    if len(received) > LARGEST:
                        raise Unanswered(f"{self.url} sent more than {LARGEST:,} bytes")
                    if time.monotonic() > self._rewrite.deadline:
                        raise Unanswered(f"{self.url} was not done after {self.timeout:g} s")
        except self.httpx.TimeoutException:
            raise Unanswered(f"{self.url} did not answer within {self.timeout:g} s") from None
        except self.httpx.TransportError as error:
            raise Unanswered(f"{self.url} cannot be reached: {error}") from error
        self._check(response, received)
        try:
            return json.loads(received)
        except ValueError:
            raise Unanswered(
                f"{self.url} answered with something that is not JSON: {_start(received)}"
            ) from None

    def _check(self, response, received):
        status = response.status_code
        if status == 200:
            return
        told = f"{self.url} answered {status}: {_why(received)}"
        if status in AGAIN:
            busy = Unanswered(told)
            after = response.headers.get("retry-after", "")
            busy.retry_after = float(after) if after.isdecimal() else 0.0
            raise busy
        cures = {401: "api_key=", 403: "api_key=", 404: "base_url= and model=", 422: "model= and options="}
        cures[400] = "model=, options= and the prompt's length"
        raise ValueError(f"{told}. Look at {cures.get(status, 'base_url=, model= and options=')}")


def said(answer):
    """The text of a chat completion. Thoughts in a field of their own are left where they are.

    Raises Unanswered where the answer has another form, was refused, or was cut off.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise Unanswered(f"the answer has no choices[0].message: {_start(json.dumps(answer).encode())}")
    if refusal := message.get("refusal"):
        raise Unanswered(f"the language model refused: {str(refusal)[:80]!r}")
    # Half a caption would do as a prompt and nobody would see it: so it counts as none.
    if choice.get("finish_reason") in ("length", "content_filter"):
        raise Unanswered(f"the answer was cut off ({choice['finish_reason']})")
    content = message.get("content")
    if isinstance(content, list):  # parts, as for pictures; some servers answer so as well
        content = "".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    if not isinstance(content, str | None):
        raise Unanswered(f"the answer's content is a {type(content).__name__}; expected a text")
    return content or ""


def _received(answer):
    """What an answer says of itself, for a span, as far as it has the usual form."""
    answer = answer if isinstance(answer, dict) else {}
    usage, choices = answer.get("usage"), answer.get("choices")
    usage = usage if isinstance(usage, dict) else {}
    choices = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    reasons = [str(choice["finish_reason"]) for choice in choices if choice.get("finish_reason")]
    named = {
        "gen_ai.response.model": answer.get("model"),
        "gen_ai.response.id": answer.get("id"),
        "gen_ai.usage.input_tokens": usage.get("prompt_tokens"),
        "gen_ai.usage.output_tokens": usage.get("completion_tokens"),
    }
    told = {name: value for name, value in named.items() if isinstance(value, str | int)}
    return told | {"gen_ai.response.finish_reasons": reasons or None}


def _why(received):
    """What a server says is wrong: the message in the form of vLLM, OpenAI or FastAPI, else how it begins."""
    try:
        told = json.loads(received)
    except ValueError:
        return _start(received)
    error = (told.get("error") or told.get("detail")) if isinstance(told, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return repr(message[:400]) if isinstance(message, str) else _start(received)


def _start(received):
    text = bytes(received[:300]).decode("utf-8", "replace")
    return repr(text[:200]) if text else "nothing"


def _httpx():
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "asking a server needs httpx; run: pip install 'moddiff[llm]' "
            "(in a clone: pip install -e '.[llm]')"
        ) from error
    return httpx
