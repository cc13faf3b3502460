"""How is it drawn?  Every figure that the notebooks use, by the name of what it shows.

    the pipeline   strip, journey, tree                        words       tokens_picture, distances
    attention      show_words, show_heads, word_animation, attention_rows, head_grid
    inside the dit residual_norms, modulation_valves           positions   rope_clocks, score_by_offset
    the path       schedule_plot, flow_path, x0_strip, error_vs_steps, guidance_arrows
    the vae        latent_sheet, receptive_field               image       mask_over_time
    films          frame_sheet, films, gallery
    experiments    recovery_map, tap_valve                     numbers     bars, curves, heat_map
    time           waterfall    with controls  live, explore, compare

Each returns a matplotlib Figure (word_animation and compare a Video, live and explore a Live, tree a Tree)
and refuses what it cannot draw.  `figure`, `dress` and `png` make one of your own in the same style.
"""

from .browser import explore
from .canvas import dress, figure, png
from .charts import (
    bars,
    curves,
    distances,
    error_vs_steps,
    head_grid,
    heat_map,
    recovery_map,
    residual_norms,
    schedule_plot,
)
from .controls import Live, compare, live
from .diagrams import journey, modulation_valves, strip, tap_valve, tokens_picture
from .maps import attention_rows, show_heads, show_words, word_animation
from .sheets import films, frame_sheet, gallery, latent_sheet, mask_over_time, receptive_field, x0_strip
from .times import waterfall
from .trees import Tree, tree
from .vectors import flow_path, guidance_arrows, rope_clocks, score_by_offset
