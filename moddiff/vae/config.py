"""Which autoencoder is it?  The sizes of Wan's two, 2.1 and 2.2, and how their latents are normalised."""

import math
from dataclasses import dataclass

# Published mean and standard deviation of the raw latent, for each of its z channels. Their spreads differ by
# factors of three to five; the DiT sees (latent - mean) / std, all channels alike.
# fmt: off
LATENT_STATISTICS = {
    16: (
        (
            -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
        ),
        (
            2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
        ),
    ),
    48: (
        (
            -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
            -0.1382, 0.0542, 0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825,
            -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
            -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123,
            -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748,
            0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
        ),
        (
            0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013,
            0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
            0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
            0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
            0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
            0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
        ),
    ),
}
# fmt: on


@dataclass(frozen=True)
class VAEConfig:
    """Sizes, under the names of the released config files.

    z_dim                channels of the latent
    dim, dec_dim         widths at full resolution, of the encoder and the decoder; a config with `dec_dim` is
                         the 2.2 form (2 x 2 pixel patches, shortcuts around stages)
    dim_mult             the width of each stage, in `dim`s
    num_res_blocks       in each stage; the decoder has one more
    temperal_downsample  between two stages: is the frame rate halved there?  (the checkpoints spell it so)
    mean, std            of each raw latent channel; None: the published ones for this z_dim

    Raises ValueError for sizes that no Wan VAE has.
    """

    z_dim: int
    dim: int
    dim_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple = (False, True, True)
    attn_scales: tuple = ()
    dec_dim: int | None = None
    mean: tuple | None = None
    std: tuple | None = None

    def __post_init__(self):
        # JSON has lists; a frozen config is to be a key, and so has tuples.
        for name in ("dim_mult", "temperal_downsample", "attn_scales", "mean", "std"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        self.check_stages()
        if self.mean is None or self.std is None:
            self.fill_in_statistics()
        self.check_statistics()

    @property
    def patch(self):
        """Side of the pixel patch folded into channels before the first convolution."""
        return 1 if self.dec_dim is None else 2

    @property
    def stride(self):
        """(time, height, width) pixels per latent cell."""
        space = 2 ** (len(self.dim_mult) - 1) * self.patch
        return (2 ** sum(self.temperal_downsample), space, space)

    def fill_in_statistics(self):
        if self.z_dim not in LATENT_STATISTICS:
            raise ValueError(
                f"no published latent mean and std for z_dim {self.z_dim} (they are known for 16 and 48); "
                "put `mean` and `std`, one number per latent channel, into the config"
            )
        mean, std = LATENT_STATISTICS[self.z_dim]
        object.__setattr__(self, "mean", self.mean or mean)
        object.__setattr__(self, "std", self.std or std)

    def check_stages(self):
        between = len(self.dim_mult) - 1
        if len(self.temperal_downsample) != between:
            raise ValueError(
                f"temperal_downsample has {len(self.temperal_downsample)} entries for {between + 1} stages "
                f"(dim_mult {self.dim_mult}); expected one flag between each two stages, {between}"
            )
        if self.attn_scales:
            raise ValueError(
                f"attn_scales is {self.attn_scales}; every Wan VAE has it empty (attention only in the "
                "middle), leave it out"
            )
        if self.dec_dim is not None and self.dim_mult[-2] % self.dim_mult[-1]:
            raise ValueError(
                "the 2.2 autoencoder (dec_dim) averages channels past its last stage and so cannot widen "
                "there; the last two entries of dim_mult must be equal, but are "
                f"{self.dim_mult[-2]} and {self.dim_mult[-1]}"
            )

    def check_statistics(self):
        if not len(self.mean) == len(self.std) == self.z_dim:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} entries; expected z_dim = "
                f"{self.z_dim} of each"
            )
        odd = [value for value in (*self.mean, *self.std) if not math.isfinite(value)]
        odd += [value for value in self.std if value <= 0]
        if odd:
            raise ValueError(
                f"the config's mean or std has {odd[0]} in it; means are finite and a standard deviation is "
                "positive, for latents are divided by it"
            )
