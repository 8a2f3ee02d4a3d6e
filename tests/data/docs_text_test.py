import pytest

from variator_jax.data.docs_text import sentences

SECTIONS = """Compute the mean of values.

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
"""


@pytest.mark.parametrize(
    "docstring, expected",
    [
        (
            "Return the first item, e.g. Some value of it. It is never\n    None in this case.\n",
            ["Return the first item, e.g. Some value of it.", "It is never None in this case."],
        ),
        (SECTIONS, ["Compute the mean of values.", "The mean is taken over all axes."]),
        (
            "Use :func:`~pkg.thing` or ``other`` with the *nice* `link <https://x.org>`_ to it.",
            ["Use pkg.thing or other with the nice link to it."],
        ),
        ("x = [1, 2, 3]; y = {4: 5} ** 6", []),
        ("Zu kurz.", []),
        ("Les donn\u00e9es que nous avons lues ici.", []),
        ("", []),
    ],
    ids=["abbreviations", "sections", "markup", "code", "short", "not ASCII", "empty"],
)
def test_prose_becomes_sentences_and_everything_else_is_dropped(docstring, expected):
    assert sentences(docstring) == expected
