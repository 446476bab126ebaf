from scalekd.analyze.figures import write_csv
from scalekd.common.markdown import code, escaped, table_row


def test_a_name_from_outside_stays_in_its_cell():
    assert table_row(["a|b\nc", "1.5", "-0.5"]) == "| a\\|b\\\\nc | 1.5 | -0.5 |"


def test_a_name_from_outside_is_no_markup():
    assert escaped("![x](http://a/b)<img src=x>") == "!\\[x\\](http://a/b)\\<img src=x>"
    assert escaped("# a\x1b[2J") == "\\# a\\\\x1b\\[2J"
    assert code("a `b`` c\n") == "``` a `b`` c\\n ```" and code("plain") == "`plain`"


def test_a_name_from_outside_is_no_formula(tmp_path):
    write_csv(tmp_path / "a.csv", ["run", "x"], [["=HYPERLINK(1)", -1.5], ["@a\x1b", 2], ["plain", 3]])
    assert (tmp_path / "a.csv").read_text() == "run,x\n'=HYPERLINK(1),-1.5\n'@a\\x1b,2\nplain,3\n"
