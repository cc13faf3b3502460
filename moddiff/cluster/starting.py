"""Is there a cluster to work on?  Ray, joined where it runs or started here, or what to do about it."""

import logging
import os
from pathlib import Path

from ..experiments.recipes import objects_in, plain

LOOPBACK = "127.0.0.1"


def joined(address=None):
    """Ray, connected to a cluster.   -> (the module, did this call connect it?)

    address  "auto" for the cluster that runs on this machine, "10.0.0.1:6379" for another's; None: the one
             that this process is connected to, else that of RAY_ADDRESS, else a new one of this machine alone

    Raises ImportError where Ray is not installed, ConnectionError where no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import, which reads it
    try:
        import ray
    except ImportError as error:
        raise ImportError('several workers need Ray: pip install "moddiff[ray]"') from error
    if ray.is_initialized():
        return ray, False
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        quiet |= {"_node_ip_address": LOOPBACK, "include_dashboard": False}
    try:
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({error}). Start one with `ray start --head "
            f"--node-ip-address={LOOPBACK}`, or leave address= out to use this machine alone"
        ) from error
    return ray, True


def load_words(model):
    """What `moddiff.load` is to be called with, as plain values.   -> dict

    model  a name or folder, or a dict of load's arguments: {"where": ..., "profile": ...}

    Raises TypeError for objects: a worker loads its own, and nothing but words travels to it.
    """
    words = dict(model) if isinstance(model, dict) else {"where": model}
    given = {name: plain(value) for name, value in words.items() if not isinstance(value, Path)}
    odd = objects_in(given)
    if not odd and not isinstance(words.get("where", ""), str | Path):
        odd = f"where={words['where']!r}"
    if odd:
        raise TypeError(
            f"model={model!r} holds an object ({odd}), and a worker loads its own pipeline from words: a "
            'name or a folder, or {"where": ..., "profile": {"dit": [["quantized", "int8"]]}}'
        )
    return words | given | {name: str(value) for name, value in words.items() if isinstance(value, Path)}
