"""How do several machines think one thought?  Each holds some tokens; they exchange what they must.

Between blocks a rank holds its share of the tokens, and needs nothing of the others: norms, feed-forward and
the words are for each token alone. Only in self-attention all meet.

    Ulysses  each rank trades its tokens' heads for all tokens of a few heads, attends, and trades back
    ring     each rank keeps its queries, and keys and values go round; what was found is merged by weight

Guide: guides/parallel.md
"""

from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ..attention import attend
from ..contracts import fact
from ..dit import DiT
from ..dit.block import SelfAttention
from ..hooks import at, position
from ..hooks.records import Record
from .cache import Cached
from .compile import compiled_inside, replaced
from .promises import Extension, extension, layers, whole_number
from .ranks import Ranks, shares
from .tile import Tiled


@extension
def parallel(part, ulysses=1, ring=1, branches=1, shard=False):
    """A component that several processes compute together.   -> the component; exact, but for rounding

    ulysses   over how many ranks the heads of attention are shared; no more than there are heads
    ring      over how many ranks keys and values go round
    branches  2: one half of the ranks computes the run with the prompt, the other half that without
    shard     keep of each block only a share of the weights, and borrow the rest while it computes (FSDP2)

    Every process makes the same call, and then the same run: same prompt, same seed. There are ulysses * ring
    * branches of them, started by torchrun and joined by `ranks.begin()`; with all at 1, one alone. Tokens
    and heads need not divide evenly. A vae has to be `tiled`; its tiles are shared among all ranks.

    A cache goes inside, where its policy looks at the time alone: all ranks have to agree on what to skip.

    Taps show what this rank holds: its tokens, in Ulysses' attention its heads. `new.gathered(seen)` puts a
    record together, on every rank. All ranks must watch the same.

    Raises ValueError for numbers that do not fit the processes or the heads, and a dit that is not ours.
    Source: Jacobs et al. 2023, DeepSpeed Ulysses; Liu et al. 2023, Ring Attention.
    """
    counts = {"ulysses": ulysses, "ring": ring, "branches": branches}
    for name, count in counts.items():
        whole_number("parallel", name, count, 1, of="processes")
    if branches > 2:
        raise ValueError(f"parallel(branches={branches}); a run has two, with and without the prompt: 1 or 2")
    mesh = mesh_of(counts, shard, part)
    if is_vae(part):
        return shared_tiles(part, mesh["all"])
    if not (models := layers(part, DiT)):
        raise ValueError(f"parallel shares the tokens of a dit of ours; {type(part).__name__} arrived")
    if others := replaced(part):
        raise ValueError(f"parallel shares attention, and {part!r} has its own ({others}); leave one out")
    if any(cache.policy.blocks for cache in layers(part, Cached).values()):
        raise ValueError(
            f"the policy of {part!r} looks at tokens, and each rank has others, so they would not agree "
            "on what to skip; teacache and magcache look at the time"
        )
    if compiled_inside(part):
        raise ValueError(
            f"parallel exchanges tokens within the blocks of {part!r}, which are compiled; leave one out"
        )
    heads = min(model.config.num_heads for model in models.values())
    if ulysses > heads:
        raise ValueError(f"parallel(ulysses={ulysses}), and this dit has {heads} heads; use ring= beside it")
    if branches > 1 and fact("dit", part, "prepare") is None:
        raise ValueError("parallel(branches=2) needs a dit that prepares prompts, to know both of them")
    shared = Shared(mesh["ulysses"], mesh["ring"], mesh["tokens"])
    shared.cached = any(cache.policy.over == "blocks" for cache in layers(part, Cached).values())
    for model in models.values():
        share_tokens(model, shared)
    if shard:
        for model in models.values():
            share_weights(model, mesh["shard"])
    kind = Sharded if shard else Parallel
    return kind(part, shared, Branches(mesh["branches"]))


