"""Memory that is lent in pieces: never twice at once, never while anybody looks, always given back."""

import gc
import mmap
import weakref

import torch
from hypothesis import given
from hypothesis import strategies as st

from hookcore.memory.files.page_arena import PageArena, rounded, separate_pages

PAGE = mmap.PAGESIZE


class Borrower:
    """Does to an arena what the steps say, and checks it after each."""

    def __init__(self, pages):
        self.pages = pages
        self.arena = PageArena(pages * PAGE)
        self.lent = []  # pieces, with what they were filled with
        self.views = []  # of pieces that may have been given back
        self.number = 0

    def take(self, amount):
        piece = self.arena.take(amount)
        if piece is None:  # only where no gap is long enough
            assert self.longest_gap() * PAGE < rounded(max(amount, 1))
            return
        assert piece.nbytes == rounded(max(amount, 1)) == piece.tensor.numel() == len(piece.memoryview)
        assert piece.tensor.data_ptr() % PAGE == 0
        self.number = self.number % 100 + 1
        piece.tensor.fill_(self.number)  # would be seen in any other that it overlaps
        self.lent.append((piece, self.number))

    def longest_gap(self):
        busy = {
            page
            for piece in [*(it for it, _ in self.lent), *(it for it, _, _ in self.views)]
            for page in range(piece.start // PAGE, (piece.start + piece.nbytes) // PAGE)
        }
        return max(map(len, "".join("x" if page in busy else "." for page in range(self.pages)).split("x")))

    def give_back(self, number):
        if self.lent:
            self.arena.give_back(self.lent.pop(number % len(self.lent))[0])

    def look(self, number):
        if self.lent:
            piece, filled = self.lent[number % len(self.lent)]
            self.views.append((piece, piece.tensor[1:], filled))

    def look_away(self, number):
        if self.views:
            self.views.pop(number % len(self.views))

    def forget(self, number):
        # A piece that is looked at is not forgotten: it would be zeros for who looks.
        unseen = [it for it in self.lent if not it[0].in_use]
        if unseen:
            piece, filled = unseen[number % len(unseen)]
            piece.forget()
            assert not piece.tensor.any()
            piece.tensor.fill_(filled)

    def check(self):
        for piece, filled in self.lent:
            assert (piece.tensor == filled).all()
        for _, view, filled in self.views:
            assert (view == filled).all()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 6 * PAGE)),
        st.tuples(st.sampled_from(["give_back", "look", "look_away", "forget"]), st.integers(0, 9)),
    ),
    max_size=40,
)


@given(st.integers(1, 12), steps)
def test_pieces_never_overlap_and_all_room_comes_back(pages, steps):
    borrower = Borrower(pages)
    for what, amount in steps:
        getattr(borrower, what)(amount)
        borrower.check()
    borrower.views.clear()
    while borrower.lent:
        borrower.give_back(0)
    assert borrower.arena.lent() == 0
    assert borrower.arena.take(pages * PAGE) is not None


@given(st.integers(0, 3 * PAGE))
def test_a_piece_beside(nbytes):
    piece = separate_pages(nbytes)
    assert piece.nbytes >= max(nbytes, 1)
    assert piece.nbytes % PAGE == piece.tensor.data_ptr() % PAGE == 0
    assert not piece.tensor.any()
    piece.memoryview[0] = 5
    assert piece.tensor[0] == 5
    assert not piece.in_use
    view = piece.tensor[:1]
    assert piece.in_use
    del view
    assert not piece.in_use


def test_an_arena_given_another_piece_does_not_lend_it():
    arena = PageArena(PAGE)
    arena.give_back(separate_pages(5 * PAGE))
    assert arena.lent() == 0
    assert arena.take(2 * PAGE) is None


def test_memory_lives_on_in_tensors_only():
    piece = separate_pages(PAGE)
    memory = weakref.ref(piece.memoryview.obj)
    kept = piece.tensor[10:20]
    kept.fill_(3)
    gc.disable()
    try:
        del piece
        assert kept.tolist() == [3] * 10
        assert memory() is not None
        del kept
        assert memory() is None
    finally:
        gc.enable()


def test_pieces_made_in_inference_mode_are_used_outside_of_it():
    with torch.inference_mode():
        piece = PageArena(PAGE).take(PAGE)
    assert not piece.tensor.is_inference()
