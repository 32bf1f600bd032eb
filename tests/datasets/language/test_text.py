"""Byte-level text: windows, limits on bytes, encoding, what a change of text does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.datasets.language.text import SHARES, ByteText, Windows, join, limits, path_hash
from zoo.errors import ZooError


@dataclass(kw_only=True, eq=False, repr=False)
class Alphabet(ByteText):
    """A text in which every byte tells its place."""

    length: int = 200

    name = "alphabet"

    def read(self) -> Mapping[str, bytes]:
        text = bytes(i % 256 for i in range(self.length))
        return {"train": text, "val": text[: self.length // 2], "test": text}


@given(length=st.integers(2, 60), seq_len=st.integers(1, 59))
def test_targets_are_the_next_byte_and_windows_start_anywhere(length: int, seq_len: int):
    seq_len = min(seq_len, length - 1)
    text = torch.arange(length, dtype=torch.uint8)
    windows = Windows(text, seq_len)
    assert len(windows) == length - seq_len
    batch = windows.take(torch.arange(len(windows)))
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
    for start in range(len(windows)):
        assert batch["tokens"][start].tolist() == list(range(start, start + seq_len))
        assert batch["targets"][start].tolist() == list(range(start + 1, start + seq_len + 1))


@given(length=st.integers(20, 200), seq_len=st.integers(1, 9))
def test_evaluation_windows_follow_each_other_without_overlap(length: int, seq_len: int):
    data = Alphabet(length=length, seq_len=seq_len, eval_batch_size=7)
    targets = torch.cat([batch["targets"].flatten() for batch in data.test_dataloader()[0]])
    tokens = torch.cat([batch["tokens"].flatten() for batch in data.test_dataloader()[0]])
    count = (length - 1) // seq_len * seq_len
    assert tokens.tolist() == list(range(count))
    assert targets.tolist() == list(range(1, count + 1))


def test_fewer_evaluation_windows_are_spread_over_the_text(whole):
    data = Alphabet(length=201, seq_len=10, val_windows=3, test_windows=5)
    starts = whole(data.test_dataloader()[0])["tokens"][:, 0].tolist()
    assert starts == [0, 40, 80, 120, 160]
    assert whole(data.val_dataloader())["tokens"][:, 0].tolist() == [0, 30, 60]
    more = Alphabet(length=201, seq_len=10, test_windows=1000)
    more.setup()
    assert more.size("test") == 20


def test_test_sets_of_other_lengths_hold_the_same_bytes(whole):
    data = Alphabet(length=256, seq_len=8, test_windows=20, test_lengths=[8, 40, 16, 80])
    assert data.test_names == ["test", "8", "40", "16", "80"]
    assert data.max_seq_len == 80
    sets = {name: whole(data.eval_dataloader(name)) for name in data.test_names}
    assert sets["test"]["tokens"].shape == (20, 8)
    # 20 windows of 8 bytes are two stretches of 80; 16 and 40 divide them, as 8 does.
    shapes = {name: tuple(sets[name]["tokens"].shape) for name in ("8", "16", "40", "80")}
    assert shapes == {"8": (20, 8), "16": (10, 16), "40": (4, 40), "80": (2, 80)}
    held = [*range(80), *range(80, 160)]  # 255 // 80 = 3 places for 2 stretches: the first two
    for name in shapes:
        assert sets[name]["tokens"].flatten().tolist() == held
        assert sets[name]["targets"].flatten().tolist() == [byte + 1 for byte in held]


@given(seq_len=st.integers(1, 9), lengths=st.lists(st.integers(1, 60), min_size=1, unique=True))
def test_windows_of_every_test_length_stay_within_one_stretch(seq_len: int, lengths: list[int]):
    data = Alphabet(length=200, seq_len=seq_len, test_lengths=lengths)
    data.setup()
    longest = max(lengths)
    for length in lengths:
        starts = data.source(str(length)).starts
        assert data.size(str(length)) == 199 // longest * (longest // length)
        assert torch.equal(starts // longest, (starts + length - 1) // longest)
        assert len(starts.unique()) == len(starts)


def test_without_test_lengths_nothing_changes(whole):
    plain, more = Alphabet(seq_len=10), Alphabet(seq_len=10, test_lengths=[20])
    assert plain.test_names == ["test"]
    assert plain.max_seq_len == 10
    for name in ("val", "test"):
        left, right = (whole(data.eval_dataloader(name))["tokens"] for data in (plain, more))
        assert torch.equal(left, right)
    assert plain.fingerprint == more.fingerprint


def test_batches_of_longer_windows_hold_fewer_of_them():
    data = Alphabet(length=256, seq_len=10, eval_batch_size=8, test_lengths=[5, 20, 200])
    data.setup()
    assert {n: data.eval_rows(n) for n in ("val", "test", "5", "20", "200")} == {
        **dict.fromkeys(("val", "test", "5"), 8),
        "20": 4,
        "200": 1,
    }


def test_a_test_length_longer_than_the_test_text_is_refused():
    Alphabet(length=200, seq_len=10, test_lengths=[199]).setup()
    message = r"test_lengths 200 is too long for the test split .*200 bytes; allowed: at most 199"
    with pytest.raises(ZooError, match=message):
        Alphabet(length=200, seq_len=10, test_lengths=[20, 200]).setup()


def test_training_windows_reach_every_position(first):
    (batch,) = first(Alphabet(length=20, seq_len=9, batch_size=500), 1)
    assert sorted(set(batch["tokens"][:, 0].tolist())) == list(range(11))


def test_a_window_longer_than_a_split_is_refused():
    data = Alphabet(length=200, seq_len=100)
    with pytest.raises(
        ZooError, match=r"seq_len 100 is too long for the val split .*100 bytes.*99"
    ):
        data.setup()
    Alphabet(length=200, seq_len=99).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "seq_len=0 must be a whole number of at least 1"),
        ({"max_bytes": 0}, "max_bytes=0 must be a whole number of at least 1"),
        ({"max_bytes": 1000}, r"max_bytes 1000 leaves no window of seq_len 128 .*at least 2580"),
        (
            {"max_bytes": 4000, "test_lengths": [64, 256]},
            r"max_bytes 4000 leaves no window of test_lengths 256 for test; allowed: at least 5140",
        ),
        ({"test_lengths": [0]}, r"test_lengths\[0\]=0 must be a whole number of at least 1"),
        ({"test_lengths": 64}, "test_lengths=64 must be a list"),
        ({"test_lengths": [64, 64]}, r"test_lengths=\[64, 64\] must be a list of different values"),
        ({"val_windows": 0}, "val_windows=0 must be a whole number of at least 1"),
        ({"test_windows": -1}, "test_windows=-1 must be a whole number of at least 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        Alphabet(**options)


@given(text=st.text())
def test_text_survives_encoding(text: str):
    # Lone surrogates have no UTF-8 form and are not text.
    text = text.encode(errors="ignore").decode()
    tokens = ByteText.encode(text)
    assert all(0 <= token < ByteText.vocab_size for token in tokens)
    assert len(tokens) * ByteText.bytes_per_token == len(text.encode())
    assert ByteText.decode(tokens) == text


def test_a_broken_character_is_replaced():
    tokens = ByteText.encode("aü")[:-1]
    assert ByteText.decode(tokens) == "a\N{REPLACEMENT CHARACTER}"


def test_the_fingerprint_follows_the_bytes_alone():
    def fingerprint(**options: int) -> str:
        data = Alphabet(**options)
        data.setup()
        return data.fingerprint

    assert fingerprint(seq_len=10) == fingerprint(seq_len=20, val_windows=1, seed=3)
    assert fingerprint(seq_len=10, length=200) != fingerprint(seq_len=10, length=201)


def test_join_stops_reading_at_the_limit():
    def pieces():
        yield b"abc"
        yield b"def"
        pytest.fail("read a piece that was not needed")

    assert join(pieces(), 6) == b"abcdef"
    assert join(pieces(), 4) == b"abcd"
    assert join([b"ab", b"c"], None) == b"abc"
    assert join([b"ab", b"c"], 10) == b"abc"


def test_limits_divide_all_bytes():
    assert sum(SHARES.values()) == pytest.approx(1)
    assert limits(1000) == {"train": 900, "val": 50, "test": 50}
    assert limits(None) == {"train": None, "val": None, "test": None}


def test_path_hashes_are_even_and_fixed():
    assert path_hash("a/b.py") == path_hash("a/b.py") != path_hash("a/c.py")
    places = [path_hash(f"file{i}") / 2**64 for i in range(2000)]
    assert sum(place < 0.05 for place in places) / 2000 == pytest.approx(0.05, abs=0.025)


def test_the_base_class_has_no_text():
    with pytest.raises(NotImplementedError):
        ByteText().setup()
