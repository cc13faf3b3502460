"""How do I let other machines use a part of a model?  `moddiff serve`."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from .spans import sent
from .words import MODEL


def serve(
    model: Annotated[str, typer.Option(help=MODEL)] = "tiny-t2v",
    roles: Annotated[str, typer.Option(help="which parts: text,image,dit,vae")] = "text,vae,dit",
    port: Annotated[int, typer.Option(help="0: any that is free")] = 8000,
    host: Annotated[
        str, typer.Option(help="the address to listen at; all but loopback need a token")
    ] = "127.0.0.1",
    token_file: Annotated[Path | None, typer.Option(help="a file that holds the token")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; by default as stored")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps")] = "cpu",
    backend: Annotated[str, typer.Option(help="torch; or mlx, for the text encoder on a Mac")] = "torch",
    bits: Annotated[int | None, typer.Option(help="with --backend mlx: 4 or 8 bits a weight")] = None,
    profile: Annotated[
        str | None, typer.Option(help="base, low_memory, high_quality, or a JSON file of extensions by name")
    ] = None,
    limit: Annotated[str, typer.Option(help="the largest question")] = "1 GB",
    places: Annotated[int, typer.Option(help="how many questions wait for each part")] = 8,
    trace: Annotated[Path | None, typer.Option(help="a file for spans, as OTLP/JSON")] = None,
):
    """Let pipelines elsewhere use parts of this model: moddiff.remote("http://here:8000", "text")."""
    import logging
    import sys

    from ..remote.server import Service, check_host, http_server, listening
    from ..telemetry import in_trace, recorded

    asked, token = _roles(roles), _token(token_file)
    check_host(host, token)
    sock = listening(host, port)  # before the weights: a port that is taken is said at once
    handler = in_trace(logging.StreamHandler(sys.stderr))
    logging.getLogger("moddiff").addHandler(handler)
    with ExitStack() as stack:
        stack.callback(sock.close)
        parts = _parts(model, asked, backend, bits, dtype=dtype, device=device, profile=profile)
        service = Service(parts, token, limit, places)
        sent(f"{roles} server")
        if trace is not None:
            stack.enter_context(recorded(trace, service=f"{roles} server"))
        told = ", ".join(f"{role} ({served.fingerprint})" for role, served in service.served.items())
        sock.listen(128)  # whoever reads the next line may ask at once
        at = f"[{host}]" if ":" in host else host
        print(f"serving {told} at http://{at}:{sock.getsockname()[1]}", flush=True)
        http_server(service).run(sockets=[sock])


def _roles(text):
    from ..remote.components import KINDS

    roles = [role.strip() for role in text.split(",") if role.strip()]
    if not roles or (odd := [role for role in roles if role not in KINDS]):
        raise ValueError(
            f"--roles {text}; expected some of {', '.join(KINDS)}" + (f", not {odd[0]}" if roles else "")
        )
    return roles


def _token(file):
    if file is None:
        return None
    token = file.expanduser().read_text(encoding="utf-8").strip()
    if not token:
        raise ValueError(f"{file} is empty; write a token into it, such as: openssl rand -hex 16 > {file}")
    return token


def _parts(model, roles, backend, bits, **how):
    """{role: component}"""
    if backend not in ("torch", "mlx"):
        raise ValueError(f"--backend {backend}; expected torch or mlx")
    if backend == "mlx":
        return _in_mlx(model, roles, bits, **how)
    if bits is not None:
        raise ValueError(f"--bits {bits} is for --backend mlx; for torch: --profile low_memory")
    from ..weights import load

    pipe = load(model, **how)
    if absent := [role for role in roles if pipe.components[role] is None]:
        raise ValueError(f"{model} has no {absent[0]} component; leave it out of --roles")
    return {role: pipe.components[role] for role in roles}


def _in_mlx(model, roles, bits, dtype, device, profile):
    from ..remote.mlx import TextEncoder

    if roles != ["text"]:
        raise ValueError(f"--backend mlx serves the text encoder alone; --roles text, not {','.join(roles)}")
    if device != "cpu" or profile is not None:
        raise ValueError("--device and --profile are for torch; mlx takes its own device, and --bits")
    return {"text": TextEncoder(model, dtype, bits)}
