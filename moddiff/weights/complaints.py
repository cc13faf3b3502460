"""What does not fit between a state and a component, in words, and what would explain it?"""

import re
from dataclasses import dataclass
from difflib import get_close_matches

import torch

from .foreign import quantized
from .quoting import listed, quoted

# Which config field a weight's shape gives away: kind -> ((our name, axis, field), ...).
TELLTALES = {
    "dit": (
        ("patch_embedding.weight", 0, "dim"),
        ("patch_embedding.weight", 1, "in_dim"),
        ("blocks.0.ffn.0.weight", 0, "ffn_dim"),
        ("text_mlp.0.weight", 1, "text_dim"),
        ("time_mlp.0.weight", 1, "freq_dim"),
        ("image_mlp.norm_in.weight", 0, "image_dim"),
        ("vace_patch_embedding.weight", 1, "vace_in_dim"),
    ),
    "text": (
        ("token_embedding.weight", 0, "vocab"),
        ("token_embedding.weight", 1, "dim"),
        ("layers.0.attn.q.weight", 0, "dim_attn"),
        ("layers.0.ffn.up.weight", 0, "dim_ffn"),
        ("layers.0.attn.relative_bias.weight", 0, "num_buckets"),
        ("layers.0.attn.relative_bias.weight", 1, "num_heads"),
    ),
    "image": (
        ("patch_embedding.weight", 0, "dim"),
        ("patch_embedding.weight", 2, "patch_size"),
        ("head", 1, "out_dim"),
    ),
    "vae": (("conv2.weight", 0, "z_dim"), ("encoder.conv1.weight", 0, "dim")),
}
# Floats of 8 bits that mean what they say; beside scales they are quantized weights, as other narrow types.
PLAIN_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LAYER = re.compile(r"(?:^|\.)(?:blocks?|layers|transformer)\.(\d{1,4})\.")


@dataclass(frozen=True)
class Pairing:
    """A state laid over a component, in the state's own naming.

    table    {our name: Counterpart}
    theirs   {name: tensor}, what the state has;   wanted: {name: shape}, what the component has
    missing  names that are wanted and needed, and not there;   surplus: names that nothing wants
    """

    kind: str
    config: object
    table: dict
    theirs: dict
    wanted: dict
    missing: list
    surplus: list

    def complaints(self, dtype, check_values):
        """One line for each kind of trouble, and hints. Empty when everything fits."""
        present = {name: x for name, x in self.theirs.items() if name in self.wanted}
        lines = [*self._about_names(), *self._about_shapes(), *self._about_types(present, dtype)]
        lines += self._about_values(present, check_values)
        return lines + [f"Hint: {hint}" for hint in self._hints()] if lines else []

    @property
    def misshapen(self):
        """{name: (its shape, the wanted one)}"""
        both = {name: (x.shape, self.wanted[name]) for name, x in self.theirs.items() if name in self.wanted}
        return {name: shapes for name, shapes in both.items() if shapes[0] != shapes[1]}

    def _about_names(self):
        if self.missing:
            shown = [f"{name} {list(self.wanted[name])}" for name in self.missing]
            yield f"- {len(shown)} missing: {listed(shown, between='; ')}"
            short = [name for name in self.surplus if len(name) < 200]
            for name in self.missing[:6]:
                for near in get_close_matches(name, short, 1, 0.8):
                    yield f"  is {quoted(near)} meant for {name}?"
        if self.surplus:
            yield f"- {len(self.surplus)} surplus, no place for: {listed(self.surplus, between='; ')}"

    def _about_shapes(self):
        shown = [
            f"{name} is {list(got)}, expected {list(want)}" for name, (got, want) in self.misshapen.items()
        ]
        if shown:
            yield f"- {len(shown)} misshapen: {listed(shown, between='; ')}"

    def _about_types(self, present, dtype):
        plain = [f"{name} ({x.dtype})" for name, x in present.items() if x.dtype in PLAIN_FP8]
        narrow = [
            f"{name} ({x.dtype})"
            for name, x in present.items()
            if x.dtype not in PLAIN_FP8 and (not x.is_floating_point() or x.element_size() < 2)
        ]
        if quantized(self.surplus):
            narrow, plain = narrow + plain, []
        if narrow:
            yield (
                f"- {len(narrow)} not 16 bit floats or wider: {listed(narrow, between='; ')}. Quantized "
                "files cannot be loaded here; take a bf16 or fp32 release"
            )
        if plain and dtype is None:
            yield (
                f"- {len(plain)} plain 8 bit floats: {listed(plain, between='; ')}. Say what to expand them "
                "to: dtype='bf16'"
            )

    def _about_values(self, present, check_values):
        broken = []
        for counterpart in self.table.values():
            both = [name for name in counterpart.names if name in present]
            if (
                counterpart.form == "tied"
                and len(both) == 2
                and not _equal(*[present[name] for name in both])
            ):
                broken.append(f"{' and '.join(both)} should be one tensor, but differ")
        if check_values:
            counts = {name: _not_finite(x) for name, x in present.items()}
            broken += [f"{name} ({n} of {present[name].numel()} values)" for name, n in counts.items() if n]
        if broken:
            yield (
                f"- {len(broken)} broken, NaN, infinite or torn: {listed(broken, between='; ')}. The file "
                "is damaged, or its training diverged; fetch it again"
            )

    def _hints(self):
        """What would explain the complaints: a wrong number in the config, or a file of another sort."""
        misshapen = self.misshapen
        for name, axis, field in TELLTALES[self.kind]:
            there = self.table[name].names[0] if name in self.table else None
            if there in misshapen and self.table[name].form == "same" and len(misshapen[there][0]) > axis:
                got, want = (shape[axis] for shape in misshapen[there])
                if got != want:
                    yield self._wrong(field, f"{got} (axis {axis} of {there})")
        numbers = [int(layer[1]) for name in self.theirs if (layer := LAYER.search(name))]
        layers = max(numbers, default=-1) + 1
        renamed = self.missing or self.surplus
        if self.kind != "vae" and layers and layers != self.config.num_layers and renamed:
            yield self._wrong("num_layers", layers)
        if quantized(self.surplus):
            yield (
                "scale tensors mark a quantized (fp8) or packed file, which cannot be loaded here; take the "
                "bf16 or fp32 release"
            )
        if re.search(r"lora_|hada_|lokr_|\.diff", " ".join(self.surplus)):
            yield "lora tensors are a change to a model, not a model; load the model they belong to first"

    def _wrong(self, field, got):
        return (
            f"the config says {field} = {getattr(self.config, field)}, the weights say {got}. Correct the "
            f"config's {field}; where the folder has no config.json for this part (an official one has it "
            f"for the dit alone), build the part with load_component(file, {self.kind!r}, config) and give "
            f"it to load as {self.kind}="
        )


def _not_finite(x):
    """How many values are NaN or infinite.

    Least and greatest tell at once, in a fortieth of the time of looking at each value.
    """
    if x.is_meta or not x.numel() or not x.is_floating_point():
        return 0
    if x.element_size() < 2:
        x = x.half()  # 8 bit floats know no comparison; 16 bits hold each of them
    if all(extreme.isfinite() for extreme in torch.aminmax(x)):
        return 0
    return int((~x.isfinite()).sum())


def _equal(a, b):
    """Are these one tensor? A difference in shape is reported elsewhere."""
    return a.shape != b.shape or a.is_meta or b.is_meta or a.data_ptr() == b.data_ptr() or torch.equal(a, b)
