"""Does the reader count the operations of a block as they are?"""

from .verdict import attempted, exercise, expect, first_hint


@exercise("eight products and two attentions, each multiplication and each addition counted.")
def block_operations(answer):
    """The exercise of 19_compile.

    answer(tokens, words, dim, ffn_dim) -> operations of one block, keys and values of the words prepared.
    """
    for tokens, words, dim, ffn in ((100, 7, 32, 80), (3120, 20, 1536, 8960)):
        result = attempted(answer, tokens, words, dim, ffn)
        products = 2 * tokens * (6 * dim**2 + 2 * dim * ffn)
        attention = 4 * tokens * (tokens + words) * dim
        right = products + attention
        mistakes = {
            "a multiplication and an addition are two operations": result == right // 2,
            "that is the products alone; two attentions come on top": result == products,
            "the scores are counted, the sum of the values not": result == products + attention // 2,
            "the tokens read each other, and then the words too": result == right - 4 * tokens * words * dim,
            "keys and values of the words are made once a prompt": result == right + 4 * words * dim**2,
            "cross-attention has two products over the tokens, queries and output": (
                result == right - 4 * tokens * dim**2
            ),
        }
        expect(
            result == right, first_hint(mistakes, f"got {result:,} for {tokens} tokens; expected {right:,}")
        )
