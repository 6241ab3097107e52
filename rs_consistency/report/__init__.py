"""The report of `analyze.py --output`: `report.html`, figures as PNG and PDF, tables as Markdown, CSV and LaTeX.

`contents` reads what lies beside the files, `samples` asks their networks, `tables` and `figures` show it, `page` puts
it together.
"""
