"""What one of several processes does in tests/test_parallel.py: all at once, since to start them takes long.

Started with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; writes what it found as JSON.
"""

import json
import os
import sys
from pathlib import Path

import small
import torch

from moddiff import capture, hooks, patch
from moddiff.cli.together import together
from moddiff.experts import Experts
from moddiff.extensions import adapted, cached, parallel, quantized, ranks, tiled
from moddiff.hooks import at

PROMPT = "a red circle moving left on a black background"
GRIDS = [(3, 4, 6), (5, 6, 2), (1, 2, 10)]  # 18, 15 and 5 tokens: not all divide


def inputs(dit, grid, per_token=False, batch=2):
    g = torch.Generator().manual_seed(sum(grid))
    config, cells = dit.config, (grid[0], grid[1], grid[2])
    x = torch.randn(batch, config.out_dim, *cells, generator=g)
    tokens = grid[0] * grid[1] * grid[2] // 4
    t = torch.rand(batch, tokens, generator=g) * 1000 if per_token else torch.tensor([700.0, 30.0])[:batch]
    text = [torch.randn(3 + i, config.text_dim, generator=g) for i in range(batch)]
    given = {"x": x, "t": t, "text": text}
    if config.in_dim > config.out_dim:
        given["y"] = torch.randn(batch, config.in_dim - config.out_dim, *cells, generator=g)
        given["image"] = torch.randn(batch, 257, config.image_dim, generator=g)
    if config.vace_layers:
        given["control"] = torch.randn(batch, config.vace_in_dim, *cells, generator=g)
    return given


def far(a, b):
    """The largest difference, as a share of the largest value where that is above 1."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


def attention(found, world, shapes):
    """Ulysses, ring and both, over heads and tokens that do not divide, with captures and a patch."""
    for heads in (2, 3, 4, 5):
        dit = small.dit(dim=heads * 12, num_heads=heads)
        for grid in GRIDS:
            given = inputs(dit, grid)
            with capture(dit, "blocks.1.*", "patches") as seen:
                wanted = dit(**given)
            with patch(dit, "blocks.0.ffn", hooks.zero()):
                edited = dit(**given)
            for ulysses, ring in shapes:
                if ulysses > heads:
                    continue
                new = parallel(dit, ulysses=ulysses, ring=ring)
                row = {"heads": heads, "grid": grid, "ulysses": ulysses, "ring": ring}
                row["error"] = far(new(**given), wanted)
                row["sent"] = new.report().rows[-1]
                with capture(new, "blocks.1.*", "patches") as mine:
                    row["watched"] = far(new(**given), wanted)
                whole = new.gathered(mine)
                both = list(zip(whole, seen, strict=True))
                row["names"] = all(a.path == b.path and a.name == b.name for (a, _), (b, _) in both)
                row["captured"] = max(far(a, b) for (_, a), (_, b) in both)
                row["local"] = min(value.shape[1] for where, value in mine if where.name == "resid_post")
                with patch(new, "blocks.0.ffn", hooks.zero()):
                    row["patched"] = far(new(**given), edited)
                found["attention"].append(row)


def inputs_of_all_kinds(found, world, shapes):
    for ulysses, ring in shapes:
        for name, dit, per_token in (
            ("i2v", small.dit("i2v"), False),
            ("i2v, three heads", small.dit("i2v", dim=36, num_heads=3), False),
            ("vace", small.dit("vace"), False),
            ("times of tokens", small.dit(), True),
        ):
            given = inputs(dit, (5, 6, 2), per_token)
            if ulysses <= 2:
                new = parallel(dit, ulysses=ulysses, ring=ring)
                found["kinds"].append({"name": name, "error": far(new(**given), dit(**given))})
        for name, dit in (
            ("quantized", quantized(small.dit(ffn_dim=64), "int8")),
            ("adapted", adapted(small.dit(), rank=2)),
            ("experts", Experts(small.dit(), small.dit(seed=1), 0.5)),
        ):
            if ulysses <= 2:
                given = inputs(small.dit(), (3, 4, 6))
                error = far(parallel(dit, ulysses=ulysses, ring=ring)(**given), dit(**given))
                found["kinds"].append({"name": name, "error": error})


def run(pipe, **options):
    return torch.stack([state.next for state in pipe.steps(PROMPT, seed=3, **options)])


def runs(found, world, shapes, folder):
    pipe = small.pipeline(folder / "tokenizer")
    wanted, film = run(pipe), pipe(PROMPT, seed=3)
    ways = [dict(ulysses=u, ring=r) for u, r in shapes if u <= 2]
    ways += [dict(branches=2, ulysses=world // 2), dict(shard=True)]
    for how in ways:
        new = pipe.replace(dit=parallel(pipe.dit, **how))
        row = {"how": str(how), "error": far(run(new), wanted)}
        row["pixels"] = int(
            (new(PROMPT, seed=3).frames.astype(int) - film.frames.astype(int)).__abs__().max()
        )
        row["unguided"] = far(run(new, scale=1.0), run(pipe, scale=1.0))
        states = [iter(one.steps(PROMPT, seed=3)) for one in (new, new)]  # two runs in turn
        both = [torch.stack(pair) for pair in zip(*[[next(s).next for s in states] for _ in range(3)])]
        row["in turn"] = max(far(one, wanted) for one in both)
        with capture(new.dit, "blocks.0.resid_post", steps=0) as seen:
            run(new)
        row["branches"] = [where.branch for where, _ in seen]
        row["sent"] = [sum(row.get(name, 0) for row in new.dit.report()) for name in ("ring", "branches")]
        found["runs"].append(row)


def one_in_two(now, here):
    """A policy of the reader's own: every second step is skipped."""
    return now.step % 2 == 1


