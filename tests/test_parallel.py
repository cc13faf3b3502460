"""Do several processes compute what one does?  Real processes, over gloo; at_work.py is what each does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
from answers import rejected, solution

from moddiff import checks
from moddiff.extensions import parallel
from moddiff.extensions.ranks import begin, shares

HERE = Path(__file__).parent
WITHIN = 1e-6


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def started(world, *command):
    """That many processes of a command, each told its rank, as torchrun does.   -> [Popen]"""
    common = dict(
        WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1"
    )
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ
            | common
            | dict(RANK=str(rank), LOCAL_RANK=str(rank), PYTHONPATH=f"{HERE}:{HERE.parent}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def ended(processes, timeout=300):
    return [(process.communicate(timeout=timeout), process.returncode) for process in processes]


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    small.tokenizer_file(folder / "tokenizer")
    for (_, said), code in ended(started(request.param, HERE / "at_work.py", "all", folder)):
        assert code == 0, said
    return [
        json.loads((folder / f"all-{request.param}-{rank}.json").read_text()) for rank in range(request.param)
    ]


def test_heads_and_tokens_are_shared_as_evenly_as_can_be():
    assert shares(7, 3) == [3, 2, 2] and shares(12, 8) == [2] * 4 + [1] * 4 and shares(4, 4) == [1] * 4


def test_attention_is_that_of_one_process(found):
    for rank in found:
        assert len(rank["attention"]) == {2: 24, 4: 30}[len(found)]
        for row in rank["attention"]:
            assert row["error"] <= WITHIN and row["watched"] <= WITHIN and row["patched"] <= WITHIN, row


def test_taps_show_a_share_and_gathered_the_whole(found):
    for rank in found:
        for row in rank["attention"]:
            tokens = row["grid"][0] * row["grid"][1] * row["grid"][2] // 4
            assert row["names"] and row["captured"] <= WITHIN, row
            assert row["local"] == shares(tokens, len(found))[rank["rank"]] < tokens


def test_what_is_sent_is_what_the_formula_says(found):
    """Of float32, in two blocks, for a batch of two. d channels of a head, n tokens, h heads."""
    for rank in found:
        for row in rank["attention"]:
            h, d, ulysses, ring = row["heads"], 12, row["ulysses"], row["ring"]
            n = row["grid"][0] * row["grid"][1] * row["grid"][2] // 4
            mine, lengths = rank["rank"], shares(n, len(found))
            place, turn = divmod(mine, ulysses)
            group = lengths[place * ulysses : (place + 1) * ulysses]
            heads, rings = (
                shares(h, ulysses)[turn],
                [sum(lengths[i * ulysses : (i + 1) * ulysses]) for i in range(ring)],
            )
            to_heads = 3 * lengths[mine] * (h - heads) * d
            back = heads * (sum(group) - lengths[mine]) * d
            # Every share of keys and values but the one that the next rank had first.
            around = 2 * heads * d * (n - rings[(place + 1) % ring])
            last = lengths[mine] * 4 * small.Z * (len(found) - 1)
            wanted = {"ulysses": to_heads + back, "ring": around}
            for name, numbers in wanted.items():
                assert row["sent"].get(name, 0) == 2 * 2 * 4 * numbers * (
                    len({"ulysses": ulysses, "ring": ring}) > 0
                )
            assert row["sent"]["last"] == 2 * 4 * last


def test_every_kind_of_input_and_of_extension_goes(found):
    for rank in found:
        assert {row["name"] for row in rank["kinds"]} == {
            "i2v", "i2v, three heads", "vace", "times of tokens", "quantized", "adapted", "experts",
        }  # fmt: skip
        for row in rank["kinds"]:
            assert row["error"] <= WITHIN, row


def test_a_run_is_that_of_one_process(found):
    for rank in found:
        assert any("branches" in row["how"] for row in rank["runs"])
        for row in rank["runs"]:
            assert max(row["error"], row["unguided"], row["in turn"]) <= WITHIN and row["pixels"] <= 1, row


def test_each_computes_its_branch(found):
    half = len(found) // 2
    for rank in found:
        row = next(row for row in rank["runs"] if "branches" in row["how"])
        assert set(row["branches"]) == {"cond" if rank["rank"] < half else "uncond"}
        # Three steps, each a float32 velocity of 4 x 3 x 4 x 6 to the rank that computes the other branch.
        assert row["sent"] == [0, 3 * 4 * small.Z * 3 * 4 * 6]


def test_a_cache_within_skips_what_it_skips_in_one_process(found):
    for rank in found:
        assert len(rank["caches"]) == 6
        for row in rank["caches"]:
            # Of three steps the second, in each branch that this rank computes; without it another film.
            branches = 1 if "branches" in row["how"] else 2
            assert row["skipped"] == branches and row["error"] <= WITHIN < row["plain"], row


def test_weights_are_shared_and_the_dit_that_came_in_is_not(found):
    for rank in found:
        assert rank["weights"]["error"] <= WITHIN and rank["weights"]["again"] == 0
        assert rank["weights"]["share"] < 1.3 / len(found) and rank["unchanged"]
        assert "goes last" in rank["refused"]


def test_tiles_of_a_vae_are_shared(found):
    assert all(all(rank["vae"].values()) for rank in found)


def test_what_cannot_be_is_refused_at_the_call(found):
    for rank in found:
        world, said = len(found), rank["refusals"]
        assert f"are {world + 1}, and there are {world} processes" in said[0]
        assert f"are {2 * world}, and there are {world} processes" in said[1]
        assert "parallel(ring=0)" in said[2] and "1 or 2" in said[3] and "parallel(ulysses='2')" in said[4]
        assert "a dit of ours" in said[5] and "parallel(tiled(vae))" in said[6]
        assert f"1 tokens for {world} ranks" in said[7]
        assert "they would not agree on what to skip" in said[8] and "a time for each token" in said[9]


def test_a_rank_that_ends_ends_all_with_a_sentence(tmp_path):
    small.tokenizer_file(tmp_path / "tokenizer")
    for (_, said), code in ended(started(2, HERE / "at_work.py", "lost", tmp_path), timeout=90):
        assert code == 0, said
    told = json.loads((tmp_path / "lost-2-0.json").read_text())["lost"]
    assert told.startswith("rank 0 of 2 lost another, which has ended or does not answer (")


def test_alone_it_is_the_plain_one_and_says_what_is_missing():
    dit = small.dit()
    assert repr(parallel(dit)) == "parallel(DiT)" and parallel(dit).exact
    with pytest.raises(
        ValueError, match=r"needs 4 processes, and this one is alone; start them with torchrun"
    ):
        parallel(dit, ulysses=2, ring=2)
    with pytest.raises(RuntimeError, match="torchrun --nproc-per-node 2 -m moddiff generate"):
        begin()


def test_the_command_line_gives_the_bytes_of_one_process(tmp_path):
    prompt, small_run = "a red circle moving left on a black background", ["--steps", "2", "--frames", "5"]
    make = ["-m", "moddiff", "generate", prompt, *small_run, "-o"]
    (alone,) = ended([subprocess.Popen([sys.executable, *make, tmp_path / "one.mp4"])])
    assert alone[1] == 0
    run = started(2, *make, tmp_path / "two.mp4", "--branches", "2")
    (first, code), (second, other) = ended(run)
    assert code == other == 0 and second[0] == "" and "5 frames" in first[0], (first, second)
    assert (tmp_path / "two.mp4").read_bytes() == (tmp_path / "one.mp4").read_bytes()

    # An option of theirs with nobody there, and somebody there without an option.
    (said, code), *_ = ended(started(1, *make, tmp_path / "no.mp4", "--ring", "2"))
    assert code == 2 and "ulysses * ring * branches are 2, and there are 1 processes" in said[1]
    for said, code in ended(started(2, *make, tmp_path / "no.mp4")):
        assert code == 2 and "2 processes were started, and no option says what they share" in said[1]
    assert not (tmp_path / "no.mp4").exists()


def test_a_rewriter_is_asked_by_the_first_process_alone(tmp_path):
    """What a language model says twice is not the same twice; all processes must have one prompt and seed."""
    for (_, said), code in ended(started(2, HERE / "at_work.py", "agreed", tmp_path)):
        assert code == 0, said
    found = [json.loads((tmp_path / f"agreed-2-{rank}.json").read_text()) for rank in range(2)]
    assert found[0]["agreed"] == found[1]["agreed"] and found[0]["agreed"][0] == "rank 0 said 红色: a circle"
    assert [rank["asked"] for rank in found] == [1, 0]
    assert [rank["nothing"] for rank in found] == ["", ""]


# ---- the exercise of the lesson ------------------------------------------------------------------------


def merge(found, total, part, weight, share=torch.exp, both=torch.logaddexp):
    whole = both(total, weight)
    return found * share(total - whole)[..., None] + part * share(weight - whole)[..., None], whole


def test_the_merge_of_the_solution_is_right():
    assert checks.parallel(solution("22_parallel", "my_merge")).right is True
    assert checks.parallel(merge).right is True
    assert checks.parallel(lambda *parts: None).right is None


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (lambda f, t, p, w: ((f + p) / 2, torch.logaddexp(t, w)), "the plain mean of both"),
        (lambda f, t, p, w: merge(p, t, f, w), "changed places"),
        (lambda f, t, p, w: (f + p, torch.logaddexp(t, w)), "added as they are"),
        (lambda f, t, p, w: merge(f, t, p, w, torch.exp, torch.add), "each part times exp"),
        (lambda f, t, p, w: (merge(f, t, p, w)[0], t + w), "logs were added"),
        (lambda f, t, p, w: (merge(f, t, p, w)[0], t), "total is as it was"),
        (lambda f, t, p, w: (merge(f, t, p, w)[0], w), "that of the part alone"),
        (lambda f, t, p, w: merge(f, t, p, w, both=lambda a, b: (a.exp() + b.exp()).log()), "overflows"),
        (lambda f, t, p, w: merge(f, t, p, w)[0], "expected the pair"),
        (lambda f, t, p, w: (f[..., 0], t), "expected [2, 3, 5, 4]"),
        (lambda f, t, p, w: f * t, "it stopped with RuntimeError"),
        (
            lambda f, t, p, w: (
                f * (t / (t + w))[..., None] + p * (w / (t + w))[..., None],
                torch.logaddexp(t, w),
            ),
            "taken for weights",
        ),
    ],
)
def test_a_wrong_merge_is_told_by_its_mistake(wrong, hint):
    rejected(checks.parallel(wrong), hint)