class Parallel(Extension):
    """See `parallel`."""

    def __init__(self, wraps, shared, branches):
        super().__init__(wraps, exact=True)
        self.shared, self.branches = shared, branches

    def prepare(self, text, image=None):
        """As dit.prepare; who computes the other branch has to know its prompt."""
        context = self.wraps.prepare(text, image)
        self.branches.remember(context)
        return context

    def forward(self, x, t, text, *inputs, **options):
        before = self.sent()
        velocity = self.branches.velocity(self.wraps, x, t, text, *inputs, **options)
        sent = {name: size - before[name] for name, size in self.sent().items() if size > before[name]}
        self.memory.note(step=position().get("step"), branch=position().get("branch"), **sent)
        return velocity

    def sent(self):
        """Bytes that this rank has sent so far, by what for."""
        shared = self.shared
        there = {"ulysses": shared.ulysses, "ring": shared.ring, "last": shared.tokens}
        there["branches"] = self.branches.ranks
        return {name: ranks.sent for name, ranks in there.items()}

    def gathered(self, seen):
        """A record of this rank's values, with those of the others. Every rank has to call it.   -> Record"""
        whole = Record()
        for where, value in seen:
            whole.add(where, self.shared.whole(where, value))
        return whole


class Sharded(Parallel):
    """One that holds shares of weights, which belong to a group of processes."""

    shares = False

    def __deepcopy__(self, memo):
        raise ValueError(
            "parallel(shard=True) goes last: an extension around it would copy shares of weights"
        )


class Branches:
    """Each rank computes one branch of a run, and gets the other one from its neighbour."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.prompts, self.kept = WeakKeyDictionary(), WeakKeyDictionary()

    def __deepcopy__(self, memo):
        return Branches(self.ranks)  # a copy has met no run

    def remember(self, context):
        """The prompt of this run and branch, as the dit prepared it."""
        run, branch = position().get("run"), position().get("branch")
        if self.ranks.size > 1 and run is not None and branch is not None:
            self.prompts.setdefault(run, {})[branch] = context

    def velocity(self, dit, x, t, text, *inputs, **options):
        """What `dit` says in this branch. The other's is kept for when it is asked for, at the same x."""
        run, branch = position().get("run"), position().get("branch")
        prompts = {} if run is None else self.prompts.get(run, {})
        if branch not in prompts or len(prompts) != self.ranks.size:
            return dit(x, t, text, *inputs, **options)  # of a loop by hand: every rank computes it
        # The same object: a guide asks for both branches with one x, and the next step has another.
        asked_at, found = self.kept.get(run, (None, {}))
        if asked_at is not x or branch not in found:
            mine = list(prompts)[self.ranks.rank]
            with at(branch=mine):
                own = dit(x, t, prompts[mine], *inputs, **options).contiguous()
            found = dict(zip(prompts, self.ranks.swap([own] * len(prompts), [own.shape] * len(prompts))))
        velocity = found.pop(branch)
        self.kept[run] = x, found
        return velocity


class Shared:
    """How the tokens of a dit are shared out: over a ring of groups, each of which shares the heads.

    tokens  all ranks of a branch, in the order of the tokens that they hold
    """

    def __init__(self, ulysses, ring, tokens):
        self.ulysses, self.ring, self.tokens = ulysses, ring, tokens
        self.lengths = [0] * tokens.size  # how many tokens each rank holds, in this call
        self.own_times = False  # has each token a time of its own?
        self.cached = False  # does a cache within decide, by what it sees of the time, whether blocks run?

    def cut(self, x, axis=1):
        """This rank's tokens of x; an axis of length 1 holds for all of them."""
        if x.shape[axis] == 1:
            return x
        return x.split(self.lengths, axis)[self.tokens.rank]

    def group(self, place=None):
        """How many tokens each rank of a group of heads holds; `place` in the ring, by default our own."""
        place, size = self.ring.rank if place is None else place, self.ulysses.size
        return self.lengths[place * size : (place + 1) * size]

    def whole(self, where, value):
        """A captured value of this rank, with those of the others."""
        layout = where.layout.split()
        inside = "self_attn" in where.path and where.name in ("scores", "probs", "heads")
        if inside:  # these have few heads, and the tokens of a group
            heads = shares(self.heads, self.ulysses.size)
            value = self.ulysses.gather(value.contiguous(), layout.index("heads"), heads)
            groups = [sum(self.group(place)) for place in range(self.ring.size)]
            return self.ring.gather(value.contiguous(), layout.index("n"), groups)
        axis = "m" if "self_attn" in where.path and where.name in ("k", "v") else "n"
        local = ".blocks." in f".{where.path}." or ".vace_blocks." in f".{where.path}."
        for_all = where.name == "modulation" and not self.own_times  # one row, for every token
        if not local or for_all or axis not in layout:
            return value
        return self.tokens.gather(value.contiguous(), layout.index(axis), self.lengths)


