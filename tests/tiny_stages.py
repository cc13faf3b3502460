"""The stages of the tiny models, made so small that each takes a step in a second."""

from moddiff.tiny import codec_stages, dit_stages, encoder_stages, stages, train


def shrink(monkeypatch):
    """One block instead of eight, batches of two, and latents of a known mean and spread."""
    monkeypatch.setitem(dit_stages.DIT_CONFIG, "num_layers", 1)
    monkeypatch.setitem(dit_stages.I2V_CONFIG, "num_layers", 1)
    monkeypatch.setitem(encoder_stages.TEXT_CONFIG, "num_layers", 1)
    monkeypatch.setitem(encoder_stages.IMAGE_CONFIG, "num_layers", 2)
    monkeypatch.setitem(codec_stages.VAE_CONFIG, "dim", 2)
    monkeypatch.setattr(stages, "measure_latents", lambda folder: dict(mean=[0.5] * 16, std=[2.0] * 16))
    for name in ("TextStage", "CLIPStage", "T2VStage", "DecoderStage", "I2VStage"):
        monkeypatch.setattr(stages, name, with_batch_of_two(getattr(stages, name)))


def with_batch_of_two(stage):
    def make(*arguments, **options):
        return stage(*arguments, batch=2, **options)

    return make


def train_all(folder, names=("vae", "text", "clip", "t2v", "decoder", "i2v")):
    """One step of each stage."""
    for name in names:
        train.run_stage(name, steps=1, folder=folder, clips=2)


def empty_package(folder):
    """A folder with the two places that an export writes to."""
    for place in ("tiny/weights", "weights/presets"):
        (folder / place).mkdir(parents=True)
    return folder
