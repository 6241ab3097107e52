"""Published tables, reproduced: `python reproduce.py --table=mnist`.

`published` has the published numbers, and `plan` the cells with their deviations from the published settings. `runner`
trains and certifies the cells, whose progress `state` reads from disk. `results` keeps finished cells, `comparison`
puts them beside the published numbers, and `render` writes tables and pictures.
"""
