"""What changes at full size?  Nothing but the weights: a component from a config and a state, in any naming.

A state is a dictionary {parameter name: tensor}. It may use our names, the official ones, those of Diffusers
and transformers, or any of these behind a prefix (ComfyUI's `model.diffusion_model.`); which one is found
out, never guessed silently: every tensor must find its place, and what does not is reported in words.
"""

import torch

from ..linear import Embedding, Linear, Linear32, store
from ..storage import Stored
from . import configs, files, foreign
from .complaints import PLAIN_FP8, WeightsError, complaints
from .configs import empty
from .formats import oddity
from .names import PREFIXES, RELEASED_PREFIX, STYLES, counterparts, ignored, unwrapped
from .packing import packed, stands_for
from .quoting import listed, quoted
from .sizes import sizes

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp64": torch.float64,
    "float64": torch.float64,
}


AS_STORED = "as stored"
# The layers that compute with a weight as it is kept. Everywhere else it is expanded.
KEEPS_STORED = (Linear, Linear32, Embedding)

NAMINGS = {"ours": "our own names", "official": "official names", "diffusers": "Diffusers names"}


def build(kind, config, state=None, dtype=None, check_values=True):
    """One component, in eval mode.

    kind          "dit", "text", "image" or "vae"
    config        its fields, in any dialect that `configs.read` knows
    state         {name: tensor}, any naming; None: fresh random weights
    dtype         "bf16", "fp32", "fp16" or a torch.dtype to convert to, for which quantized weights are
                  expanded; None, or "as stored": as stored, quantized weights kept as they are (storage/)
    check_values  refuse NaN and infinite weights. It reads every weight once; False leaves mapped files
                  untouched until used
    ->            the module. Its parameters are the tensors of `state` themselves where nothing had to be
                  converted

    Raises WeightsError for missing, surplus, misshapen, non-finite or integer weights, ValueError for a
    config that is not understood. Guide: guides/weights.md
    """
    dtype = as_dtype(dtype)
    config = configs.read(kind, config, () if state is None else state)
    if state is None:
        return configs.MODULES[kind][0](config).to(dtype=dtype).eval()
    module = empty(kind, config)
    tensors = match(kind, config, module, state, check_values)
    # What is not matched is a part that Wan never runs, and that this file leaves out.
    for name in module.state_dict().keys() - tensors.keys():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, None)
    # Assigned and not copied: the module has no memory to copy into, and the files stay mapped.
    filled, wide = {}, stands_for(tensors)
    for name, x in tensors.items():
        owner = module.get_submodule(name.rpartition(".")[0])
        if isinstance(x, Stored) and dtype is None and isinstance(owner, KEEPS_STORED):
            store(owner, x)
            filled |= {f"{name}.{part}": kept for part, kept in x.state_dict().items()}
        elif isinstance(x, Stored):
            filled[name] = x.expand(dtype)
        else:
            filled[name] = x.to(dtype or (wide if x.dtype in PLAIN_FP8 else x.dtype))
    module.load_state_dict(filled, strict=True, assign=True)
    return module


def rename(state, kind, to, config):
    """The same weights under other names.

    state   {name: tensor} in any naming; it must be complete and fit `config`
    to      "ours", "official" or "diffusers"
    ->      {name: tensor}. Nothing is lost: renaming back gives the same tensors

    Raises WeightsError as `build` does, ValueError for an unknown naming.
    """
    if to not in STYLES:
        raise ValueError(f"to = {to!r}; expected one of {', '.join(STYLES)}")
    config = configs.read(kind, config, state)
    tensors = match(kind, config, empty(kind, config), state, check_values=False)
    prefix = RELEASED_PREFIX.get((kind, to), "")
    renamed = {}
    for name, counterpart in counterparts(kind, config, tensors, to).items():
        for there, x in counterpart.theirs(tensors[name]).items():
            # transformers keeps this projection beside the vision model, not in it.
            renamed[there if there.startswith("visual_projection") else prefix + there] = x
    return renamed


def load_component(where, kind, config=None, dtype=None, check_values=True):
    """One component from a file or a folder: its weights mapped, not copied.

    where   a file of weights (safetensors, .pth, GGUF), an index of shards, or a folder that holds one
    config  dict; None: the config.json beside the weights, else what their shapes say (sizes.py)

    Raises CheckpointError for files that cannot be read, else as `build`.
    """
    if config is None:
        config = _config_of(where, kind)
    return build(kind, config, files.read(where), dtype, check_values)


def _config_of(where, kind):
    """The config.json beside a component's weights, or what their shapes say."""
    if (files.folder_of(where) / "config.json").is_file():
        return files.config_beside(where)
    found, config = sizes(files.describe(where))
    if found != kind:
        raise WeightsError(f"{where} is a {found} component, and a {kind} was asked for")
    return config


