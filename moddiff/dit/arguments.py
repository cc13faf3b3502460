"""What may a DiT be given?  Errors that say what arrived, what was expected, and what to do.

Each of them is a ValueError. `check` runs in every forward, the other two once a prompt.
"""

from math import prod

import torch


def check(config, x, t, y, context, control):
    """All that one forward takes: noisy latent, times, conditioning latent, prepared prompt, control."""
    for latent in (x, y):
        if latent is not None and latent.ndim != 5:
            raise ValueError(
                f"a latent of shape {list(latent.shape)} arrived; expected five axes [b, c, f, h, w] "
                "(a single latent needs x[None])"
            )
    channels = x.shape[1] + (0 if y is None else y.shape[1])
    if channels != config.in_dim:
        given = f"x has {x.shape[1]} channels" + ("" if y is None else f" and y {y.shape[1]}")
        wants_more = y is None and config.in_dim > config.out_dim
        cure = "pass the conditioning latent as y" if wants_more else "check which model this latent is for"
        raise ValueError(f"{given}; this {config.model_type} model takes {config.in_dim} together: {cure}")
    if y is not None and (y.shape[0], *y.shape[2:]) != (x.shape[0], *x.shape[2:]):
        raise ValueError(
            f"y of shape {list(y.shape)} does not lie over x of shape {list(x.shape)}; batch, frames, "
            "height and width must agree"
        )
    for name, size, p in zip(("frames", "height", "width"), x.shape[2:], config.patch_size):
        if size % p:
            raise ValueError(
                f"latent {name} {size} is not a multiple of the patch {p}; choose a video size that is a "
                f"multiple of {8 * p} pixels ({16 * p} with the Wan 2.2 VAE)"
            )
    batch, tokens = x.shape[0], prod(x.shape[2:]) // prod(config.patch_size)
    each = f"[{batch}] (one per sample) or [{batch}, {tokens}] (one per token)"
    if not torch.is_tensor(t):
        raise ValueError(f"t is {t!r}; expected a tensor {each}, such as torch.tensor([500.0])")
    if tuple(t.shape) not in ((batch,), (batch, tokens)):
        raise ValueError(f"t of shape {list(t.shape)} arrived; expected {each}")
    readers = config.num_layers + len(config.vace_layers)
    if len(context.text) != readers or (context.image is None) != (config.image_dim is None):
        raise ValueError("what came as text was prepared by another model; call prepare of this one")
    prompts = len(context.text[0][0])
    if prompts not in (1, batch):
        raise ValueError(f"{prompts} prompts for a batch of {batch}; expected one prompt per sample")
    check_control(config, x, control)


def check_control(config, x, control):
    """A VACE model reads a control latent that lies over x, any other model none."""
    if not config.vace_layers:
        if control is not None:
            raise ValueError(
                f"a control latent was given, but this {config.model_type} model has no VACE blocks; "
                "leave control out"
            )
        return
    if control is None:
        raise ValueError(
            "this VACE model reads a control latent; pass "
            f"control=[b, {config.vace_in_dim}, f, h, w] (zeros for none)"
        )
    expected = [x.shape[0], config.vace_in_dim, *x.shape[2:]]
    if list(control.shape) != expected:
        raise ValueError(f"control of shape {list(control.shape)} arrived; expected {expected}, lying over x")


def check_text(config, text):
    """A list of features, one tensor per sample."""
    one_each = f"a list of [l, {config.text_dim}], one per sample"
    if isinstance(text, str) or torch.is_tensor(text) or len(text) == 0:
        got = f"a tensor {list(text.shape)}" if torch.is_tensor(text) else repr(text)
        raise ValueError(f"text is {got}; expected {one_each}, as text.encode([prompt]) gives")
    for features in text:
        if features.ndim != 2 or features.shape[1] != config.text_dim or len(features) > config.text_len:
            raise ValueError(
                f"text features of shape {list(features.shape)} arrived; expected {one_each}, with l at "
                f"most {config.text_len}. A long prompt is cut by text.encode; "
                "another width is another text encoder's"
            )


def check_image(config, image, batch):
    """Image features just where the model reads some."""
    if config.image_dim is None:
        if image is not None:
            raise ValueError(
                f"image features were given, but this {config.model_type} model has no image path; "
                "leave image out, or load a Wan 2.1 i2v model"
            )
        return
    pair = config.model_type == "flf2v"  # reads two pictures a video, first and last in turn
    expected = f"[{batch}, n, {config.image_dim}]"
    if pair:
        expected = f"[{2 * batch}, 257, {config.image_dim}] (first and last image in turn)"
    if image is None:
        raise ValueError(
            f"this {config.model_type} model reads CLIP features; pass image={expected}, "
            "as image.encode(pictures) gives"
        )
    fits = image.ndim == 3 and image.shape[2] == config.image_dim
    right = image.shape[:2] == (2 * batch, 257) if pair else image.shape[0] in (1, batch)
    if not (fits and right):
        raise ValueError(f"image features of shape {list(image.shape)} arrived; expected {expected}")
