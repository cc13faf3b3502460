"""Is my answer right, and if not, what went wrong?  A checker for each exercise, and the predictions.

    verdict.py    what a checker says, and how it comes to it
    parts.py      does the reader's part compute what the model's does?  02, 04, 05, 07, 08, 11
    sampling.py   does the reader's run end where it should?             01, 06, 09, 10
    searches.py   did the reader find what is hidden?                    03, 13, 14

`checks.dit(my_modulation)` checks the exercise of the lesson on `dit`. A checker tries the reader's function
on inputs of its own and returns a Verdict. A function that still returns None is "not attempted". A wrong
answer is never just wrong: the checker knows the usual mistakes and names the one it saw.
"""

from .parts import causal_past as vae
from .parts import likeliest_pieces as text
from .parts import masked_attention as attention
from .parts import modulation as dit
from .parts import offset_test as rope
from .parts import picture_and_mask as image
from .sampling import denoising_loop as pipeline
from .sampling import interval_guidance as guidance
from .sampling import one_look as flow
from .sampling import second_order_step as solvers
from .searches import colour_blocks as tracing
from .searches import loudest_head as hooks
from .searches import renamed_keys as weights
from .verdict import NOT_ATTEMPTED, Verdict, reveal
