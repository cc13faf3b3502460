"""May this config field hold this value?  Types and ranges, checked before anything is built from them."""

from typing import get_args

from .quoting import listed, nearest, quoted

# What the entries of a list are.
ENTRIES = {
    "patch_size": int,
    "dim_mult": int,
    "vace_layers": int,
    "temperal_downsample": bool,
    "attn_scales": float,
    "mean": float,
    "latents_mean": float,
    "std": float,
    "latents_std": float,
}
# A released model has at most 40 layers; one of a million would build for hours first. Within these
# bounds no shape is beyond what torch can count.
SMALL = ("num_layers", "num_hidden_layers", "num_res_blocks", "patch_size", "dim_mult")
MOST_OF_SMALL, MOST = 256, 2**20


def check_value(kind, name, value, wanted):
    """Raise ValueError unless a config's value is what its field may hold.

    wanted  str, bool, int (from 1), float, tuple (a list will do; its entries as in ENTRIES), or one of these
            `| None`
    """
    options = get_args(wanted) or (wanted,)
    if value is None and type(None) in options:
        return
    fits, expected = _fits(name, value, options[0])
    if not fits:
        raise differs(kind, name, value, expected)
    if options[0] is tuple:
        for entry in value:
            check_value(kind, name, entry, ENTRIES[name])


def differs(kind, name, value, expected):
    """The ValueError for a field that says something else."""
    shown = repr(quoted(value)) if isinstance(value, str) else quoted(value)
    return ValueError(f"the {kind} config says {quoted(name)} = {shown}; expected {expected}")


def refuse_unknown(kind, fields, known):
    """Raise ValueError for a field that is not among the known ones, with the nearest of these."""
    unknown = [name for name in fields if name not in known]
    if unknown:
        others = f", and {listed(unknown[1:])}" if unknown[1:] else ""
        raise ValueError(
            f"the {kind} config has an unknown field: {quoted(unknown[0])!r}"
            f"{nearest(unknown[0], known)}{others}. Known fields: {', '.join(known)}. Remove or rename it; a "
            "field that is not understood is never ignored"
        )


def _fits(name, value, wanted):
    """(is it so, what was expected)"""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is int:
        least = 0 if name == "vace_layers" else 1
        most = MOST_OF_SMALL if name in SMALL else MOST
        whole = number and isinstance(value, int)
        return whole and least <= value <= most, f"a whole number from {least} to {most:,}"
    if wanted is float:
        signed = name in ("mean", "latents_mean", "attn_scales")
        # NaN is below and above nothing, so it does not pass either.
        return number and (-1e30 if signed else 0) < value < 1e30, f"a {'' if signed else 'positive '}number"
    if wanted is tuple:
        several = isinstance(value, list | tuple) and len(value) <= 4096
        if name == "patch_size":
            return several and len(value) == 3, "a list of three: frames, rows, columns"
        return several, "a list"
    if wanted is bool:
        return isinstance(value, bool), "true or false"
    return isinstance(value, str), "a word"
