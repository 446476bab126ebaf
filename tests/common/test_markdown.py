from scalekd.common.markdown import table_row


def test_a_name_from_outside_stays_in_its_cell():
    assert table_row(["a|b\nc", "1.5"]) == "| a\\|b\\nc | 1.5 |"
