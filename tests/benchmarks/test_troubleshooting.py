"""The page of errors is the source's."""

from benchmarks.troubleshooting import PAGE, Advice, advice_in, page


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m benchmarks.troubleshooting`"


def test_an_error_is_read_off_its_call():
    source = 'raise DataError("E-X", what=f"{count} rows " + "left", where=path, next="mend\\n them")'
    assert list(advice_in(source)) == [Advice("DataError", "E-X", "… rows left", "mend\n them")]
    assert not list(advice_in('raise ValueError("E-X", what="a", next="b")'))


def test_page_has_most_of_what_people_meet():
    text = page()
    for code in ("E-NONFINITE", "E-CONFIG-KEY", "E-LOCKED", "E-DISK", "E-SINK-MISSING"):
        assert f"`{code}`" in text, code
    assert text.count("\n| `E-") > 80