# ---- tokens -----------------------------------------------------------------------------------------------


def share_tokens(model, shared):
    """Let a dit compute its blocks with this rank's tokens alone."""
    model.each_block = EachBlock(shared, model.each_block)
    model.control_tokens = Cut(shared, model.control_tokens)
    model.final.forward = Whole(shared, model.final.forward)
    shared.heads = model.config.num_heads  # for `whole`, which puts captured heads together
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.listen = Listening(shared, module)


class EachBlock:
    """In the place of DiT.each_block."""

    def __init__(self, shared, blocks):
        self.shared, self.blocks = shared, blocks

    def __call__(self, x, time, time6, rotation, *rest):
        shared = self.shared
        shared.lengths = shares(x.shape[1], shared.tokens.size)
        if not min(shared.lengths):
            raise ValueError(f"{x.shape[1]} tokens for {shared.tokens.size} ranks; use fewer of them")
        shared.own_times = time.shape[1] > 1
        if shared.own_times and shared.cached:
            raise ValueError(
                "here is a time for each token, so a cache within would see another one on each rank, and "
                "they would not agree on what to skip; leave out the cache, or parallel"
            )
        mine = [shared.cut(part) for part in (x, time, time6)]
        return self.blocks(*mine, shared.cut(rotation, 0), *rest)


class Cut:
    """In the place of DiT.control_tokens."""

    def __init__(self, shared, function):
        self.shared, self.function = shared, function

    def __call__(self, control):
        return self.shared.cut(self.function(control))


class Whole:
    """In the place of Final.forward: what each rank made of its tokens, together."""

    def __init__(self, shared, forward):
        self.shared, self.forward = shared, forward

    def __call__(self, x, time):
        velocity = self.forward(x, self.shared.cut(time)).contiguous()
        return self.shared.tokens.gather(velocity, 1, self.shared.lengths)


class Listening:
    """In the place of SelfAttention.listen: tokens for heads, around the ring, heads for tokens."""

    def __init__(self, shared, attention):
        self.shared, self.attention = shared, attention

    def __call__(self, q, k, v):
        ulysses, lengths = self.shared.ulysses, self.shared.group()
        b, heads, _, d = q.shape
        few = shares(heads, ulysses.size)

        if ulysses.size > 1:
            given = torch.cat([q, k, v]).split(few, 1)  # [3 b, few heads, n, d] for each rank
            shapes = [(3 * b, few[ulysses.rank], n, d) for n in lengths]
            q, k, v = torch.cat(ulysses.swap(given, shapes), 2).chunk(3)
        found = self.around(q, k, v)
        if ulysses.size > 1:
            given = found.split(lengths, 2)
            shapes = [(b, count, lengths[ulysses.rank], d) for count in few]
            found = torch.cat(ulysses.swap(given, shapes), 1)
        return found

    def around(self, q, k, v):
        """Attention of these queries to the keys of the whole ring."""
        tap, ring, kernel = self.attention.tap, self.shared.ring, self.attention.kernel
        if ring.size == 1:
            return attend(q, k, v, tap=tap, kernel=kernel)
        lengths = [sum(self.shared.group(place)) for place in range(ring.size)]
        if tap.live is None:
            return attend_around(q, k, v, ring, lengths)
        # Who looks wants all scores. They are made beside; the output still comes by the ring.
        keys, values = (ring.gather(x.contiguous(), 2, lengths) for x in (k, v))

        def by_the_ring(q, *_):
            return attend_around(q, k, v, ring, lengths)

        return attend(q, keys, values, tap=tap, kernel=by_the_ring)


