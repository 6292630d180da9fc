from xblip import markdown


def test_columns_of_numbers_stand_to_the_right_and_a_bar_in_a_cell_stays_in_it():
    table = markdown.table([["task", "right", "n"], ["a|b", "93.1 (91 to 95)", 12], ["c", "–", 3]])
    assert table == "| task | right | n |\n| --- | ---: | ---: |\n| a\\|b | 93.1 (91 to 95) | 12 |\n| c | – | 3 |\n"


def test_a_table_without_rows_is_its_head():
    assert markdown.table([["task", "n"]]) == "| task | n |\n| --- | --- |\n"
