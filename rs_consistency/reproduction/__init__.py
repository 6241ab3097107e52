"""Published tables, reproduced: `python reproduce.py --table=mnist`.

`published` has the numbers, `plan` the cells and what in them is not as published; `runner` trains and certifies them,
as `state` finds them on disk; `results` keeps what is finished, `comparison` puts it beside the published numbers, and
`render` writes tables and pictures.
"""
