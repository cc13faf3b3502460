"""How is it drawn?  Every figure that the notebooks use, by the name of what it shows.

    the pipeline   strip, journey, tree                        words       tokens_picture, distances
    attention      show_words, show_heads, word_animation, attention_rows, head_grid
    inside the dit residual_norms, modulation_valves           positions   rope_clocks, score_by_offset
    the path       schedule_plot, flow_path, x0_strip, error_vs_steps, guidance_arrows
    the vae        latent_sheet, receptive_field               pictures    frame_sheet, films, gallery, mask_over_time
    experiments    recovery_map, tap_valve                     numbers     bars, curves, heat_map, loss_curve
    with controls  live, explore, compare

Each returns a matplotlib Figure (word_animation and compare a Video, live and explore a Live, tree a Tree) and refuses what it cannot draw.
"""

from .canvas import dress, figure, png
from .charts import (
    bars,
    curves,
    distances,
    error_vs_steps,
    head_grid,
    heat_map,
    loss_curve,
    recovery_map,
    residual_norms,
    schedule_plot,
)
from .controls import Live, compare, explore, live
from .diagrams import (
    flow_path,
    guidance_arrows,
    journey,
    modulation_valves,
    rope_clocks,
    score_by_offset,
    strip,
    tap_valve,
    tokens_picture,
)
from .maps import (
    attention_rows,
    films,
    frame_sheet,
    gallery,
    latent_sheet,
    mask_over_time,
    receptive_field,
    show_heads,
    show_words,
    word_animation,
    x0_strip,
)
from .trees import Tree, tree

__all__ = [
    "Live",
    "Tree",
    "attention_rows",
    "bars",
    "compare",
    "curves",
    "distances",
    "dress",
    "error_vs_steps",
    "explore",
    "figure",
    "films",
    "flow_path",
    "frame_sheet",
    "gallery",
    "guidance_arrows",
    "head_grid",
    "heat_map",
    "journey",
    "latent_sheet",
    "live",
    "loss_curve",
    "mask_over_time",
    "modulation_valves",
    "png",
    "receptive_field",
    "recovery_map",
    "residual_norms",
    "rope_clocks",
    "schedule_plot",
    "score_by_offset",
    "show_heads",
    "show_words",
    "strip",
    "tap_valve",
    "tokens_picture",
    "tree",
    "word_animation",
    "x0_strip",
]
