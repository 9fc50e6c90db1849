"""How devices and keys are written."""

from gluon_syncbn.waiting_names import by_number, printable


def test_devices_are_in_the_order_of_their_numbers():
    assert sorted(["cpu(10)", "cpu(2)", "cpu(0)"], key=by_number) == ["cpu(0)", "cpu(2)", "cpu(10)"]


def test_a_key_has_one_line():
    assert printable("a\nb\tc\x7f ünïcödé ✓") == "a?b?c? ünïcödé ✓"