def attend_around(q, k, v, ring, lengths):
    """Attention whose keys and values come one rank's share at a time.   -> [b, heads, n, d]

    Each share gives its own mean of values, and the log of the sum of its weights; by those the means are
    merged, as if there had been one softmax.
    """
    share = torch.stack([k, v])  # [2, b, heads, m, d]
    found = total = None
    for turn in range(ring.size):
        source = (ring.rank - turn) % ring.size  # whose keys these are
        passing = None
        if turn < ring.size - 1:  # on their way while this rank computes
            # What comes next began with the rank before that one; lengths[-1] closes the ring.
            shape = (*share.shape[:3], lengths[source - 1], share.shape[4])
            passing = ring.pass_on(share, shape)
        part, weight = attend_part(q, *share)
        if found is None:
            found, total = part.float(), weight
        else:
            both = torch.logaddexp(total, weight)
            found = found * (total - both).exp()[..., None] + part * (weight - both).exp()[..., None]
            total = both
        share = share if passing is None else ring.arrived(passing)
    return found.to(q.dtype)


def attend_part(q, k, v):
    """Attention to some of the keys.   -> [b, heads, n, d], log of the sum of exp(scores) [b, heads, n]"""
    scale = q.shape[-1] ** -0.5
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    if q.device.type == "cuda" and q.dtype.itemsize == 2:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    scores = (q @ k.mT).float() * scale
    return (scores.softmax(-1).to(v.dtype) @ v), scores.logsumexp(-1)


# ---- weights ----------------------------------------------------------------------------------------------


def share_weights(model, mesh):
    """Keep a share of each block's weights (FSDP2)."""
    from torch.distributed.fsdp import fully_shard

    for block in (*model.blocks, *(model.vace_blocks or ())):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        reader = block.cross_attn
        reader.text_kv, reader.image_kv = Borrowed(block, reader.text_kv), Borrowed(block, reader.image_kv)


class Borrowed:
    """A method of a block that is called outside its forward: the weights come for it, too."""

    def __init__(self, block, method):
        self.block, self.method = block, method

    def __call__(self, *given):
        self.block.unshard()
        found = self.method(*given)
        self.block.reshard()
        return found


# ---- a vae ------------------------------------------------------------------------------------------------


def is_vae(part):
    return callable(getattr(part, "decode", None)) and callable(getattr(part, "encode", None))


def shared_tiles(vae, ranks):
    """Tiles in turn to the ranks."""
    tiles = layers(vae, Tiled)
    if not tiles:
        raise ValueError("parallel shares the tiles of a vae: parallel(tiled(vae))")
    for tiled in tiles.values():
        tiled.each = EachTile(ranks)
    return Extension(vae, exact=True)


class EachTile:
    """In the place of Tiled.each: every rank makes its tiles, and shows them to the others."""

    def __init__(self, ranks):
        self.ranks = ranks

    def __call__(self, function, pieces):
        pieces, ranks = list(pieces), self.ranks
        mine = {i: function(piece) for i, piece in enumerate(pieces) if i % ranks.size == ranks.rank}
        like = next(iter(mine.values()), pieces[0])
        return (ranks.from_rank(i % ranks.size, mine.get(i), like) for i in range(len(pieces)))


# ---- the processes ----------------------------------------------------------------------------------------


def mesh_of(counts, shard, part):
    """The groups that this process is in.   -> {name: Ranks}, "shard" a mesh of all"""
    needed = counts["ulysses"] * counts["ring"] * counts["branches"]
    if not dist.is_initialized():
        if needed > 1 or shard:
            raise ValueError(
                f"parallel({', '.join(f'{name}={count}' for name, count in counts.items())}) needs {needed} "
                "processes, and this one is alone; start them with torchrun --nproc-per-node, and call "
                "moddiff.extensions.ranks.begin() first"
            )
        return dict.fromkeys(("branches", "ring", "ulysses", "tokens", "all", "shard"), Ranks())
    world = dist.get_world_size()
    if needed != world and not (shard and needed == 1) and not is_vae(part):
        raise ValueError(f"ulysses * ring * branches are {needed}, and there are {world} processes")
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found = {"all": Ranks(dist.group.WORLD), "shard": init_device_mesh(device, (world,))}
    if needed != world:
        return found | dict.fromkeys(("branches", "ring", "ulysses", "tokens"), Ranks())
    sizes = counts["branches"], counts["ring"], counts["ulysses"]
    mesh = init_device_mesh(device, sizes, mesh_dim_names=("branches", "ring", "ulysses"))
    found |= {name: Ranks(mesh.get_group(name)) for name in mesh.mesh_dim_names}
    return found | {"tokens": Ranks(mesh["ring", "ulysses"]._flatten("tokens").get_group())}
