"""Is my answer right, and if not, what went wrong?  A checker for each exercise, and the predictions.

    verdict.py      what a checker says, and how it comes to it
    parts.py        does the reader's part compute what the model's does?  02, 04, 05, 07, 08, 11, 15, 17
    sampling.py     does the reader's run end where it should?             01, 06, 09, 10
    bits.py         does the reader keep a matrix in 8 bits?               16
    skips.py        does the reader skip the steps that a cache would?     18
    counts.py       does the reader count the operations of a block?       19
    ranks.py        does the reader merge parts of an attention?           22
    grammars.py     which words may a language model say next?             12
    schedules.py    does each frame get its window?                        20
    messages.py     does the reader refuse a message that lies?            21
    searches.py     did the reader find what is hidden?                    03, 13, 14, 23
    predictions.py  what comes of a guess: `checks.reveal("07.2", "b")`; the answers lie in answers/

`checks.dit(my_modulation)` checks the exercise of the lesson on `dit`. A checker tries the reader's function
on inputs of its own and returns a Verdict. A function that still returns None is "not attempted". A wrong
answer is never just wrong: the checker knows the usual mistakes and names the one it saw.
"""

from .bits import int8_rows as quantize
from .counts import block_operations as compile
from .grammars import allowed_tokens as rewrite
from .messages import read_message as remote
from .parts import (
    causal_past as vae,
    likeliest_pieces as text,
    masked_attention as attention,
    merged_weight as lora,
    modulation as dit,
    offset_test as rope,
    picture_and_mask as image,
    tile_weights as offload,
)
from .predictions import reveal
from .ranks import merged_parts as parallel
from .sampling import (
    denoising_loop as pipeline,
    interval_guidance as guidance,
    one_look as flow,
    second_order_step as solvers,
)
from .schedules import static_windows as windows
from .searches import (
    colour_blocks as tracing,
    loudest_head as hooks,
    renamed_keys as weights,
    seen_motion as training,
)
from .skips import skipped_steps as cache
from .verdict import NOT_ATTEMPTED, Verdict
