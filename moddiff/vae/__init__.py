"""Where does the video live?  Wan's causal video autoencoders, 2.1 and 2.2: from pixels to a latent and back.

Time is causal: a frame is coded from itself and earlier frames only. So a video can be coded whole, or in
chunks that hand each other the last frames they saw (the time cache), and both give the same numbers.
Parameter names are the official ones.

    config.py   which autoencoder it is: sizes, and the mean and spread of the latent
    causal.py   the convolution that looks back, and how it is computed
    layers.py   residual blocks, attention, and the layers that halve or double frames, height and width
    model.py    encoder, decoder, and the two together
"""

from .causal import CausalConv3d
from .config import LATENT_STATISTICS, VAEConfig
from .layers import AttentionBlock, ResidualBlock, RMSNorm
from .model import VAE, Decoder, Encoder, fold, unfold
