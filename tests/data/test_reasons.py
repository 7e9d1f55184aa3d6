"""Reasons are counted with one example and one sentence each, in names that any terminal takes."""

from dalle.data.reasons import REMEDIES, REPAIR, Tally, printable, remedy


def test_a_reason_keeps_its_first_example_and_says_what_to_do():
    tally = Tally()
    for name in ("b.jpg", "a.jpg"):
        tally.add("empty_image", name)
    tally.add("never seen before", number=3)
    other = Tally({"empty_image": 2}, {"empty_image": "c.jpg"})
    tally.update(other)
    assert tally.counts == {"empty_image": 4, "never seen before": 3} and tally.total() == 7
    assert tally.lines() == [f"      4  empty_image (b.jpg): {REMEDIES['empty_image']}",
                             f"      3  never seen before: {REPAIR}"]
    assert tally.summary() == "4 empty_image (b.jpg), 3 never seen before"
    assert tally.advice() == remedy("empty_image") and not Tally().advice()


def test_names_are_printed_whatever_bytes_they_are_of():
    assert printable("caf\xe9 \u65e5.jpg") == "caf\xe9 \u65e5.jpg"
    assert printable("a\udcff\n\ud800.jpg") == "a\\xff\\n\\ud800.jpg"
