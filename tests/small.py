"""Small random models for the tests of the pipeline and the command line: they paint noise, and run in milliseconds."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Builder
from tokenizers import models, normalizers, pre_tokenizers, trainers

from moddiff.dit import DiT, DiTConfig
from moddiff.image import ImageConfig, ImageEncoder
from moddiff.pipeline import Pipeline
from moddiff.text import TextConfig, TextEncoder
from moddiff.vae import VAE, VAEConfig

CAPTIONS = ["a red circle moving left on a black background", "a blue square growing above a white star standing still", "ein roter Kreis", "红色圆形"]
Z, FRAMES, SIZE, TEXT_LEN = 4, 9, (32, 48), 32
TEXT = dict(vocab=128, dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=2, text_len=TEXT_LEN)
IMAGE = dict(image_size=16, patch_size=8, dim=16, mlp_ratio=2, out_dim=8, num_heads=2, num_layers=2)
VAE_SIZES = dict(dim=8, z_dim=Z, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True], mean=[0.1, -0.1, 0.0, 0.2],
                 std=[1.0, 0.8, 1.2, 1.0])
SAMPLING = dict(solver="unipc", steps=3, shift=3.0, scale=4.0, frames=FRAMES, fps=8, size=SIZE, fit="crop")


def dit_config(task="t2v", clip=True, **changes):
    """Fields of a small DiT; `clip`: does an i2v model read CLIP features (Wan 2.1) or not (2.2)."""
    extra = Z + 4 if task in ("i2v", "flf2v") else 0
    image_dim = IMAGE["dim"] if task in ("i2v", "flf2v") and clip else None
    vace = dict(vace_layers=[0], vace_in_dim=2 * Z + 64) if task == "vace" else {}
    return dict(model_type=task, in_dim=Z + extra, dim=32, ffn_dim=48, freq_dim=16, text_dim=TEXT["dim"], out_dim=Z, num_heads=2, num_layers=2,
                image_dim=image_dim, text_len=TEXT_LEN) | vace | changes


def dit(task="t2v", clip=True, seed=0, **changes):
    torch.manual_seed(seed)
    return DiT(DiTConfig(**dit_config(task, clip, **changes))).eval()


def tokenizer_file(folder):
    """A unigram tokenizer.json with word marks, as UMT5 has, trained on a few captions."""
    tokenizer = Builder(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS * 20, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def pipeline(folder, task="t2v", clip=True, **options):
    """A whole random pipeline; `folder` is for its tokenizer."""
    torch.manual_seed(1)
    text = TextEncoder(TextConfig(**TEXT), str(tokenizer_file(folder))).eval()
    sizes = IMAGE | (dict(image_size=32, patch_size=2) if task == "flf2v" else {})  # two pictures of 257 tokens
    image = ImageEncoder(ImageConfig(**sizes)).eval() if task in ("i2v", "flf2v") and clip else None
    vae = VAE(VAEConfig(**VAE_SIZES)).eval()
    return Pipeline(text, options.pop("dit", None) or dit(task, clip), vae, image, name=f"small-{task}", defaults=SAMPLING, **options)


def release(folder, task="t2v"):
    """The same models as a folder in the Diffusers layout, for `load` and the command line."""
    pipe = pipeline(folder / "tokenizer", task)
    index = {"_class_name": "WanPipeline"}
    for name, part, config in (("transformer", pipe.dit, dit_config(task)), ("text_encoder", pipe.text, TEXT), ("vae", pipe.vae, VAE_SIZES),
                               ("image_encoder", pipe.image, IMAGE)):
        if part is not None:
            (folder / name).mkdir()
            save_file(part.state_dict(), folder / name / "model.safetensors")
            (folder / name / "config.json").write_text(json.dumps(config))
            index[name] = ["moddiff", type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