def as_dtype(dtype):
    """ "bf16" -> torch.bfloat16; a floating torch.dtype or None as it is, which "as stored" also means."""
    if dtype == AS_STORED:
        return None
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise ValueError(
        f"dtype is {quoted(dtype)!r}; expected one of fp32, bf16, fp16, fp64, a floating torch.dtype, "
        "or 'as stored'"
    )


def detect(kind, config, module, names):
    """The naming that a set of names uses.   -> (style, prefix, {our name: Counterpart})

    The one of which most names are there; the file's wrappers (see `names.unwrapped`) are not
    counted as a prefix. Raises WeightsError when none fits at all, saying what the names look like
    instead.
    """
    names = {unwrapped(name) for name in names}
    ours, most, best = list(module.state_dict()), 0, None
    for style in STYLES:
        table = counterparts(kind, config, ours, style)
        known = {name for counterpart in table.values() for name in counterpart.names}
        for prefix in PREFIXES[kind]:
            hits = len(known & {name.removeprefix(prefix) for name in names})
            # Our names come first and win a draw: a VAE's are the same as the official ones.
            if hits > most:
                most, best = hits, (style, prefix, table)
    # Before anything is compared: to a LoRA, a list of a thousand missing tensors is no answer.
    _refuse_foreign(kind, names, ours, best)
    return best


def match(kind, config, module, state, check_values=True):
    """Every tensor of a state, under our name for it.

    module  the component without memory, for its names and shapes
    ->      {our name: tensor or Stored}, without what the naming may lack and the state does

    Raises WeightsError with every complaint at once.
    """
    odd = oddity(state)
    if odd:
        raise WeightsError(f"the {kind} state is not a dictionary of names and plain tensors: {odd}")
    style, prefix, table = detect(kind, config, module, state)
    state = packed(state)
    theirs = _stripped(kind, prefix, state)
    # The module has no memory: what is stacked or turned here are shapes.
    wanted = {
        there: part.shape
        for name, x in module.state_dict().items()
        for there, part in table[name].theirs(x).items()
    }
    lines = complaints(kind, config, table, theirs, wanted, check_values)
    if lines:
        naming = NAMINGS[style] + (f" behind {prefix!r}" if prefix else "")
        raise WeightsError(
            f"these weights ({len(state)} tensors, {naming}) do not fit the {kind} config:\n"
            + "\n".join(lines)
        )
    # What is optional and not there stays out; whatever else is missing has been complained about.
    found = {name: other for name, other in table.items() if theirs.keys() & set(other.names)}
    return {name: _ours(other, theirs) for name, other in found.items()}


def _ours(counterpart, theirs):
    """One of our tensors. What has to be stacked or turned is expanded first."""
    if counterpart.form not in ("same", "tied"):
        theirs = {name: theirs[name] for name in counterpart.names}
        theirs = {name: x.expand() if isinstance(x, Stored) else x for name, x in theirs.items()}
    return counterpart.ours(theirs)


def _refuse_foreign(kind, names, ours, best):
    """Raise WeightsError for names of something else: an adapter, a cousin of Wan, another component."""
    begin = listed(sorted(names)[:3]) or "nothing"
    what = foreign.adapter(names)
    if what:
        raise WeightsError(
            f"these {len(names)} tensors are {what}: a change to a model, not a model. Load the model that "
            f"it was trained on, and give it this: moddiff.extensions.adapted(pipe.dit, file). They begin "
            f"with {begin}"
        )
    cousin = foreign.cousin_by_names(names) if kind == "dit" else None
    if cousin:
        raise WeightsError(
            f"these weights are those of {cousin}, which is not among the models here. {foreign.OURS}"
        )
    if best is None:
        likely = foreign.looks_like(names)
        looks = f" They look like a {likely} component." if likely not in (None, kind) else ""
        raise WeightsError(
            f"none of the {len(names)} names belongs to a {kind} component, in any naming; they begin with "
            f"{begin}.{looks} Expected names such as {', '.join(ours[:2])}"
        )


def _stripped(kind, prefix, state):
    """{name without wrapper and prefix: tensor}, without what is left aside by rule."""
    # full: the name as the file has it, for the error below.
    theirs, full = {}, {}
    for name, x in state.items():
        short = unwrapped(name)
        if ignored(kind, short) is not None:
            continue
        short = short.removeprefix(prefix)
        if short in theirs:
            raise WeightsError(
                f"{quoted(full[short])} and {quoted(name)} are both {quoted(short)}, and only one can be "
                "used: this state holds two models, such as the trained weights and their average. Keep the "
                "tensors of one"
            )
        theirs[short], full[short] = x, name
    return theirs
