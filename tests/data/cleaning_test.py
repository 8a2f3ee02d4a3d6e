from variator_jax.data.cleaning import sentences


def test_prose_is_split_into_sentences_and_abbreviations_do_not_end_one():
    text = "Return the first item, e.g. Some value of it. It is never\n    None in this case.\n"
    assert sentences(text) == [
        "Return the first item, e.g. Some value of it.",
        "It is never None in this case.",
    ]


def test_doctests_tables_code_and_parameter_lists_are_dropped():
    text = """Compute the mean of values.

    Parameters
    ----------
    a : array_like
        The numbers that we want to use here.

    Notes
    -----
    The mean is taken over all axes.

    >>> mean([1, 2, 3, 4, 5]) and then the rest of it
    2.0

    ```
    This is code within a fence here.
    ```

    ====== ======
    name   value of it
    ====== ======

    Args:
      x: This text is about an argument.

    Returns:
      This text is about the result.
    """
    assert sentences(text) == ["Compute the mean of values.", "The mean is taken over all axes."]


def test_inline_markup_is_taken_off():
    text = "Use :func:`~pkg.thing` or ``other`` with the *nice* `link <https://x.org>`_ to it."
    assert sentences(text) == ["Use pkg.thing or other with the nice link to it."]


def test_what_is_no_english_sentence_is_dropped():
    assert sentences("x = [1, 2, 3]; y = {4: 5} ** 6") == []
    assert sentences("Zu kurz.") == []
    assert sentences("Les donn\u00e9es que nous avons lues ici.") == []
    assert sentences("") == []