def caches(found, world, folder):
    """A cache within: every rank keeps the residual of its tokens, and all have to agree on what to skip."""
    pipe = small.pipeline(folder / "tokenizer")
    policies = {
        "teacache": dict(policy="teacache", coefficients="plain", threshold=1e6),
        "a function": dict(policy=one_in_two),
        "a function over the call": dict(policy=one_in_two, over="call"),
    }
    for name, how in policies.items():
        one = cached(pipe.dit, **how)
        wanted = run(pipe.replace(dit=one))
        for way in (dict(ring=world), dict(branches=2, ring=world // 2)):
            new = parallel(one, **way)
            row = {"name": name, "how": str(way), "error": far(run(pipe.replace(dit=new)), wanted)}
            row["skipped"] = sum(each["skipped"] for each in new.wraps.report())
            row["plain"] = far(run(pipe), wanted)
            found["caches"].append(row)


def weights(found, world):
    dit = small.dit()
    new = parallel(dit, shard=True)
    given = inputs(dit, (3, 4, 6))
    error = far(new(**given), dit(**given))
    held = [p for block in new.blocks for p in block.parameters()]
    local = sum(p.to_local().numel() for p in held)
    context = new.prepare(given.pop("text"))
    again = far(new(text=context, **given), new(text=context, **given))
    found["weights"] = {"error": error, "share": local / sum(p.numel() for p in held), "again": again}
    found["unchanged"] = all(p.numel() for p in dit.parameters()) and type(dit.blocks[0]).__name__ == "Block"
    try:
        quantized(new, "int8")
    except ValueError as refusal:
        found["refused"] = str(refusal)


def vae(found, world):
    one = small.pipeline(Path(sys.argv[2]) / "tokenizer").vae
    plain = tiled(one, size=(16, 16), overlap=(8, 8))
    new = parallel(plain)
    latent = torch.randn(1, small.Z, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    video = plain.decode(latent)
    found["vae"] = {
        "decode": torch.equal(new.decode(latent), video),
        "encode": torch.equal(new.encode(video), plain.encode(video)),
        "stream": torch.equal(torch.cat([*new.stream(latent)], 2), torch.cat([*plain.stream(latent)], 2)),
    }


def refusals(found, world):
    dit, said = small.dit(), []
    for how in (
        dict(ulysses=world + 1),
        dict(ulysses=world, ring=2),
        dict(ring=0),
        dict(branches=3),
        dict(ulysses="2"),
    ):
        try:
            parallel(dit, **how)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    for part in (lambda x, t, text: x, small.pipeline(Path(sys.argv[2]) / "tokenizer").vae):
        try:
            parallel(part, ring=world)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    try:
        parallel(dit, ring=world)(**inputs(dit, (1, 2, 2), batch=1))
        said.append("")
    except ValueError as error:
        said.append(str(error))
    try:
        parallel(cached(dit, "first-block"), ring=world)
        said.append("")
    except ValueError as error:
        said.append(str(error))
    timed = parallel(cached(dit, "teacache", coefficients="plain"), ring=world)
    try:
        timed(**inputs(dit, (3, 4, 6), per_token=True))
        said.append("")
    except ValueError as error:
        said.append(str(error))
    found["refusals"] = said


def lost(found, world):
    """The last rank ends in the middle; the others say so."""
    dit, given = small.dit(), inputs(small.dit(), (3, 4, 6))
    new = parallel(dit, ring=world)
    with at(step=0):
        new(**given)
    if ranks.dist.get_rank() == world - 1:
        os._exit(0)
    try:
        for _ in range(3):
            new(**given)
    except ranks.LostRank as error:
        found["lost"] = str(error)


def agreed(found):
    """What `moddiff generate` has the processes agree on."""
    rank, asked = os.environ["RANK"], []

    def rewriter(prompt):
        asked.append(prompt)
        return f"rank {rank} said 红色: {prompt}"

    with together("cpu", ulysses=1, ring=2, branches=1, shard=False) as group:
        found["agreed"] = [group.agreed(rewriter)("a circle"), group.seed(-1), group.seed(7)]
        found["nothing"] = group.agreed(lambda prompt: "")("a circle")
    found["asked"] = len(asked)


@torch.no_grad()
def main(what, folder):
    if what == "agreed":
        found = {}
        agreed(found)
        Path(folder, f"agreed-2-{os.environ['RANK']}.json").write_text(json.dumps(found))
        return
    ranks.begin("cpu", timeout=60)
    world, rank = ranks.dist.get_world_size(), ranks.dist.get_rank()
    found = {"rank": rank, "attention": [], "kinds": [], "runs": [], "caches": []}
    shapes = {2: [(2, 1), (1, 2)], 4: [(4, 1), (1, 4), (2, 2)]}[world]
    if what == "lost":
        lost(found, world)
    else:
        attention(found, world, shapes)
        inputs_of_all_kinds(found, world, shapes)
        runs(found, world, shapes, Path(folder))
        caches(found, world, Path(folder))
        weights(found, world)
        vae(found, world)
        refusals(found, world)
    Path(folder, f"{what}-{world}-{rank}.json").write_text(json.dumps(found))
    ranks.end()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
